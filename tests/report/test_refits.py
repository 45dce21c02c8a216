"""Refits on cached features: the material is what was trained on, and each answer has an independent twin."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression

from finetune_cli.config.load import load_config
from finetune_cli.errors import DataError
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics.calibration import softmax
from finetune_cli.metrics.folds import group_folds
from finetune_cli.photos.decode import decode
from finetune_cli.report import refit_data, refits
from finetune_cli.report.refit_data import Material
from finetune_cli.report.refits import Judges
from finetune_cli.runs.run import Run, SplitRow


def load(tiny_run) -> Material:
    return refit_data.load(tiny_run.run, load_config(tiny_run.run.folder / "config.yaml"))


def made(labels, features, l2=1e-3, classes=("a", "b", "c")) -> Material:
    labels = np.asarray(labels)
    features = np.asarray(features, np.float32)
    return Material(
        features if features.ndim == 3 else features[:, None],
        labels,
        np.ones(len(labels)),
        np.arange(len(labels)),
        tuple(SplitRow("train", classes[y], f"{i:04}", f"{classes[y]}/{i}.jpg") for i, y in enumerate(labels)),
        classes,
        len(labels),
        l2,
        0.0,
        0,
        calibrated=True,
    )


def clusters(each, spread, seed=0, classes=3):
    """`each` points around one corner for each class, in 6 dimensions."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return labels, (np.eye(classes, 6)[labels] * 4 + rng.normal(0, spread, (len(labels), 6))).astype(np.float32)


def test_the_material_is_what_the_backbone_makes_of_the_photos(tiny_run):
    found = load(tiny_run)
    keras = import_keras()
    model = keras.models.load_model(tiny_run.run.folder / "model.keras", compile=False)
    backbone = keras.Model(model.input, model.get_layer("logits").input)
    photos = np.stack([decode(tiny_run.photos / "train" / row.path, tiny_run.run.image_settings) for row in found.rows])
    flipped = photos[:, :, ::-1]
    assert found.features.shape == (49, 2, 24)
    np.testing.assert_allclose(found.features[:, 0], backbone(photos.astype(np.float32)), atol=1e-5)
    # View 1 is the photo itself or its mirror image: the config draws horizontal flips.
    mirrored = np.asarray(backbone(flipped.astype(np.float32)))
    distance = np.minimum(
        np.abs(found.features[:, 1] - found.features[:, 0]).max(axis=1),
        np.abs(found.features[:, 1] - mirrored).max(axis=1),
    )
    assert distance.max() < 1e-3
    assert [found.classes[y] for y in found.labels] == [row.label for row in found.rows]


def test_no_cache_is_said_and_none_is_made(tiny_run, tmp_path):
    settings = load_config(tiny_run.run.folder / "config.yaml", [f"runtime.cache_dir={tmp_path / 'none'}"])
    with pytest.raises(DataError, match="not in the feature cache"):
        refit_data.load(tiny_run.run, settings)
    assert not (tmp_path / "none").exists()


def test_another_augmentation_is_not_in_the_cache(tiny_run):
    settings = load_config(tiny_run.run.folder / "config.yaml", ["augmentation.rotation_range=10"])
    with pytest.raises(DataError, match="not in the feature cache"):
        refit_data.load(tiny_run.run, settings)


def test_a_large_set_is_thinned_evenly(tiny_run, monkeypatch):
    monkeypatch.setattr(refit_data, "_MOST_NUMBERS", 24 * 2 * 3 * 12)
    found = load(tiny_run)
    assert found.photos == 49
    assert np.bincount(found.labels).tolist() == [5, 4, 4]  # 17, 16 and 16 photos, a quarter of each
    adjusted = refits.with_strength(found)
    assert adjusted.l2 == pytest.approx(found.l2 * 49 / 13)


def test_groups_are_those_of_the_split(tiny_run, monkeypatch):
    rows = [replace(row, group=row.path[-6]) for row in tiny_run.run.split()]  # the tens of its number
    monkeypatch.setattr(Run, "split", lambda _run: rows)
    found = load(tiny_run)
    names = [row.path for row in found.rows]
    first, second = names.index("ant/ant-03.png"), names.index("bee/bee-07.png")
    assert found.groups[first] == found.groups[second]
    assert found.groups[first] != found.groups[names.index("ant/ant-11.png")]


