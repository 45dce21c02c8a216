"""The L-BFGS head against finite differences, against scikit-learn, and against its own promises."""

import subprocess
import sys

import numpy as np
import pytest
from paths import SOURCE

from finetune_cli import signals
from finetune_cli.errors import ConfigError, Interrupted
from finetune_cli.head import lbfgs
from finetune_cli.head.lbfgs import Head, choose_l2, class_weights, fit_lbfgs, flatten_views


def blobs(seed=0, photos=200, width=30, classes=3, spread=0.5, dtype=np.float32):
    """Overlapping clouds off the origin, as pooled activations are: features, labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(photos) % classes
    centres = rng.normal(0, spread, (classes, width))
    return (2 + centres[labels] + rng.normal(0, 1, (photos, width))).astype(dtype), labels


def objective(head, features, labels, weights, l2, smoothing=0.0):
    """The documented objective, written out photo by photo."""
    total, classes = 0.0, len(head.bias)
    for x, y, w in zip(features.astype(float), labels, weights, strict=True):
        z = x @ head.kernel.astype(float) + head.bias
        target = (np.arange(classes) == y) * (1 - smoothing) + smoothing / classes
        total += w * (np.log(np.exp(z).sum()) - target @ z)
    return total / weights.sum() + l2 * (head.kernel.astype(float) ** 2).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [50, 7])  # one block, and several
def test_the_gradient_agrees_with_finite_differences(monkeypatch, smoothing, rows):
    monkeypatch.setattr(lbfgs, "_BLOCK_ROWS", rows)
    x, y = blobs(photos=50, width=6, dtype=np.float64)
    weights = np.random.default_rng(1).uniform(0.2, 3, 50)
    problem = lbfgs._Problem(x, y, weights, 3, smoothing)
    point = np.random.default_rng(2).normal(0, 0.3, 7 * 3)
    loss, gradient = problem._loss_and_gradient(point, 0.05)
    for i in range(len(point)):
        step = np.eye(len(point))[i] * 1e-6
        above, below = (problem._loss_and_gradient(point + s, 0.05)[0] for s in (step, -step))
        assert gradient[i] == pytest.approx((above - below) / 2e-6, abs=1e-8)
    # Seen from outside, the bias is that of the features as they are.
    kernel = point.reshape(7, 3)[:-1]
    head = Head(kernel, point.reshape(7, 3)[-1] - weights @ x / weights.sum() @ kernel)
    assert loss == pytest.approx(objective(head, x, y, weights, 0.05, smoothing), rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_small_step_improves_the_fitted_head(smoothing):
    x, y = blobs()
    weights = np.random.default_rng(1).uniform(0.2, 3, len(y))
    head = fit_lbfgs(x, y, weights, 3, 1e-3, smoothing)
    best = objective(head, x, y, weights, 1e-3, smoothing)
    rng = np.random.default_rng(3)
    for _ in range(20):
        step = rng.normal(0, 1e-2, head.kernel.shape), rng.normal(0, 1e-2, 3)
        assert objective(Head(head.kernel + step[0], head.bias + step[1]), x, y, weights, 1e-3, smoothing) > best


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_head_is_that_of_scikit_learn(classes, l2):
    from sklearn.linear_model import LogisticRegression

    x, y = blobs(classes=classes)
    weights = np.random.default_rng(1).uniform(0.2, 3, len(y))
    ours = fit_lbfgs(x, y, weights, classes, l2)
    # scikit-learn minimises C * sum w CE + |W|^2 / 2; with two classes it has one column, W = w1 - w0 = 2 w1.
    factor = 2.0 if classes == 2 else 1.0
    theirs = LogisticRegression(C=factor / (2 * l2 * weights.sum()), tol=1e-10, max_iter=10_000)
    theirs.fit(x.astype(np.float64), y, sample_weight=weights)
    z = ours.logits(x).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert np.abs(p - theirs.predict_proba(x.astype(np.float64))).max() < 1e-3  # float32


def test_the_start_changes_the_way_and_not_the_end():
    x, y = blobs()
    ones, steps = np.ones(len(y)), []
    rng = np.random.default_rng(0)
    cold = fit_lbfgs(x, y, ones, 3, 1e-2)
    wild = Head(rng.normal(0, 1, (30, 3)).astype(np.float32), np.array([5, 0, -5], np.float32))
    assert np.abs(fit_lbfgs(x, y, ones, 3, 1e-2, start=wild).kernel - cold.kernel).max() < 1e-3
    fit_lbfgs(x, y, ones, 3, 1e-2, start=cold, progress=steps.append)
    assert len(steps) <= 3


def test_a_weight_counts_like_copies():
    x, y = blobs(photos=60)
    weights = np.random.default_rng(1).integers(1, 4, 60).astype(float)
    copies = np.repeat(np.arange(60), weights.astype(int))
    one = fit_lbfgs(x, y, weights, 3, 1e-2)
    other = fit_lbfgs(x[copies], y[copies], np.ones(len(copies)), 3, 1e-2)
    assert np.abs(one.kernel - other.kernel).max() < 1e-3


def test_a_photo_counts_once_however_many_views_it_has():
    x, y = blobs(photos=60)
    once = fit_lbfgs(x, y, np.ones(60), 3, 1e-2)
    rows, labels, weights, groups = flatten_views(np.repeat(x[:, None], 4, axis=1), y, np.ones(60))
    assert rows.shape == (240, 30)
    assert weights.sum() == 60
    assert groups.tolist() == [i for i in range(60) for _ in range(4)]
    four = fit_lbfgs(rows, labels, weights, 3, 1e-2)
    assert np.abs(once.kernel - four.kernel).max() < 1e-3


def test_a_memory_map_is_read_in_blocks_with_the_same_result(tmp_path, monkeypatch):
    x, y = blobs(photos=300)
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100, 3, 30))
    stored[:] = x.reshape(100, 3, 30)
    rows, labels, weights, _ = flatten_views(stored, y[::3], np.ones(100))
    assert isinstance(rows, np.memmap)
    whole = fit_lbfgs(np.array(rows), labels, weights, 3, 1e-2)
    monkeypatch.setattr(lbfgs, "_BLOCK_ROWS", 64)
    blocks = fit_lbfgs(rows, labels, weights, 3, 1e-2)
    assert np.abs(whole.kernel - blocks.kernel).max() < 1e-3


def test_separable_classes_without_penalty_end_finite():
    x, y = blobs(spread=20, classes=2)
    head = fit_lbfgs(x, y, np.ones(len(y)), 2, 0.0)
    assert np.isfinite(head.kernel).all()
    assert (head.logits(x).argmax(axis=1) == y).all()


THREADS = """
import hashlib, numpy as np
from finetune_cli.head import lbfgs
lbfgs._BLOCK_ROWS = 500
rng = np.random.default_rng(0)
x = rng.normal(size=(2000, 400)).astype(np.float32); y = rng.integers(0, 5, 2000)
head = lbfgs.fit_lbfgs(x, y, np.ones(2000), 5, 1e-3)
l2, tried = lbfgs.choose_l2(x, y, np.ones(2000), np.arange(2000), 5)
print(hashlib.sha256(head.kernel.tobytes() + head.bias.tobytes() + repr(tried).encode()).hexdigest())
"""


def test_the_bits_do_not_depend_on_the_number_of_threads():
    import os

    seen = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        environment["PYTHONPATH"] = str(SOURCE)
        done = subprocess.run(
            [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1


def test_the_solver_needs_no_tensorflow():
    code = "import sys; from finetune_cli.head import lbfgs; print({'tensorflow', 'keras', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def cross_validated(x, y, l2, seed=0):
    """Log loss by scikit-learn in 5 other folds: where the minimum lies must not depend on the folds much."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LogisticRegression(C=1 / (2 * l2 * len(y) * 0.8), max_iter=10_000)
    p = cross_val_predict(model, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=seed), method="predict_proba")
    return -np.log(p[np.arange(len(y)), y]).mean()


