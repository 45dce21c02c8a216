"""How a run learns to answer `unknown`: the photos that set the threshold, the references, the choice of the score."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs_fixture
import trainings
from scipy.stats import beta

from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError, DataError, Interrupted, RunError
from finetune_cli.evaluation.photos import photos_of_run
from finetune_cli.inference.predictor import InsightfulPredictor, RunPredictor
from finetune_cli.metrics.calibration import fit_temperature
from finetune_cli.photos import scan
from finetune_cli.photos.decode import decode
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Silent
from finetune_cli.runs import novelty as stored
from finetune_cli.training import pipeline, unknown
from finetune_cli.training.tuning.candidates import Validation
from finetune_cli.training.unknown import Material


def sample(i, label=0, group=None, content=None):
    digest = hashlib.sha256(str(content if content is not None else i).encode()).hexdigest()
    return Sample(Path(f"{i}.png"), f"{i}.png", label, digest, group)


def config(*overrides):
    return load_config(None, ["data.train=photos", *overrides])


def shares(photos, rate=0.05):
    return unknown.sets_threshold(photos, config(f"unknown.false_rejects={rate}"))


@pytest.mark.parametrize(
    ("photos", "rate", "found"),
    [
        (26, 0.05, 19),
        (49, 0.05, 19),
        (60, 0.05, 39),
        (72, 0.05, 39),
        (100, 0.05, 59),
        (2000, 0.05, 999),
        (200, 0.01, 99),
    ],
)
def test_about_half_sets_the_threshold_where_the_rate_is_met_exactly(photos, rate, found):
    assert shares([sample(i, i % 2) for i in range(photos)], rate).sum() == found


def test_large_groups_come_as_near_as_they_can():
    photos = [sample(i, i % 9, group=f"person {i // 9}") for i in range(54)]
    assert shares(photos).sum() == 27  # 18 would be too few


def test_every_class_gives_its_share():
    photos = [sample(i, label=0 if i < 60 else 1) for i in range(80)]
    mask = shares(photos)
    assert mask.sum() == 39
    assert mask[60:].sum() == pytest.approx(39 / 4, abs=1)


def test_groups_and_copies_stay_on_one_side():
    photos = [sample(i, i % 2, group=f"g{i // 3}") for i in range(90)]
    photos += [sample(i, i % 2, content=f"copy {i // 2 % 9}") for i in range(100, 118)]
    mask = shares(photos)
    sides = {}
    for each, side in zip(photos, mask, strict=True):
        sides.setdefault(each.group or each.digest, set()).add(bool(side))
    assert all(len(found) == 1 for found in sides.values())
    assert 0 < mask.sum() <= 59


def test_content_decides_and_not_the_order_of_the_files():
    photos = [sample(i, i % 3) for i in range(80)]
    chosen = {each.digest for each, side in zip(photos, shares(photos), strict=True) if side}
    backwards = photos[::-1]
    assert chosen == {each.digest for each, side in zip(backwards, shares(backwards), strict=True) if side}


@pytest.mark.parametrize("photos", [5, 25])
def test_too_few_photos_are_an_error_that_names_the_least_number(photos):
    with pytest.raises(DataError, match=f"needs at least 26 validation photos, 19 of which.*there are {photos}"):
        shares([sample(i, i % 2) for i in range(photos)])


def test_one_large_group_is_too_few():
    with pytest.raises(DataError, match=r"19 of which .* there are 100 in 1 group"):
        shares([sample(i, group="all") for i in range(100)])


def test_without_it_all_validation_photos_choose():
    assert not unknown.sets_threshold([sample(i) for i in range(5)], config()).any()


@pytest.mark.parametrize("rate", ["0", "0.7", "x", "null"])
def test_a_rate_that_makes_no_sense_is_an_error(rate):
    with pytest.raises(ConfigError, match=r"unknown\.false_rejects"):
        config(f"unknown.false_rejects={rate}")


def test_auto_is_all_defaults():
    assert config("unknown=auto").unknown == config("unknown.false_rejects=0.05").unknown


def test_a_class_of_that_name_is_an_error():
    class Data:
        classes, val = ("ant", "unknown"), ()

    with pytest.raises(DataError, match="a class is named unknown"):
        unknown.checked(config("unknown.false_rejects=0.05"))(Data(), None)
    unknown.checked(config())(Data(), None)


def test_references_are_spread_over_the_classes_and_no_copies():
    photos = [sample(i, label=0 if i < 90 else 1) for i in range(100)] + [sample(200, 1, content=95)]
    chosen = unknown.references(photos, 30)
    assert [photos[i].label for i in chosen].count(1) == 10
    assert len(chosen) == 30
    assert len(unknown.references(photos)) == 100
    names = {photos[i].digest for i in chosen}
    assert names == {photos[::-1][i].digest for i in unknown.references(photos[::-1], 30)}


def clouds(classes=4, each=30, spread=6.0):
    """Classes far from one another: a class that was left out is easily told."""
    rng = np.random.default_rng(0)
    centres = spread * rng.normal(size=(classes, 8))
    labels = np.repeat(np.arange(classes), each)
    features = (centres[labels] + rng.normal(size=(len(labels), 8))).astype(np.float32)
    half = np.arange(len(labels)) % 2 == 0
    return Material(
        features[half], labels[half], np.ones(half.sum()), unknown.as_stored(features[half]), features[~half],
        labels[~half], 0.01,
    )  # fmt: skip


def test_classes_that_are_far_from_the_others_are_detected():
    found = unknown.choose(clouds(), 4, 0.05, lambda _n: None)
    assert set(found.detection) == {0, 1, 2, 3}
    assert found.compared["distance"] > 0.9
    assert found.score == "distance"  # the first of equals, or the better one
    alike = unknown.choose(clouds(spread=0.0), 4, 0.05, lambda _n: None)
    assert max(alike.compared.values()) < 0.2


def test_of_many_classes_some_are_left_out():
    counted = []
    found = unknown.choose(clouds(classes=25, each=8), 25, 0.05, counted.append)
    assert len(found.detection) == unknown.MOST_LEFT_OUT == sum(counted)


def test_with_two_classes_the_distance_is_used():
    found = unknown.choose(clouds(classes=2), 2, 0.05, lambda _n: None)
    assert set(found.compared) == {"distance"}


def test_a_class_that_only_the_training_photos_have_is_not_left_out():
    material = clouds()
    kept = material.val_labels != 3
    material = replace(material, val_features=material.val_features[kept], val_labels=material.val_labels[kept])
    assert set(unknown.choose(material, 4, 0.05, lambda _n: None).detection) == {0, 1, 2}
    kept = material.val_labels == 0
    material = replace(material, val_features=material.val_features[kept], val_labels=material.val_labels[kept])
    found = unknown.choose(material, 4, 0.05, lambda _n: None)
    assert (found.score, found.detection, found.compared) == ("distance", {}, {})


@pytest.mark.parametrize(("rate", "held_out"), [(0.05, 19), (0.05, 39), (0.01, 400), (0.1, 57)])
def test_the_interval_is_that_of_the_share_that_split_conformal_prediction_refuses(rate, held_out):
    k = int(rate * (held_out + 1) + 1e-9)
    expected = beta.ppf([0.025, 0.975], k, held_out + 1 - k)
    assert unknown.interval(rate, held_out) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A function: a folder for runs and overrides -> the config of a training on 49 + 30 photos of a tiny network."""
    home = tmp_path_factory.mktemp("training")
    runs_fixture.draw_photos(home / "photos", ("ant", "bee", "wasp"))
    trainings.build_backbone(home / "tiny.keras")
    common = (
        f"data.train={home / 'photos' / 'train'}",
        f"model.backbone={home / 'tiny.keras'}",
        f"runtime.cache_dir={home / 'cache'}",
        f"image.size={runs_fixture.SIZE}",
        "unknown.false_rejects=0.05",
    )
    return lambda folder, *overrides: load_config(None, [*common, f"output.directory={folder}", *overrides])


