"""Metrics against scikit-learn on random inputs, against SciPy, and against cases counted by hand."""

import json
import math
import sys

import numpy as np
import pytest

from finetune_cli.errors import DataError, FinetuneError
from finetune_cli.metrics import calibration
from finetune_cli.metrics import scores as metrics

CASES = [(seed, photos, classes) for seed, photos, classes in [(0, 400, 2), (1, 300, 7), (2, 57, 12), (3, 1000, 4)]]


def random_case(seed, photos, classes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, photos)
    logits = rng.normal(0, 1.5, (photos, classes))
    logits[np.arange(photos), labels] += 1.2
    powers = np.exp(logits)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(dtype), labels, logits


def names(count):
    return [f"class {i}" for i in range(count)]


@pytest.mark.parametrize(("seed", "photos", "classes"), CASES)
def test_scores_agree_with_scikit_learn(seed, photos, classes):
    from sklearn import metrics as sk

    p, y, _ = random_case(seed, photos, classes)
    predicted, everyone = p.argmax(axis=1), list(range(classes))
    ours = metrics.evaluate(p, y, names(classes))
    assert ours.accuracy.value == pytest.approx(sk.accuracy_score(y, predicted))
    assert ours.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(y, predicted))
    assert ours.macro_f1 == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    assert ours.weighted_f1 == pytest.approx(sk.f1_score(y, predicted, average="weighted"))
    assert ours.log_loss == pytest.approx(sk.log_loss(y, p, labels=everyone))
    brier = sk.brier_score_loss(y, p if classes > 2 else p[:, 1], labels=everyone, scale_by_half=False)
    assert ours.calibration.brier_score == pytest.approx(brier)
    assert np.array_equal(ours.confusion, sk.confusion_matrix(y, predicted, labels=everyone))
    for k, share in ours.top_k.items():
        assert share.value == pytest.approx(sk.top_k_accuracy_score(y, p, k=k, labels=everyone))
    table = sk.precision_recall_fscore_support(y, predicted, labels=everyone, zero_division=0)
    mine = [[row.precision or 0, row.recall or 0, row.f1 or 0, row.support] for row in ours.per_class]
    assert np.allclose(mine, np.stack(table, axis=1))


def test_top_k_is_given_only_where_it_says_something():
    assert set(metrics.evaluate(*random_case(0, 20, 2)[:2], names(2)).top_k) == set()
    assert set(metrics.evaluate(*random_case(0, 20, 4)[:2], names(4)).top_k) == {3}
    assert set(metrics.evaluate(*random_case(0, 20, 6)[:2], names(6)).top_k) == {3, 5}


def test_a_case_counted_by_hand():
    p = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.5, 0.3]]
    ours = metrics.evaluate(p, [0, 1, 1, 1], ["a", "b", "c"])  # predicted: a a b b
    assert ours.photos == 4
    assert ours.accuracy.value == 0.75
    assert ours.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    a, b, c = ours.per_class
    assert (a.precision, a.recall, a.f1, a.support, a.predicted) == (0.5, 1.0, pytest.approx(2 / 3), 1, 2)
    assert (b.precision, b.recall, b.f1) == (1.0, pytest.approx(2 / 3), pytest.approx(0.8))
    assert (c.precision, c.recall, c.f1, c.support) == (None, None, None, 0)
    assert ours.balanced_accuracy == pytest.approx(5 / 6)
    assert ours.macro_f1 == pytest.approx((2 / 3 + 0.8) / 2)
    assert ours.weighted_f1 == pytest.approx((2 / 3 + 3 * 0.8) / 4)
    assert ours.baseline_class == "b"
    assert ours.baseline.value == 0.75
    assert ours.log_loss == pytest.approx(-(math.log(0.7) + math.log(0.3) + 2 * math.log(0.5)) / 4)
    # Per photo: .09+.04+.01, .36+.49+.01, .01+.25+.16, .04+.25+.09
    assert ours.calibration.brier_score == pytest.approx((0.14 + 0.86 + 0.42 + 0.38) / 4)
    # Bins of width 1/15: 0.7 in (.667, .733] right, 0.6 in (.533, .6] wrong, two of 0.5 in (.467, .533] right.
    assert ours.calibration.expected_calibration_error == pytest.approx((0.3 + 0.6 + 2 * 0.5) / 4)


