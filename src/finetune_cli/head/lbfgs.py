"""The softmax head, and its fit by L-BFGS: features (N, D) and labels (N,) go in, a `Head` comes out.

The objective, the same for both solvers:

    (1 / sum w) * sum_i w_i * CE(softmax(x_i W + b), y_i) + l2 * sum(W^2)

where y_i is one-hot, smoothed by `label_smoothing`; the bias is not penalised. No TensorFlow here.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import signals
from finetune_cli.errors import ConfigError
from finetune_cli.metrics.calibration import fit_temperature, softmax
from finetune_cli.metrics.folds import group_folds
from finetune_cli.parallel import cores, ordered_map

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Rows = NDArray[np.floating[Any]]
_Part = tuple[float, Rows, Floats]

FOLDS = 5
CV_ROWS = 4000  # `choose_l2` looks at no more rows than about this
CV_WORK = 2e11  # and does no more work than this, in rows x features x classes x fits
_CV_CLASSES = 50  # before it looks at fewer classes than this, it looks at fewer rows
_WEAKER, _STRONGER = 14, 8  # so many values of l2 at most, half a decade apart, on either side of the first
_BLOCK_ROWS = 4096
_BLOCK_NUMBERS = 1 << 22  # a block has no more logits than this: fewer rows of more than 1,024 classes
_ITERATIONS = 1000
_CORRECTIONS = 10  # SciPy's default: L-BFGS keeps so many pairs of vectors as long as the unknowns ...
_HISTORY_BYTES = 512_000_000  # ... and fewer pairs where they would take more than this
_GAIN = 0.005  # a weaker penalty must lower the log loss by this share; the curve is flat and strong is stable


@dataclass(frozen=True, eq=False)
class Head:
    """A linear softmax head: `kernel` float32 (D, C), `bias` float32 (C,)."""

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, features: Rows) -> NDArray[np.float32]:
        """Logits float32 (N, C) of features (N, D)."""
        return np.asarray(features @ self.kernel + self.bias, np.float32)


def class_weights(labels: Ints, spec: str | Mapping[str, float], classes: Sequence[str]) -> Floats:
    """A weight for each row of `labels` (N,): `spec` is 'none', 'balanced', or class name -> weight (others have 1).

    'balanced' gives every class that occurs the same sum: N / (classes that occur * rows of the class). Raises
    `ConfigError` for a name that is no class.
    """
    labels = np.asarray(labels)
    if isinstance(spec, Mapping):
        for name in spec:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, 1)
                raise ConfigError(
                    f"training.class_weights names {name!r}, which is no class",
                    f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(classes)}",
                )
        return np.array([spec.get(name, 1.0) for name in classes], np.float64)[labels]
    if spec == "balanced":
        counts = np.bincount(labels, minlength=len(classes))
        return len(labels) / (np.count_nonzero(counts) * counts[labels].astype(np.float64))
    return np.ones(len(labels))


def flatten_views(
    features: Rows, labels: Ints, weights: Floats, groups: Ints | None = None
) -> tuple[Rows, Ints, Floats, Ints]:
    """Features (photos, views, D) as rows (photos * views, D), with labels, weights and groups for each row.

    A row weighs its photo's weight divided by the views, so that a photo counts once however many views it has.
    Without `groups` every photo is a group of its own. A memory map stays one: nothing is copied but the small arrays.
    """
    photos, views, width = features.shape
    groups = np.arange(photos) if groups is None else np.asarray(groups)
    rows = features.reshape(photos * views, width)
    return rows, np.repeat(labels, views), np.repeat(weights, views) / views, np.repeat(groups, views)


def fit_lbfgs(
    features: Rows,
    labels: Ints,
    weights: Floats,
    n_classes: int,
    l2: float,
    label_smoothing: float = 0.0,
    start: Head | None = None,
    progress: Callable[[int], None] = lambda _n: None,
) -> Head:
    """The head that minimises the objective on features (N, D), labels (N,) and row weights (N,).

    Memory does not grow with N: `features` may be a memory map and is read in blocks. It grows with the unknowns, U =
    (D + 1) * C: about 20 arrays of U float64, of which the history of L-BFGS takes 512 MB at most (or three pairs),
    and for each core a few arrays of D * C and of 4 million float32. The answer is the same, bit for bit, for any
    number of threads. `start` only saves iterations, because the objective has one minimum (with l2 > 0). `progress`
    gets 1 after every iteration. Raises `Interrupted` within a block of rows after a signal.
    """
    with one_blas_thread():
        problem = _Problem(features, labels, weights, n_classes, label_smoothing)
        return problem.minimise(l2, start, progress, tolerance=1e-10)


def choose_l2(
    features: Rows,
    labels: Ints,
    weights: Floats,
    groups: Ints,
    n_classes: int,
    label_smoothing: float = 0.0,
    seed: int = 0,
    calibrated: bool = True,
    progress: Callable[[int], None] = lambda _n: None,
    note: Callable[[str], None] = lambda _text: None,
) -> tuple[float, list[tuple[float, float]]]:
    """The `l2` with the least log loss in 5-fold cross-validation, and all (l2, log loss) tried, weakest first.

    `calibrated` takes the log loss after the best temperature, for models that get one: then a strong penalty is not
    blamed for modest probabilities, which the temperature will correct. Rows of one group (N,) stay on one side. The
    values are half a decade apart; they go from strong to weak, each fit starting from the one before, until two in a
    row gain less than `_GAIN`, and then to stronger ones if the first was the best.

    Of large sets a part is taken: at most about `CV_ROWS` rows, whole groups and all classes evenly, and of many
    classes as many, drawn by `seed`, as keep the whole search below `CV_WORK`, however long it takes. The answer is
    scaled down in proportion, so that `l2` times the number of rows, the strength of the prior, is what was
    validated. `progress` gets 1 after every fit; `note` gets a line about what was left out. Raises `Interrupted`
    within a block of rows after a signal.
    """
    part, searched = _searched(labels, groups, features.shape[1], seed)
    x, y, w, g = features[part], labels[part], weights[part], groups[part]
    if searched is not None:
        y, n_classes = np.searchsorted(searched, y), len(searched)
    if not part.all():
        fewer = f" of {n_classes:,} of the {len(np.unique(labels)):,} classes" if searched is not None else ""
        note(f"l2 is chosen on {len(y):,} of {len(labels):,} views{fewer}, to bound the time of the search")
    first = _first_exponent(x, len(np.unique(g)))
    tried: dict[int, float] = {}
    best = first
    with one_blas_thread():
        validation = _CrossValidation(x, y, w, _validation_folds(y, g, seed), n_classes, label_smoothing)
        for exponents in (range(first, first - _WEAKER, -1), range(first + 1, first + 1 + _STRONGER)):
            for exponent in exponents if best == first else ():
                tried[exponent] = validation.log_loss(10.0 ** (exponent / 2), calibrated, progress)
                if tried[exponent] < tried[best] * (1 - _GAIN):
                    best = exponent
                elif abs(exponent - best) >= 2:
                    break
    pairs = {exponent: 10.0 ** (exponent / 2) * float(part.mean()) for exponent in sorted(tried)}
    return pairs[best], [(l2, tried[exponent]) for exponent, l2 in pairs.items()]


def _searched(
    labels: Ints, groups: Ints, width: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.integer[Any]] | None]:
    """The rows that `choose_l2` looks at, ``bool (N,)``, and their classes, ascending, if not all are among them.

    They depend on counts and `seed` alone, never on the clock. All are searched, with at most `CV_ROWS` rows, if

        rows * width * classes * (the most fits there can be) <= CV_WORK,

    and otherwise as many as can be with all their rows, because the best l2 depends on how many photos a class has
    more than on how many classes there are.
    """
    work = CV_WORK / (FOLDS * (_WEAKER + _STRONGER) * width)  # rows * classes of one fit
    present = np.unique(labels)
    count, rows_each, searched = len(present), len(labels) / len(present), None
    if count > _CV_CLASSES and min(CV_ROWS, len(labels)) * count > work:
        count = max(_CV_CLASSES, int(min(math.sqrt(work / rows_each), CV_ROWS / rows_each)))
        searched = np.sort(np.random.default_rng(seed).permutation(present)[:count])
    part = np.flatnonzero(np.isin(labels, searched)) if searched is not None else np.arange(len(labels))
    rows = min(CV_ROWS, max(1.0, work / count))
    chosen = group_folds(labels[part], groups[part], math.ceil(len(part) / rows), seed) == 0
    mask = np.zeros(len(labels), np.bool_)
    mask[part[chosen]] = True
    return mask, searched


def _first_exponent(features: Rows, groups: int) -> int:
    """The first l2 to try, as k in 10^(k/2).

    Seen as a Gaussian prior on W, `l2` lets the logits of n photos have a variance of V / (2 n l2), where V is the
    features' total variance. It begins where their standard deviation is 1, near or above the best l2 on hymenoptera
    and scenes with 1 to 16 views; the rule makes the search fit backbones whose features are larger or smaller.
    """
    sample = np.asarray(features[:: max(1, len(features) // 1000)], np.float64)
    return round(2 * math.log10(max(float(sample.var(axis=0).sum()), 1e-12) / (2 * groups)))


def _validation_folds(labels: Ints, groups: Ints, seed: int) -> NDArray[np.intp]:
    """The fold of each row, -1 for the only group of a class: without it nothing could be learnt about the class."""
    fold = group_folds(labels, groups, FOLDS, seed)
    for label in np.unique(labels):
        own = labels == label
        if len(np.unique(groups[own])) == 1:
            fold[own] = -1
    return fold


class _CrossValidation:
    """The folds' fits, each of which starts from its last."""

    def __init__(
        self, features: Rows, labels: Ints, weights: Floats, fold: NDArray[np.intp], n_classes: int, smoothing: float
    ) -> None:
        self.held_out = [fold == k for k in np.unique(fold[fold >= 0])]
        self.features, self.labels, self.weights = features, labels, weights
        self.problems = [
            _Problem(features, labels, np.where(rows, 0, weights), n_classes, smoothing) for rows in self.held_out
        ]
        self.heads: list[Head | None] = [None] * len(self.problems)

    def log_loss(self, l2: float, calibrated: bool, progress: Callable[[int], None]) -> float:
        """The weighted mean log loss of the held-out rows; 0 if there are none. The folds are fitted side by side."""
        rows = np.concatenate([np.flatnonzero(rows) for rows in self.held_out] or [np.zeros(0, np.intp)])
        if not len(rows):
            return 0.0

        def fit(k: int) -> Head:
            return self.problems[k].minimise(l2, self.heads[k], lambda _n: None, tolerance=1e-5)

        logits = []
        for k, head in enumerate(ordered_map(fit, range(len(self.problems)), cores())):
            self.heads[k] = head
            logits.append(head.logits(self.features[self.held_out[k]]))
            progress(1)
        z, y, w = np.concatenate(logits), self.labels[rows], self.weights[rows]
        p = softmax(z, fit_temperature(z, y, w) if calibrated else 1.0)
        return float(w @ -np.log(np.maximum(p[np.arange(len(y)), y], 1e-15)) / w.sum())