FILES = ("unknown-references.npy", "unknown-scores.npy", "inference/model.bin", "metrics.json", "split.csv")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return pipeline.train(settings(tmp_path_factory.mktemp("whole")), Silent())


def test_a_training_learns_to_answer_unknown(settings, whole, tmp_path):
    facts = whole.manifest.unknown
    assert facts is not None
    assert (facts.false_rejects, facts.held_out, facts.references, facts.tuned) == (0.05, 19, 49, False)
    assert set(facts.detection) == {"ant", "bee", "wasp"}
    assert json.loads(whole.read("metrics.json"))["unknown"] == facts.to_json()
    known = stored.read(whole)
    predictor = InsightfulPredictor(whole, 1, known=known)
    samples = photos_of_run(whole, None, 1, lambda _n: None, "val").samples
    pixels = np.stack([scan.decode_sample(each, whole.image_settings) for each in samples])
    features = predictor.insight(pixels).features
    logits = features @ predictor.end.kernel + predictor.end.bias
    mask = unknown.sets_threshold(samples, settings(tmp_path))
    np.testing.assert_allclose(np.sort(known.score(features, logits)[mask]), known.held_out, atol=1e-5)
    labels = np.array([each.label for each in samples])
    assert whole.temperature == pytest.approx(fit_temperature(logits[~mask], labels[~mask]), rel=1e-3)
    assert whole.manifest.metrics["val"].photos == 30