def test_a_class_absent_from_the_labels_but_predicted():
    ours = metrics.evaluate([[0.9, 0.1, 0.0], [0.1, 0.2, 0.7]], [0, 1], names(3))
    absent = ours.per_class[2]
    assert (absent.precision, absent.recall, absent.f1, absent.support, absent.predicted) == (0.0, None, 0.0, 0, 1)
    assert ours.balanced_accuracy == 0.5
    assert ours.macro_f1 == pytest.approx(1 / 3)


def test_a_single_photo():
    ours = metrics.evaluate(np.array([[0.2, 0.8]], np.float32), [1], names(2))
    assert (ours.accuracy.value, ours.accuracy.high, ours.photos) == (1.0, 1.0, 1)
    assert ours.accuracy.low == pytest.approx(0.2065, abs=1e-4)  # 1 / (1 + 1.96^2)
    assert ours.coverage[0].threshold == pytest.approx(0.8)
    json.dumps(ours.to_json(), allow_nan=False)


def test_no_photo_is_an_error():
    with pytest.raises(DataError, match="no labelled photos"):
        metrics.evaluate(np.zeros((0, 2)), [], names(2))


def test_a_broken_model_is_an_error():
    with pytest.raises(FinetuneError, match="not a number"):
        metrics.evaluate([[np.nan, 0.5]], [1], names(2))


@pytest.mark.parametrize(
    ("p", "y", "c"), [(np.ones((2, 2)), [0], 2), (np.ones((1, 2)), [2], 2), (np.ones((1, 2)), [0], 3)]
)
def test_shapes_that_do_not_fit_are_refused(p, y, c):
    with pytest.raises(ValueError, match="fit"):
        metrics.evaluate(p, y, names(c))


@pytest.mark.parametrize(
    ("right", "photos", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, photos, low, high):
    share = metrics.wilson(right, photos)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    other = metrics.wilson(photos - right, photos)
    assert other.low == pytest.approx(1 - share.high)


def test_wilson_stays_inside_zero_and_one():
    assert metrics.wilson(7, 7).high == 1.0
    # Of 5 folds, the interval of photos / 2.25, a size that need not be whole.
    folded, fewer = metrics.wilson(180, 225, 5), metrics.wilson(80, 100)
    assert (folded.low, folded.high) == pytest.approx((fewer.low, fewer.high))
    assert folded.value == 0.8
    assert metrics.wilson(0, 7).low == 0.0


def test_calibration_error_of_honest_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    p = np.stack([confidence, 1 - confidence], axis=1)
    honest = (rng.uniform(size=len(p)) > confidence).astype(int)
    assert calibration.calibration_scores(p, honest).expected_calibration_error < 0.01
    coin = rng.integers(0, 2, len(p))
    assert calibration.calibration_scores(p, coin).expected_calibration_error == pytest.approx(0.25, abs=0.01)


def test_calibration_error_against_a_plain_loop():
    p, y, _ = random_case(4, 500, 3)
    total = 0.0
    for i in range(15):
        inside = [k for k in range(len(y)) if i / 15 < p[k].max() <= (i + 1) / 15]
        if inside:
            gap = np.mean([p[k].argmax() == y[k] for k in inside]) - np.mean([p[k].max() for k in inside])
            total += len(inside) * abs(gap)
    assert calibration.calibration_scores(p, y).expected_calibration_error == pytest.approx(total / len(y))


def test_reliability_bins_hold_every_photo_once_with_certainty_in_the_last():
    scores = calibration.calibration_scores([[1.0, 0.0], [0.5, 0.5], [0.55, 0.45]], [0, 0, 1])
    assert len(scores.reliability) == 15
    assert sum(b.photos for b in scores.reliability) == 3
    last = scores.reliability[-1]
    assert (last.photos, last.confidence, last.accuracy) == (1, 1.0, 1.0)
    assert scores.reliability[0].accuracy is None


def test_log_loss_is_finite_for_a_certain_mistake():
    assert calibration.calibration_scores([[1.0, 0.0]], [1]).log_loss == pytest.approx(-math.log(1e-15))


def test_coverage_by_hand():
    confidence = [0.99, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55, 0.52, 0.51]
    right = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    rows = {row.target: row for row in metrics.coverage_table(confidence, right)}
    assert (rows[0.90].threshold, rows[0.90].coverage, rows[0.90].accepted) == (0.51, 1.0, 10)
    assert rows[0.90].precision.value == pytest.approx(0.9)
    assert (rows[0.95].threshold, rows[0.95].coverage) == (0.52, 0.9)
    assert rows[0.99].precision.value == 1.0


def test_coverage_does_not_split_equal_confidences():
    (row,) = metrics.coverage_table([0.9, 0.9, 0.9, 0.6], [True, True, False, True], targets=[0.9])
    assert (row.threshold, row.coverage, row.accepted, row.precision) == (None, 0.0, 0, None)


def test_coverage_thresholds_do_what_they_say():
    p, y, _ = random_case(5, 2000, 3, np.float32)
    confidence, right = p.max(axis=1).astype(float), p.argmax(axis=1) == y
    for row in metrics.coverage_table(confidence, right):
        assert row.threshold == round(row.threshold, 4)
        kept = confidence >= row.threshold
        assert kept.mean() == pytest.approx(row.coverage)
        assert right[kept].mean() == pytest.approx(row.precision.value)
        assert right[kept].mean() >= row.target
        lower = [t for t in np.unique(confidence) if t < row.threshold - 1e-4]
        assert all(right[confidence >= t].mean() < row.target for t in lower)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 1), (0, 6), (3, 10), (59, 6), (500, 560), (60_000, 61_000)])