@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2)])
def test_a_refit_equals_scikit_learn(part):
    """(1/n) sum CE + l2 |W|^2 is scikit-learn's C = 1 / (2 l2 n); with a part of the photos C stays the same."""
    labels, features = clusters(40, 2.0)
    stuff = made(labels, features, l2=0.02)
    chosen = np.arange(120)[part]
    ours = softmax(refits.refit(stuff, chosen).logits(features))
    theirs = LogisticRegression(C=1 / (2 * 0.02 * 120), tol=1e-8, max_iter=10_000).fit(features[part], labels[part])
    np.testing.assert_allclose(ours, theirs.predict_proba(features), atol=2e-3)


def test_flipped_labels_are_suspected_and_no_others():
    labels, features = clusters(30, 0.4)
    given = labels.copy()
    wrong = [3, 40, 77]
    given[wrong] = (labels[wrong] + 1) % 3
    found = refits.suspects(made(given, features), lambda _n: None)
    assert sorted(int(suspect.row.digest) for suspect in found) == wrong
    for suspect in found:
        assert suspect.suggested == "abc"[labels[int(suspect.row.digest)]]
        assert suspect.probability < 0.2 < 0.8 < suspect.suggested_probability


def test_the_wrong_label_of_the_tiny_run_is_found(tiny_run):
    found = refits.suspects(refits.with_strength(load(tiny_run)), lambda _n: None)
    assert tiny_run.wrong in [suspect.row.path for suspect in found[:3]]


def test_a_class_with_two_photos_is_left_alone():
    labels, features = clusters(20, 0.4)
    kept = np.concatenate([np.flatnonzero(labels < 2), [40, 41]])
    assert refits.suspects(made(labels[kept], features[kept]), lambda _n: None) == []


def test_views_that_teach_an_invariance_help():
    """What the judges show is shifted along one axis; only the extra views show that this axis means nothing."""
    rng = np.random.default_rng(1)
    labels, features = clusters(12, 1.2, seed=1)
    features[:, 5] = labels  # in the photos as they are, the axis gives the class away
    shifted = np.repeat(features[:, None], 6, axis=1)
    shifted[:, 1:, 5] = rng.normal(0, 3, (len(labels), 5))
    judge_labels, judges = clusters(60, 1.2, seed=2)
    judges[:, 5] = rng.normal(0, 3, len(judges))
    effect = refits.effect_of_views(made(labels, shifted, l2=1e-2), Judges(judges, judge_labels))
    assert effect.views == 6
    assert effect.comparison.difference.value == pytest.approx(effect.accuracies[1] - effect.accuracies[0])
    assert effect.comparison.difference.low > 0
    mean, low, high = effect.log_loss
    assert 0 < low < mean < high


def test_the_learning_curve_counts_what_it_says():
    labels, features = clusters(40, 1.5)
    judge_labels, judges = clusters(50, 1.5, seed=3)
    judge_labels, judges = judge_labels[:100], judges[:100]  # nothing to judge class c by
    calls = []
    curve = refits.learning_curve(made(labels, features), Judges(judges, judge_labels), calls.append)
    assert len(calls) == refits.fits()
    assert curve.photos == (30, 60, 90, 120)
    assert np.isnan(curve.recall[:, 2]).all()
    full = LogisticRegression(C=1 / (2 * 1e-3 * 120), tol=1e-8, max_iter=10_000).fit(features, labels)
    right = full.predict(judges) == judge_labels
    assert curve.accuracy[-1] == pytest.approx(right.mean(), abs=0.011)
    assert curve.recall[-1, 0] == pytest.approx(right[:50].mean(), abs=0.021)
    np.testing.assert_allclose(curve.gain[:2], curve.recall[-1, :2] - curve.recall[1, :2])


def test_cross_validated_photos_are_judged_by_heads_that_do_not_know_their_fold():
    labels, features = clusters(20, 2.5)
    folds = 1 + np.arange(60) % 4
    folds[:2] = 0
    stuff = replace(made(labels, features), folds=folds)
    calls = []
    curve = refits.learning_curve(stuff, Judges.of_folds(stuff), calls.append)
    assert len(calls) == refits.fits(4) == 16
    assert curve.photos == (12, 24, 34, 46)
    right = np.zeros(60, bool)
    for fold in (1, 2, 3, 4):
        rest, own = folds != fold, folds == fold
        head = LogisticRegression(C=1 / (2 * 1e-3 * 60), tol=1e-8, max_iter=10_000).fit(features[rest], labels[rest])
        right[own] = head.predict(features[own]) == labels[own]
    assert 0.5 < right[2:].mean() < 1
    assert curve.accuracy[-1] == pytest.approx(right[2:].mean(), abs=0.018)
    assert curve.support.sum() == 58