@pytest.mark.parametrize("spread", [0.15, 0.6])
def test_choose_l2_finds_what_scikit_learn_finds(spread):
    x, y = blobs(photos=240, width=40, spread=spread)
    l2, tried = choose_l2(x, y, np.ones(240), np.arange(240), 3, calibrated=False)
    losses = dict(tried)
    assert losses[l2] < 1.005 * min(losses.values())
    with lbfgs.one_blas_thread():
        theirs = {value: np.mean([cross_validated(x, y, value, seed) for seed in range(3)]) for value in losses}
    assert theirs[l2] < min(theirs.values()) + 0.02
    assert losses[l2] == pytest.approx(theirs[l2], abs=0.04)


def test_with_a_temperature_to_come_a_stronger_penalty_is_not_blamed_for_modesty():
    x, y = blobs(photos=240, width=40, spread=0.4)
    plain, raw = choose_l2(x, y, np.ones(240), np.arange(240), 3, calibrated=False)
    strong, mended = choose_l2(x, y, np.ones(240), np.arange(240), 3, calibrated=True)
    assert strong >= plain
    both = set(dict(raw)) & set(dict(mended))
    assert len(both) >= 3
    assert all(dict(mended)[l2] < dict(raw)[l2] + 1e-3 for l2 in both)