def test_mcnemar_is_the_binomial_test(b, c):
    from scipy.stats import binomtest

    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert metrics.mcnemar(b, c) == pytest.approx(expected, rel=1e-8)
    assert metrics.mcnemar(c, b) == metrics.mcnemar(b, c)


def test_comparing_two_predictions():
    labels = np.array([0] * 10)
    first = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    second = np.array([0, 0, 0, 0, 0, 1, 0, 0, 0, 1])
    both = metrics.compare(labels, first, second)
    assert (both.both_right, both.only_first, both.only_second, both.both_wrong) == (5, 1, 3, 1)
    assert both.p_value == pytest.approx(2 * (1 + 4) / 16)
    assert both.difference.value == pytest.approx(0.2)
    # Cells 5.5, 1.5, 3.5, 1.5 of 12: 1/6 +- 1.96 sqrt((5/12 - 1/36) / 12)
    assert both.difference.low == pytest.approx(1 / 6 - 1.959964 * math.sqrt((5 / 12 - 1 / 36) / 12))
    assert metrics.compare(labels, first, first).p_value == 1.0
    json.dumps(both.to_json(), allow_nan=False)


def test_the_interval_of_a_difference_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    cells = [0.8, 0.05, 0.1, 0.05]  # both right, only first, only second, none: the true difference is 0.05
    hits = 0
    for _ in range(2000):
        cell = rng.choice(4, 150, p=cells)
        first, second = np.isin(cell, [0, 1]), np.isin(cell, [0, 2])
        share = metrics.compare(np.ones(150), first, second).difference
        hits += share.low <= 0.05 <= share.high
    assert 0.93 < hits / 2000 < 0.98


def nll(logits, labels, temperature):
    p = calibration.softmax(logits, temperature)
    return -np.log(p[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5, 6.0])
def test_the_temperature_that_made_the_labels_is_found(truth):
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (20_000, 4))
    p = calibration.softmax(logits, truth)
    labels = (p.cumsum(axis=1) > rng.uniform(size=(len(p), 1))).argmax(axis=1)
    found = calibration.fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda t: nll(logits, labels, t), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8}
    )
    assert found == pytest.approx(best.x, rel=1e-3)  # the prior counts as one photo of 20,000
    assert found == pytest.approx(truth, rel=0.05)