class _Problem:
    """The objective over fixed rows, and its minimum for a given `l2`.

    Inside, the bias is that of centred features (c = b + mean(x) W): the objective is the same, and L-BFGS needs a
    half to a third of the iterations, because W and the bias no longer pull at each other.
    """

    def __init__(self, features: Rows, labels: Ints, weights: Floats, n_classes: int, smoothing: float) -> None:
        self.features, self.labels = features, np.asarray(labels)
        self.weights = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
        self.n_classes, self.smoothing = n_classes, smoothing
        exact = features.dtype == np.float64
        self.dtype: np.dtype[np.floating[Any]] = np.dtype(np.float64 if exact else np.float32)
        step = min(_BLOCK_ROWS, max(1, _BLOCK_NUMBERS // n_classes))
        self.blocks = [slice(i, i + step) for i in range(0, len(features), step)]
        self.mean = np.zeros(features.shape[1])
        for block in self.blocks:
            self.mean += self.weights[block].astype(self.dtype) @ self._rows(block)

    def minimise(self, l2: float, start: Head | None, progress: Callable[[int], None], tolerance: float) -> Head:
        """The minimum, taken as found when an iteration gains less than `tolerance`."""
        from scipy.optimize import minimize

        width = len(self.mean)
        unknowns = np.zeros((width + 1, self.n_classes))
        if start is not None:
            unknowns[:-1] = start.kernel
            unknowns[-1] = start.bias + self.mean @ unknowns[:-1]
        limits: Any = {
            "maxiter": _ITERATIONS,
            "maxfun": 2 * _ITERATIONS,
            "gtol": 1e-7,
            "ftol": tolerance,
            "maxcor": max(3, min(_CORRECTIONS, _HISTORY_BYTES // (2 * unknowns.nbytes))),
        }
        found = minimize(  # type: ignore[call-overload]  # the stubs want a one-dimensional gradient by its type
            lambda flat: self._loss_and_gradient(flat, l2),
            unknowns.ravel(),
            jac=True,
            method="L-BFGS-B",
            callback=lambda _x: progress(1),
            options=limits,
        )
        unknowns = found.x.reshape(width + 1, self.n_classes)
        kernel = unknowns[:-1].astype(np.float32)
        return Head(kernel, (unknowns[-1] - self.mean @ kernel).astype(np.float32))

    def _loss_and_gradient(self, flat: Floats, l2: float) -> tuple[float, Floats]:
        unknowns = flat.reshape(-1, self.n_classes)
        kernel, bias = unknowns[:-1], unknowns[-1] - self.mean @ unknowns[:-1]
        rounded = kernel.astype(self.dtype), bias.astype(self.dtype)
        loss, gradient = l2 * float((kernel**2).sum()), np.zeros_like(unknowns)
        # The blocks are always the same and are added in order: the number of threads changes no bit.
        for part, kernel_part, bias_part in self._map(lambda block: self._block(block, *rounded)):
            loss += part
            gradient[:-1] += kernel_part
            gradient[-1] += bias_part
        gradient[:-1] += 2 * l2 * kernel - np.outer(self.mean, gradient[-1])
        return loss, gradient.ravel()

    def _block(self, block: slice, kernel: Rows, bias: Rows) -> _Part:
        """A block's part of the loss and of its derivatives by W and b."""
        signals.check()  # here, because folds and blocks are computed in threads, which no signal reaches
        rows, labels, weights = self._rows(block), self.labels[block], self.weights[block]
        z = rows @ kernel
        z += bias
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        own = np.arange(len(labels)), labels
        target = np.full_like(z, self.smoothing / self.n_classes)
        target[own] += 1 - self.smoothing
        # CE = ln sum exp(z) - sum(target z), because the targets sum to 1.
        entropy = np.log(total[:, 0], dtype=np.float64) - (target * z).sum(axis=1, dtype=np.float64)
        slope = (p - target) * weights.astype(self.dtype)[:, None]
        return float(weights @ entropy), rows.T @ slope, slope.sum(axis=0, dtype=np.float64)

    def _map(self, function: Callable[[slice], _Part]) -> Iterable[_Part]:
        return ordered_map(function, self.blocks, cores()) if len(self.blocks) > 1 else map(function, self.blocks)

    def _rows(self, block: slice) -> Rows:
        return np.asarray(self.features[block], self.dtype)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread; the blocks and folds bring the parallelism.

    OpenBLAS splits each of the many small products over its own threads and waits for them: 10 to 25 times slower as
    soon as another process wants a core (measured), and the bits depend on the number of threads.
    """
    import scipy.optimize  # noqa: F401  (before the limit, which holds for the libraries loaded by then)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, user_api="blas"):
        yield