def test_choose_l2_does_not_depend_on_the_unit_of_the_features():
    x, y = blobs(photos=150)
    l2, tried = choose_l2(x, y, np.ones(150), np.arange(150), 3)
    larger, also = choose_l2(100 * x, y, np.ones(150), np.arange(150), 3)
    assert 0.3 < larger / (l2 * 1e4) < 3.3  # one step at most: the curve is flat
    before, after = ({round(2 * np.log10(value)): loss for value, loss in pairs} for pairs in (tried, also))
    common = [k for k in before if k + 8 in after]
    assert len(common) >= 3
    assert all(after[k + 8] == pytest.approx(before[k], abs=0.01) for k in common)
    assert lbfgs._first_exponent(100 * x, 150) == lbfgs._first_exponent(x, 150) + 8


def test_choose_l2_keeps_the_views_of_a_photo_together():
    # Pure noise, four copies of each photo: only who sees copies on both sides believes that it can be learnt.
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(60, 200)), 4, axis=0).astype(np.float32), np.repeat(np.arange(60) % 2, 4)
    together, honest = choose_l2(x, y, np.ones(240), np.repeat(np.arange(60), 4), 2)
    apart, fooled = choose_l2(x, y, np.ones(240), np.arange(240), 2)
    assert min(loss for _, loss in honest) > 0.68
    assert min(loss for _, loss in fooled) < 0.4
    assert together > 30 * apart


def test_choose_l2_goes_to_stronger_values_when_the_first_is_best():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100, 300)).astype(np.float32), np.arange(100) % 2
    l2, tried = choose_l2(x, y, np.ones(100), np.arange(100), 2)
    assert l2 >= 10.0 ** (lbfgs._first_exponent(x, 100) / 2)
    assert [value for value, _ in tried] == sorted(value for value, _ in tried)


def test_choose_l2_gives_the_same_twice_and_ignores_numpys_global_state():
    x, y = blobs(photos=90)
    np.random.seed(1)  # noqa: NPY002
    first = choose_l2(x, y, np.ones(90), np.arange(90), 3, seed=4)
    np.random.seed(2)  # noqa: NPY002
    assert choose_l2(x, y, np.ones(90), np.arange(90), 3, seed=4) == first


def test_choose_l2_looks_at_a_part_of_many_rows_and_scales_the_answer(monkeypatch):
    x, y = blobs(photos=1200, width=20)
    whole, _ = choose_l2(x, y, np.ones(1200), np.arange(1200), 3)
    monkeypatch.setattr(lbfgs, "CV_ROWS", 300)
    part, tried = choose_l2(x, y, np.ones(1200), np.arange(1200), 3)
    assert whole / 4 < part < whole * 4
    assert {round(np.log10(4 * value) * 2, 6) % 1 for value, _ in tried} <= {0.0}


def test_choose_l2_with_too_few_photos_to_hold_any_out():
    x, y = blobs(photos=2, classes=2)
    l2, tried = choose_l2(x, y, np.ones(2), np.arange(2), 2)
    assert l2 > 0
    assert np.isfinite(fit_lbfgs(x, y, np.ones(2), 2, l2).kernel).all()
    assert all(loss == 0 for _, loss in tried)


def test_choose_l2_with_a_class_of_one_photo():
    x, y = blobs(photos=61, classes=2)
    y = np.where(np.arange(61) == 60, 2, y)
    _, tried = choose_l2(x, y, np.ones(61), np.arange(61), 3)
    assert all(np.isfinite(loss) and loss < 3 for _, loss in tried)


def test_class_weights():
    labels, names = np.array([0, 0, 0, 1]), ["ants", "bees", "wasps"]
    assert class_weights(labels, "none", names).tolist() == [1, 1, 1, 1]
    balanced = class_weights(labels, "balanced", names)
    from sklearn.utils.class_weight import compute_sample_weight

    assert balanced == pytest.approx(compute_sample_weight("balanced", labels))
    assert class_weights(labels, {"bees": 3.0}, names).tolist() == [1, 1, 1, 3]
    with pytest.raises(ConfigError, match="'bes'") as caught:
        class_weights(labels, {"bes": 3.0}, names)
    assert "'bees'" in caught.value.remedy


def test_balanced_weights_move_the_border_towards_the_large_class():
    rng = np.random.default_rng(0)
    y = np.array([0] * 180 + [1] * 20)
    x = (rng.normal(size=(200, 5)) + y[:, None] * 0.7).astype(np.float32)
    plain = fit_lbfgs(x, y, class_weights(y, "none", ["a", "b"]), 2, 1e-2)
    even = fit_lbfgs(x, y, class_weights(y, "balanced", ["a", "b"]), 2, 1e-2)
    assert (even.logits(x).argmax(axis=1) == 1).sum() > 2 * (plain.logits(x).argmax(axis=1) == 1).sum()


