"""The L-BFGS head against finite differences, against scikit-learn, and against its own promises."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from head_examples import blobs, many_classes
from paths import SOURCE

from finetune_cli import signals
from finetune_cli.errors import ConfigError, Interrupted
from finetune_cli.head import lbfgs
from finetune_cli.head.data import HeadData, class_weights
from finetune_cli.head.l2 import choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs


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
    problem = lbfgs.Problem(HeadData.of(x, y, 3, weights), smoothing)
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
    head = fit_lbfgs(HeadData.of(x, y, 3, weights), 1e-3, smoothing)
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
    ours = fit_lbfgs(HeadData.of(x, y, classes, weights), l2)
    # scikit-learn minimises C * sum w CE + |W|^2 / 2; with two classes it has one column, W = w1 - w0 = 2 w1.
    factor = 2.0 if classes == 2 else 1.0
    theirs = LogisticRegression(C=factor / (2 * l2 * weights.sum()), tol=1e-10, max_iter=10_000)
    theirs.fit(x.astype(np.float64), y, sample_weight=weights)
    z = ours.logits(x).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert np.abs(p - theirs.predict_proba(x.astype(np.float64))).max() < 1e-3  # float32


def test_the_start_changes_the_way_and_not_the_end():
    x, y = blobs()
    steps = []
    rng = np.random.default_rng(0)
    cold = fit_lbfgs(HeadData.of(x, y, 3), 1e-2)
    wild = Head(rng.normal(0, 1, (30, 3)).astype(np.float32), np.array([5, 0, -5], np.float32))
    assert np.abs(fit_lbfgs(HeadData.of(x, y, 3), 1e-2, start=wild).kernel - cold.kernel).max() < 1e-3
    fit_lbfgs(HeadData.of(x, y, 3), 1e-2, start=cold, progress=steps.append)
    assert len(steps) <= 3


def test_a_weight_counts_like_copies():
    x, y = blobs(photos=60)
    weights = np.random.default_rng(1).integers(1, 4, 60).astype(float)
    copies = np.repeat(np.arange(60), weights.astype(int))
    one = fit_lbfgs(HeadData.of(x, y, 3, weights), 1e-2)
    other = fit_lbfgs(HeadData.of(x[copies], y[copies], 3), 1e-2)
    assert np.abs(one.kernel - other.kernel).max() < 1e-3


def test_a_photo_counts_once_however_many_views_it_has():
    x, y = blobs(photos=60)
    once = fit_lbfgs(HeadData.of(x, y, 3), 1e-2)
    rows = HeadData.of(np.repeat(x[:, None], 4, axis=1), y, 3).rows()
    assert rows.features.shape == (240, 30)
    assert rows.weights.sum() == 60
    assert rows.groups.tolist() == [i for i in range(60) for _ in range(4)]
    four = fit_lbfgs(rows, 1e-2)
    assert np.abs(once.kernel - four.kernel).max() < 1e-3


def test_a_memory_map_is_read_in_blocks_with_the_same_result(tmp_path, monkeypatch):
    x, y = blobs(photos=300)
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100, 3, 30))
    stored[:] = x.reshape(100, 3, 30)
    rows = HeadData.of(stored, y[::3], 3).rows()
    assert isinstance(rows.features, np.memmap)
    in_memory = replace(rows, features=np.array(rows.features))
    whole = fit_lbfgs(in_memory, 1e-2)
    monkeypatch.setattr(lbfgs, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(lbfgs, "_SERIAL_ROWS", 0)  # ten blocks, in threads
    blocks, also = fit_lbfgs(rows, 1e-2), fit_lbfgs(in_memory, 1e-2)
    assert blocks.kernel.tobytes() + blocks.bias.tobytes() == also.kernel.tobytes() + also.bias.tobytes()
    assert np.abs(whole.kernel - blocks.kernel).max() < 1e-3
    assert choose_l2(rows) == choose_l2(in_memory)


def test_separable_classes_without_penalty_end_finite():
    x, y = blobs(spread=20, classes=2)
    head = fit_lbfgs(HeadData.of(x, y, 2), 0.0)
    assert np.isfinite(head.kernel).all()
    assert (head.logits(x).argmax(axis=1) == y).all()


THREADS = """
import hashlib, os, numpy as np
from finetune_cli.head import lbfgs
from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import choose_l2
lbfgs._BLOCK_ROWS, lbfgs._SERIAL_ROWS = 200, 0
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
rng = np.random.default_rng(0)
x = rng.normal(size=(2000, 400)).astype(np.float32); y = rng.integers(0, 5, 2000)
head = lbfgs.fit_lbfgs(HeadData.of(x, y, 5), 1e-3)
l2, tried = choose_l2(HeadData.of(x, y, 5))
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
    plain = fit_lbfgs(HeadData.of(x, y, 2, class_weights(y, "none", ["a", "b"])), 1e-2)
    even = fit_lbfgs(HeadData.of(x, y, 2, class_weights(y, "balanced", ["a", "b"])), 1e-2)
    assert (even.logits(x).argmax(axis=1) == 1).sum() > 2 * (plain.logits(x).argmax(axis=1) == 1).sum()