def test_suspects_are_judged_in_the_folds_of_the_run():
    labels, features = clusters(12, 0.3)
    folds = 1 + np.arange(36) // 2 % 3
    wrong = labels.copy()
    wrong[[0, 4]] = 1  # of two folds
    stuff = replace(made(wrong, features), folds=folds)
    assert {suspect.row.path for suspect in refits.suspects(stuff, lambda _n: None)} == {"b/0.jpg", "b/4.jpg"}
    never = replace(stuff, folds=np.where(np.arange(36) < 2, 0, folds))
    assert {suspect.row.path for suspect in refits.suspects(never, lambda _n: None)} == {"b/4.jpg"}


def test_gain_and_error_by_hand():
    right = np.array([[0, 0, 0, 0], [1, 0, 0.5, 1], [1, 1, 1, 1], [1, 1, 1, 0]], float)
    curve = refits._summed_up(right, (1, 2, 3, 4), np.array([0, 0, 0, 1]), 3)
    gains = np.array([0, 1, 0.5])
    assert curve.gain[0] == pytest.approx(0.5)
    assert curve.error[0] == pytest.approx(gains.std(ddof=1) / np.sqrt(3))
    assert curve.gain[1] == -1
    assert np.isinf(curve.error[1])
    assert np.isnan(curve.gain[2])


def modest(each, seed):
    """Three classes in more dimensions than photos: a strong l2 mixes them least, and dares least."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), each)
    return labels, (2.4 * np.eye(3, 100)[labels] + rng.normal(0, 1, (len(labels), 100))).astype(np.float32)


def held_out_log_loss(labels, features, l2, calibrated):
    """Log loss of scikit-learn's heads in the same five folds, after the best of many temperatures if `calibrated`."""
    fold = group_folds(labels, np.arange(len(labels)), 5, 0)
    logits = np.zeros((len(labels), 3))
    for k in range(5):
        rest = fold != k
        fitted = LogisticRegression(C=1 / (2 * l2 * rest.sum()), tol=1e-8, max_iter=10_000)
        logits[~rest] = fitted.fit(features[rest], labels[rest]).decision_function(features[~rest])
    temperatures = np.geomspace(0.1, 10, 400) if calibrated else [1.0]
    return min(reference.log_loss(labels, softmax(logits, temperature)) for temperature in temperatures)


@pytest.mark.parametrize("calibrated", [True, False])
def test_without_l2_the_one_is_chosen_that_suits_the_calibration(calibrated):
    labels, features = modest(25, seed=4)
    stuff = replace(made(labels, features), l2=0.0, calibrated=calibrated)
    chosen = refits.with_strength(stuff).l2
    tried = {k: held_out_log_loss(labels, features, chosen * 10 ** (k / 2), calibrated) for k in (-2, -1, 0, 1, 2)}
    assert tried[0] <= min(tried.values()) * 1.01  # the search takes a weaker one only for a gain of half a per cent
    other = refits.with_strength(replace(stuff, calibrated=not calibrated)).l2
    assert (chosen > other) == calibrated


def test_the_material_knows_whether_the_model_is_calibrated(tiny_run):
    assert load(tiny_run).calibrated
    settings = load_config(tiny_run.run.folder / "config.yaml", ["calibration=none"])
    assert not refit_data.load(tiny_run.run, settings).calibrated


def test_modest_probabilities_are_no_harm_to_a_calibrated_model():
    """All views are the photo itself, so nothing is learnt from them; only l2 differs, and is much stronger."""
    labels, features = clusters(20, 1.0)
    judge_labels, judges = clusters(40, 1.0, seed=5)
    stuff = made(labels, np.repeat(features[:, None], 2, axis=1), l2=3.0)
    calibrated = refits.effect_of_views(stuff, Judges(judges, judge_labels)).log_loss
    plain = refits.effect_of_views(replace(stuff, calibrated=False), Judges(judges, judge_labels)).log_loss
    assert plain[2] < -0.2  # "did harm"
    assert abs(calibrated[0]) < 0.1