@pytest.mark.slow
def test_it_is_resumed_to_the_same_bits(settings, whole, tmp_path, monkeypatch):
    def killed(*arguments):
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.outputs, "write_tables", killed)
        with pytest.raises(Interrupted):
            pipeline.train(settings(tmp_path), Silent())
    [folder] = tmp_path.iterdir()
    with pytest.raises(RunError, match=r"unknown\.false_rejects was 0\.05"):
        pipeline.resume(folder, settings(tmp_path, "unknown.false_rejects=0.2"), Silent())
    resumed = pipeline.resume(folder, load_config(folder / "config.yaml", own=True), Silent())
    assert {name: resumed.manifest.files[name] for name in FILES} == {
        name: whole.manifest.files[name] for name in FILES
    }


def test_the_photos_that_set_the_threshold_end_no_training(settings, tmp_path, monkeypatch):
    seen = []

    def fit_epochs(_train, val, *others):
        seen.append(len(val.labels))
        raise Interrupted(2)

    monkeypatch.setattr(pipeline, "fit_epochs", fit_epochs)
    with pytest.raises(Interrupted):
        pipeline.train(settings(tmp_path, "training.solver=adam"), Silent())
    assert seen == [11]


def test_too_few_photos_are_told_before_the_features_are_computed(settings, tmp_path):
    with pytest.raises(DataError, match="needs at least 132 validation photos"):
        pipeline.train(settings(tmp_path, "unknown.false_rejects=0.01"), Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_photos_that_set_the_threshold_choose_no_tuned_model(settings, tmp_path, monkeypatch):
    numbers = []
    original = Validation.candidate

    def candidate(self, *arguments, **options):
        numbers.append(len(self.labels))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Validation, "candidate", candidate)
    run = pipeline.train(settings(tmp_path, "fine_tuning.epochs=3", "fine_tuning.unfreeze=all"), Silent())
    assert set(numbers) == {11}
    assert run.manifest.unknown.tuned == run.manifest.backbone.tuned
    assert run.manifest.fine_tuning["compared"]["val"]["photos"] == 30
    known = stored.read(run)
    predictor = InsightfulPredictor(run, 1, known=known)
    samples = photos_of_run(run, None, 1, lambda _n: None, "val").samples
    pixels = np.stack([scan.decode_sample(each, run.image_settings) for each in samples])
    features = predictor.insight(pixels).features
    logits = features @ predictor.end.kernel + predictor.end.bias
    mask = unknown.sets_threshold(samples, settings(tmp_path))
    np.testing.assert_allclose(np.sort(known.score(features, logits)[mask]), known.held_out, atol=1e-4)


@pytest.mark.slow
def test_insects_are_no_scenes(shared_data, tmp_path):
    overrides = (
        f"data.train={shared_data / 'scenes' / 'train'}",
        "model.backbone=efficientnet_lite0",
        "augmentation=null",
        "unknown=auto",
        f"runtime.cache_dir={tmp_path / 'cache'}",
        f"output.directory={tmp_path / 'runs'}",
    )
    run = pipeline.train(load_config(None, overrides), Silent())
    predictor = RunPredictor(run, 1)

    def refused(folder):
        photos = sorted(folder.rglob("*.jpg"))[::4]
        answers = [predictor.answers(decode(photo, run.image_settings)[None])[0] for photo in photos]
        return np.mean([answer.p_value <= 0.05 for answer in answers])

    # Measured with flips and shifts: 100 %, 4 to 5 %, and an interval of 0.6 to 13.5 % for 39 held-out photos.
    assert refused(shared_data / "hymenoptera" / "val") >= 0.9
    assert refused(shared_data / "scenes" / "test") <= 0.15