@pytest.mark.parametrize("fit", [lambda data: fit_lbfgs(data, 1e-3), choose_l2], ids=["fit", "search"])
def test_a_signal_is_answered_inside_a_fit(monkeypatch, fit):
    problem = many_classes()
    plain, evaluations = lbfgs.Problem._block, []

    def counted(self, *arguments):
        evaluations.append(1)
        if len(evaluations) == 4:
            signals._received.append(15)
        return plain(self, *arguments)

    monkeypatch.setattr(lbfgs.Problem, "_block", counted)
    monkeypatch.setattr(signals, "_received", [])
    with pytest.raises(Interrupted):
        fit(problem)
    assert len(evaluations) <= 4 + 2 * lbfgs.cores()  # a fit takes more than a dozen


def test_a_search_ends_where_rounding_hides_further_gains():
    # One that asks for more takes noise for progress: most of its evaluations are those of vain line searches.
    x, y = blobs(photos=3000, width=60)
    problem = lbfgs.Problem(HeadData.of(x, y, 3), 0.0)
    evaluations = []
    plain = problem._loss_and_gradient
    problem._loss_and_gradient = lambda *arguments: evaluations.append(1) or plain(*arguments)
    steps = []
    head = problem.minimise(1e-4, None, steps.append, problem.resolution)
    assert len(evaluations) <= 1.3 * len(steps) + 2
    exact = fit_lbfgs(HeadData.of(x.astype(np.float64), y, 3), 1e-4)
    reached, least = (objective(each, x, y, np.ones(3000), 1e-4) for each in (head, exact))
    assert reached - least < 1e-6


@pytest.mark.parametrize(
    ("rows", "classes", "threads"), [(4000, 10, False), (1000, 5000, False), (5000, 2, True), (3000, 100, True)]
)
def test_large_problems_are_computed_in_threads(monkeypatch, rows, classes, threads):
    used = []
    monkeypatch.setattr(lbfgs, "ordered_map", lambda function, blocks, _cores: used.append(1) or map(function, blocks))
    problem = lbfgs.Problem(HeadData.of(np.zeros((rows, 2), np.float32), np.arange(rows) % classes, classes), 0.0)
    problem._loss_and_gradient(np.zeros(3 * classes), 0.1)
    assert bool(used) == threads


def test_a_shorter_history_of_lbfgs_finds_the_same_head(monkeypatch):
    x, y = blobs()
    whole = fit_lbfgs(HeadData.of(x, y, 3), 1e-2)
    monkeypatch.setattr(lbfgs, "_HISTORY_BYTES", 1)
    short = fit_lbfgs(HeadData.of(x, y, 3), 1e-2)
    assert np.abs(whole.kernel - short.kernel).max() < 1e-3
    assert (whole.kernel != short.kernel).any()