def test_the_temperature_minimises_what_is_documented():
    from scipy.optimize import minimize_scalar

    _, y, logits = random_case(6, 40, 3)
    best = minimize_scalar(
        lambda b: len(y) * nll(logits, y, 1 / b) + b - math.log(b),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert calibration.fit_temperature(logits, y) == pytest.approx(1 / best.x, rel=1e-6)


def test_a_weight_counts_like_copies_of_a_photo():
    _, y, logits = random_case(6, 40, 3)
    weights = np.arange(40) % 4
    copies = np.repeat(np.arange(40), weights)
    assert calibration.fit_temperature(logits, y, weights) == pytest.approx(
        calibration.fit_temperature(logits[copies], y[copies]), rel=1e-6
    )


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("photos", [1, 10, 100, 1000])
def test_the_temperature_of_separated_classes_claims_no_more_than_the_photos_show(photos, scale):
    labels = np.arange(photos) % 2
    logits = scale * np.stack([1.0 - labels, labels], axis=1)
    temperature = calibration.fit_temperature(logits, labels)
    assert 0.05 <= temperature <= 20
    confidence = calibration.softmax(logits, temperature).max(axis=1).mean()
    if scale == 1.0 and photos > 1:
        assert 1 - 4 / photos < confidence < 1 - 0.2 / photos
    if scale >= 30:  # certain and right already: nothing to mend
        assert 0.2 < temperature <= 20


def test_the_temperature_is_bounded_when_the_logits_say_the_opposite():
    logits = np.array([[5.0, 0.0]] * 500)
    assert calibration.fit_temperature(logits, np.ones(500, int)) == pytest.approx(20.0)


def test_no_label_changes_with_the_temperature():
    p, y, logits = random_case(7, 300, 5)
    fitted = calibration.softmax(logits, calibration.fit_temperature(logits, y))
    assert np.array_equal(fitted.argmax(axis=1), p.argmax(axis=1))


def test_cross_fitting_never_uses_a_photo_for_its_own_temperature():
    _, y, logits = random_case(8, 60, 3)
    groups = np.arange(60) // 2
    before = calibration.cross_fitted(logits, y, groups)
    changed = y.copy()
    changed[[10, 11]] = (changed[[10, 11]] + 1) % 3  # one group
    after = calibration.cross_fitted(logits, changed, groups, folds=30)
    reference = calibration.cross_fitted(logits, y, groups, folds=30)
    # 30 folds of one group each: only the changed group keeps its temperature, the others were fitted on it.
    same = np.isclose(after, reference, atol=1e-12).all(axis=1)
    assert same[[10, 11]].all()
    assert not same[np.delete(np.arange(60), [10, 11])].any()
    assert np.allclose(before.sum(axis=1), 1)


def test_cross_fitted_calibration_corrects_overconfidence():
    _, y, logits = random_case(9, 600, 4)
    before, after = calibration.cross_fitted_calibration(3 * logits, y)
    assert after.log_loss < before.log_loss
    assert after.expected_calibration_error < before.expected_calibration_error / 2


def test_cross_fitting_a_single_photo_leaves_it_alone():
    assert np.allclose(calibration.cross_fitted([[2.0, 0.0]], [0]), calibration.softmax([[2.0, 0.0]]))


def test_json_keys_are_stable():
    value = metrics.evaluate(*random_case(0, 50, 6)[:2], names(6)).to_json()
    assert list(value) == [
        "photos",
        "classes",
        "accuracy",
        "accuracy_interval",
        "without_near_duplicates",
        "top_k",
        "balanced_accuracy",
        "macro_f1",
        "weighted_f1",
        "baseline",
        "log_loss",
        "brier_score",
        "expected_calibration_error",
        "reliability",
        "per_class",
        "confusion_matrix",
        "coverage",
    ]
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_importing_metrics_brings_numpy_only():
    import subprocess

    code = "import sys, finetune_cli.metrics.scores; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"scipy", "tensorflow", "keras", "openvino", "pydantic", "cv2", "matplotlib", "PIL", "sklearn", "rich"}
    assert not heavy & set(done.stdout.split())


def test_blocks_change_no_bit(monkeypatch):
    _, y, logits = random_case(5, 200, 7)
    groups = np.arange(200) // 2

    def everything(z):
        p = calibration.softmax32(z, 1.3)
        return (
            calibration.fit_temperature(z, y),
            p.tobytes(),
            calibration.calibration_scores(p, y),
            calibration.cross_fitted_calibration(z, y, groups),
            calibration.cross_fitted(z, y, groups).tobytes(),
        )

    whole = everything(logits), everything(logits.astype(np.float32))
    assert whole[0][1] == calibration.softmax(logits, 1.3).astype(np.float32).tobytes()
    monkeypatch.setattr(calibration, "_BLOCK_NUMBERS", 7 * 13)  # 16 blocks, the last of 5 rows
    assert (everything(logits), everything(logits.astype(np.float32))) == whole


def test_all_rows_are_never_in_float64_at_once():
    import tracemalloc

    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(30_000, 500)).astype(np.float32), rng.integers(0, 500, 30_000)
    tracemalloc.start()
    temperature = calibration.fit_temperature(z, y)
    calibration.calibration_scores(z, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.05 <= temperature <= 20
    assert peak < 0.6 * 8 * z.size
