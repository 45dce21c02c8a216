"""How a run learns to answer `unknown`: the photos that set the threshold, the references, the choice of the score."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs_fixture
import trainings
from command_line import run as command
from scipy.stats import beta

from finetune_cli.cli import train as train_command
from finetune_cli.cli.console import Console
from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError, DataError, Interrupted, RunError
from finetune_cli.evaluation.photos import photos_of_run
from finetune_cli.fields import Fields
from finetune_cli.head.lbfgs import fit_lbfgs
from finetune_cli.inference.predictor import InsightfulPredictor, RunPredictor, Source
from finetune_cli.metrics.calibration import fit_temperature
from finetune_cli.metrics.novelty import NoveltyScore
from finetune_cli.photos import scan
from finetune_cli.photos.decode import decode
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Silent
from finetune_cli.runs import novelty as stored
from finetune_cli.runs.manifest import Unknown
from finetune_cli.training import fit, pipeline, unknown
from finetune_cli.training.prepare import prepare
from finetune_cli.training.requirements import check_settings
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
    found = unknown.choose([clouds()], 4, 0.05, lambda _n: None)
    assert set(found.detection) == {0, 1, 2, 3}
    assert found.compared["distance"] > 0.9
    assert found.score == "distance"  # the first of equals, or the better one
    alike = unknown.choose([clouds(spread=0.0)], 4, 0.05, lambda _n: None)
    assert max(alike.compared.values()) < 0.2


def test_of_many_classes_some_are_left_out():
    counted = []
    found = unknown.choose([clouds(classes=25, each=8)], 25, 0.05, counted.append)
    assert len(found.detection) == unknown.MOST_LEFT_OUT == sum(counted)


def test_with_two_classes_the_distance_is_used():
    found = unknown.choose([clouds(classes=2)], 2, 0.05, lambda _n: None)
    assert set(found.compared) == {"distance"}


def test_a_class_that_only_the_training_photos_have_is_not_left_out():
    material = clouds()
    kept = material.val_labels != 3
    material = replace(material, val_features=material.val_features[kept], val_labels=material.val_labels[kept])
    assert set(unknown.choose([material], 4, 0.05, lambda _n: None).detection) == {0, 1, 2}
    kept = material.val_labels == 0
    material = replace(material, val_features=material.val_features[kept], val_labels=material.val_labels[kept])
    found = unknown.choose([material], 4, 0.05, lambda _n: None)
    assert (found.score, found.detection, found.compared) == ("distance", {}, {})


def test_of_several_materials_all_photos_are_taken_together():
    whole = clouds()
    first = np.arange(len(whole.val_labels)) % 3 > 0
    parts = [
        replace(whole, val_features=whole.val_features[m], val_labels=whole.val_labels[m]) for m in (first, ~first)
    ]
    found = unknown.choose(parts, 4, 0.05, lambda _n: None)
    # The distances are the same as of one material; those of a left-out class's references count twice.
    assert found.detection.keys() == {0, 1, 2, 3}
    assert found.compared["distance"] == pytest.approx(
        unknown.choose([whole], 4, 0.05, lambda _n: None).compared["distance"]
    )
    nobody = replace(whole, val_features=whole.val_features[:0], val_labels=whole.val_labels[:0])
    assert unknown.choose([whole, nobody], 4, 0.05, lambda _n: None).detection.keys() == {0, 1, 2, 3}


def in_folds(photos, folds=3, never=()):
    return [replace(s, fold=None if i in never else i % folds + 1) for i, s in enumerate(photos)]


def test_a_photo_of_a_fold_is_compared_with_photos_outside_it():
    photos = in_folds([sample(i, i % 2) for i in range(30)], never=(7, 8))
    found = list(unknown.by_fold(photos))
    assert [photos[rows[0]].fold for rows, _outside in found] == [1, 2, 3]
    assert sorted(np.concatenate([rows for rows, _outside in found])) == sorted(set(range(30)) - {7, 8})
    for rows, outside in found:
        assert sorted([*rows, *outside]) == list(range(30))


def test_outside_a_fold_there_are_as_many_references_as_in_the_end(monkeypatch):
    monkeypatch.setattr(unknown.references, "__defaults__", (10,))
    photos = in_folds([sample(i, i % 2) for i in range(30)])
    assert [len(outside) for _rows, outside in unknown.by_fold(photos)] == [10, 10, 10]


@pytest.mark.parametrize(("photos", "rate", "enough"), [(19, 0.05, True), (18, 0.05, False), (19, 0.04, False)])
def test_with_folds_every_photo_that_is_held_out_once_counts(photos, rate, enough):
    class Data:
        classes, val = ("ant", "bee"), ()
        train = in_folds([sample(i, i % 2) for i in range(photos + 3)], never=range(photos, photos + 3))

    check = unknown.checked(config(f"unknown.false_rejects={rate}", "data.folds=3"))
    if enough:
        check(Data(), None)
        return
    with pytest.raises(DataError, match=f"at least {24 if rate == 0.04 else 19} cross-validated.*there are {photos}"):
        check(Data(), None)


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
    predictor = InsightfulPredictor(Source.of(whole, known), 1)
    samples = photos_of_run(whole, None, 1, lambda _n: None, "val").samples
    pixels = np.stack([scan.decode_sample(each, whole.image_settings) for each in samples])
    features = predictor.insight(pixels).features
    logits = features @ predictor.end.kernel + predictor.end.bias
    mask = unknown.sets_threshold(samples, settings(tmp_path))
    np.testing.assert_allclose(np.sort(known.score(features, logits)[mask]), known.held_out, atol=1e-5)
    labels = np.array([each.label for each in samples])
    assert whole.temperature == pytest.approx(fit_temperature(logits[~mask], labels[~mask]), rel=1e-3)
    assert whole.manifest.metrics["val"].photos == 30


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A function: a folder for runs and overrides -> the config of a training in four folds, on 49 photos."""
    home = tmp_path_factory.mktemp("folded")
    runs_fixture.draw_photos(home / "photos", ("ant", "bee", "wasp"))
    (home / "photos" / "val").rename(home / "new photos")
    shutil.rmtree(home / "photos" / "test")
    trainings.build_backbone(home / "tiny.keras")
    common = (
        f"data.train={home / 'photos' / 'train'}",
        "data.folds=4",
        f"model.backbone={home / 'tiny.keras'}",
        f"runtime.cache_dir={home / 'cache'}",
        f"image.size={runs_fixture.SIZE}",
        "unknown.false_rejects=0.05",
    )
    return lambda folder, *overrides: load_config(None, [*common, f"output.directory={folder}", *overrides])