def many_classes(classes=60, each=8, width=40):
    x, y = blobs(photos=classes * each, width=width, classes=classes, spread=0.6)
    return x, y, np.ones(len(y)), np.arange(len(y)), classes


def test_choose_l2_takes_fewer_of_many_classes_and_says_so(monkeypatch):
    problem = many_classes()
    notes, fits = [], []
    whole, _ = choose_l2(*problem, note=notes.append)
    assert notes == []
    monkeypatch.setattr(lbfgs, "_CV_CLASSES", 10)
    monkeypatch.setattr(lbfgs, "CV_WORK", 160 * 20 * 40 * lbfgs.FOLDS * (lbfgs._WEAKER + lbfgs._STRONGER))
    part, tried = choose_l2(*problem, note=notes.append, progress=fits.append)
    assert notes == ["l2 is chosen on 160 of 480 views of 20 of the 60 classes, to bound the time of the search"]
    assert len(fits) == lbfgs.FOLDS * len(tried)
    assert 160 * 20 * 40 * len(fits) <= lbfgs.CV_WORK
    assert whole / 4 < part < whole * 4
    assert choose_l2(*problem) == (part, tried)  # whatever the time of day


@pytest.mark.parametrize(("rows", "classes", "width"), [(4000, 200, 2048), (30_000, 200, 2048), (3_000, 470, 1280)])
def test_ordinary_sets_are_searched_with_all_their_classes(rows, classes, width):
    labels = np.arange(rows) % classes
    mask, searched = lbfgs._searched(labels, np.arange(rows), width, 0)
    assert searched is None
    assert mask.sum() == pytest.approx(min(rows, lbfgs.CV_ROWS), rel=0.1)


@pytest.mark.parametrize("photos", [2, 20, 1000])
@pytest.mark.parametrize("width", [1280, 100_000])
@pytest.mark.parametrize("views", [1, 4])
def test_the_work_of_the_search_is_bounded(photos, width, views):
    labels = np.repeat(np.arange(1000), photos * views)
    mask, searched = lbfgs._searched(labels, np.arange(len(labels)) // views, width, 0)
    fits = lbfgs.FOLDS * (lbfgs._WEAKER + lbfgs._STRONGER)
    assert searched is not None
    assert len(searched) >= lbfgs._CV_CLASSES
    assert set(labels[mask]) <= set(searched.tolist())
    assert mask.sum() * width * len(searched) * fits <= 1.2 * lbfgs.CV_WORK  # whole groups are not cut
    assert mask.sum() <= 1.2 * lbfgs.CV_ROWS


@pytest.mark.parametrize("fit", [lambda *a: fit_lbfgs(*a[:3], a[4], 1e-3), choose_l2], ids=["fit", "search"])
def test_a_signal_is_answered_inside_a_fit(monkeypatch, fit):
    problem = many_classes()
    plain, evaluations = lbfgs._Problem._block, []

    def counted(self, *arguments):
        evaluations.append(1)
        if len(evaluations) == 4:
            signals._received.append(15)
        return plain(self, *arguments)

    monkeypatch.setattr(lbfgs._Problem, "_block", counted)
    monkeypatch.setattr(signals, "_received", [])
    with pytest.raises(Interrupted):
        fit(*problem)
    assert len(evaluations) <= 4 + 2 * lbfgs.cores()  # a fit takes more than a dozen


def test_blocks_of_many_classes_have_fewer_rows():
    x, y = np.zeros((9000, 2), np.float32), np.arange(9000) % 5000
    few = lbfgs._Problem(x, y, np.ones(9000), 1024, 0.0)
    many = lbfgs._Problem(x, y, np.ones(9000), 5000, 0.0)
    assert {b.stop - b.start for b in few.blocks} == {4096}
    assert {(b.stop - b.start) * 5000 <= lbfgs._BLOCK_NUMBERS for b in many.blocks} == {True}
    assert [b.start for b in many.blocks[1:]] == [b.stop for b in many.blocks[:-1]]


def test_a_shorter_history_of_lbfgs_finds_the_same_head(monkeypatch):
    x, y = blobs()
    whole = fit_lbfgs(x, y, np.ones(len(y)), 3, 1e-2)
    monkeypatch.setattr(lbfgs, "_HISTORY_BYTES", 1)
    short = fit_lbfgs(x, y, np.ones(len(y)), 3, 1e-2)
    assert np.abs(whole.kernel - short.kernel).max() < 1e-3
    assert (whole.kernel != short.kernel).any()