@pytest.fixture(scope="module")
def whole_in_folds(folded, tmp_path_factory):
    return pipeline.train(folded(tmp_path_factory.mktemp("whole in folds")), Silent())


def test_with_folds_every_photo_sets_the_threshold_without_its_fold(folded, whole_in_folds, tmp_path):
    run, facts = whole_in_folds, whole_in_folds.manifest.unknown
    assert facts is not None
    assert (facts.interval, facts.held_out, facts.references, facts.tuned) == (None, 49, 49, False)
    assert json.loads(run.read("metrics.json"))["unknown"] == facts.to_json()
    assert facts.to_json()["approximate"] is True
    assert set(facts.detection) == {"ant", "bee", "wasp"}
    prepared = prepare(check_settings(folded(tmp_path)), Silent())
    train, l2 = prepared.parts["train"], run.manifest.solver.l2
    data = fit.head_data(prepared.config, train, run.classes)
    expected = []
    for fold in (1, 2, 3, 4):
        others, features = data.folds != fold, prepared.validating.array[data.folds == fold, 0]
        head = fit_lbfgs(data.part(others).rows(), l2)
        score = NoveltyScore(unknown.as_stored(train.array[others, 0]), facts.energy_weight)
        expected += [*score(features, head.logits(features))]
    np.testing.assert_allclose(stored.read(run).held_out, np.sort(expected), rtol=1e-3)


def test_a_run_with_folds_calls_its_rate_approximate(folded, whole_in_folds, tmp_path, capsys):
    run = whole_in_folds
    train_command._print_result(Console(), run)
    assert "unknown: refuses approximately 5.0% of" in " ".join(capsys.readouterr().out.split())
    answer = command("evaluate", "--run", run.folder, "--output", tmp_path / "own")
    assert answer.exit_code == 0, answer.output
    assert "unknown: cross-validated predictions have no p-values" in answer.stdout
    assert json.loads((tmp_path / "own" / "metrics.json").read_text())["folds"]["unknown"] is None
    assert not (tmp_path / "own" / "unknown.csv").exists()
    page = " ".join((tmp_path / "own" / "report.html").read_text().split())
    assert "approximately 5.0% of the photos that do show a class are refused" in page
    assert "95 % interval" not in page[page.index('id="unknown"') :][:1500]
    new = folded(tmp_path).data.train.parents[1] / "new photos"
    answer = command("evaluate", new, "--run", run.folder, "--output", tmp_path / "new", "--no-report")
    assert answer.exit_code == 0, answer.output
    assert "of 30 photos; expected: approximately 5.0%" in answer.stdout
    found = json.loads((tmp_path / "new" / "metrics.json").read_text())["data"]["unknown"]
    assert (found["approximate"], found["counted"]) == (True, 30)
    answer = command("predict", new, "--run", run.folder, "--quiet", "--format", "jsonl", "--unknown", 1)
    assert {json.loads(line)["label"] for line in answer.stdout.splitlines()} == {"unknown"}
    assert command("predict", new, "--run", run.folder, "--quiet", "--unknown", 0.001).exit_code == 2


def test_facts_without_the_word_approximate_are_read(whole):
    document = whole.manifest.unknown.to_json()
    del document["approximate"]
    assert Unknown.from_json(Fields(document)) == whole.manifest.unknown


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """A function: a config whose runs are in `tmp_path` -> the folder of its run, killed before it is finished."""

    def killed(*arguments):
        raise Interrupted(2)

    def train(config):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.outputs, "write_tables", killed)
            with pytest.raises(Interrupted):
                pipeline.train(config, Silent())
        [folder] = tmp_path.iterdir()
        return folder

    return train


def hashes(run):
    return {name: run.manifest.files[name] for name in FILES}


@pytest.mark.slow
def test_it_is_resumed_to_the_same_bits(settings, whole, tmp_path, interrupted):
    folder = interrupted(settings(tmp_path))
    with pytest.raises(RunError, match=r"unknown\.false_rejects was 0\.05"):
        pipeline.resume(folder, settings(tmp_path, "unknown.false_rejects=0.2"), Silent())
    resumed = pipeline.resume(folder, load_config(folder / "config.yaml", own=True), Silent())
    assert hashes(resumed) == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("training.solver=adam", "training.epochs=3", "training.l2=0.01")])
def test_with_folds_it_is_resumed_to_the_same_bits(folded, tmp_path, tmp_path_factory, interrupted, overrides):
    folder = interrupted(folded(tmp_path, *overrides))
    resumed = pipeline.resume(folder, load_config(folder / "config.yaml", own=True), Silent())
    expected = pipeline.train(folded(tmp_path_factory.mktemp("again"), *overrides), Silent())
    assert hashes(resumed) == hashes(expected)


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
    predictor = InsightfulPredictor(Source.of(run, known), 1)
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
