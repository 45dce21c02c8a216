"""The softmax head, and its fit by L-BFGS: features (N, D) and labels (N,) go in, a `Head` comes out.

The objective, the same for all solvers:

    (1 / sum w) * sum_i w_i * CE(softmax(x_i W + b), y_i) + l2 * sum(W^2)

where y_i is one-hot, smoothed by `label_smoothing`; the bias is not penalised. No TensorFlow here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import signals
from finetune_cli.head.data import Floats, HeadData, Rows
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.progress import Advance, ignore_progress

_Part = tuple[float, Rows, Floats]

_BLOCK_ROWS = 1024  # so few that most of what the forward pass has read is still in a core's cache on the way back
_SERIAL_ROWS, _SERIAL_LOGITS = 4096, 1 << 16  # threads would cost a problem of no more than both more than they gain
_ITERATIONS = 1000
_CORRECTIONS = 30  # L-BFGS keeps this many pairs of vectors as long as the unknowns ...
_HISTORY_BYTES = 256_000_000  # ... and fewer pairs where they would take more than this


@dataclass(frozen=True, eq=False)
class Head:
    """A linear softmax head: `kernel` float32 (D, C), `bias` float32 (C,)."""

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, features: Rows) -> NDArray[np.float32]:
        """Logits float32 (N, C) of features (N, D)."""
        return np.asarray(features @ self.kernel + self.bias, np.float32)


def fit_lbfgs(
    data: HeadData,
    l2: float,
    label_smoothing: float = 0.0,
    start: Head | None = None,
    progress: Advance = ignore_progress,
) -> Head:
    """The head that minimises the objective on `data`, whose features are rows ``(N, D)``.

    Memory does not grow with N: the features may be a memory map and are read in blocks. It grows with the unknowns, U
    = (D + 1) * C: about 70 arrays of U float64, of which the history of L-BFGS takes 256 MB at most (or three pairs),
    and for each core a few arrays of D * C and of 1024 * C float32. The result is the same, bit for bit, for any
    number of threads. `start` only saves iterations, because the objective has one minimum (with l2 > 0). `progress`
    gets 1 after every iteration. Raises `Interrupted` within a block of rows after a signal.
    """
    with one_blas_thread():
        problem = Problem(data, label_smoothing)
        return problem.minimise(l2, start, progress, tolerance=problem.resolution)


class Problem:
    """The objective over fixed rows, and its minimum for a given `l2`.

    Inside, the bias is that of centred features (c = b + mean(x) W): the objective is the same, and L-BFGS needs a
    half to a third of the iterations, because W and the bias are no longer coupled.
    """

    def __init__(self, data: HeadData, label_smoothing: float) -> None:
        features, n_classes = data.features, data.n_classes
        self.features, self.labels = features, data.labels
        self.weights = np.asarray(data.weights, np.float64) / np.sum(data.weights, dtype=np.float64)
        self.n_classes, self.smoothing = n_classes, label_smoothing
        exact = features.dtype == np.float64
        self.dtype: np.dtype[np.floating[Any]] = np.dtype(np.float64 if exact else np.float32)
        # Rounding moves the loss by about this much. A search that asks for smaller gains takes noise for progress, and
        # up to half of its evaluations are those of line searches that find none.
        self.resolution = 1e-10 if exact else 3e-9
        self.blocks = [slice(i, i + _BLOCK_ROWS) for i in range(0, len(features), _BLOCK_ROWS)]
        self.mean = np.zeros(features.shape[1])
        for block in self.blocks:
            self.mean += self.weights[block].astype(self.dtype) @ self._rows(block)

    def minimise(self, l2: float, start: Head | None, progress: Advance, tolerance: float) -> Head:
        """The minimum; the search stops when an iteration gains less than `tolerance`."""
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
        rounded = np.ascontiguousarray(kernel.T, self.dtype), bias[:, None].astype(self.dtype)
        loss, by_kernel, by_bias = l2 * float((kernel**2).sum()), np.zeros(rounded[0].shape), np.zeros(self.n_classes)
        # The blocks are always the same and are added in order: the number of threads changes no bit.
        for part, kernel_part, bias_part in self._map(lambda block: self._block(block, *rounded)):
            loss += part
            by_kernel += kernel_part
            by_bias += bias_part
        gradient = np.empty_like(unknowns)
        gradient[:-1] = by_kernel.T + 2 * l2 * kernel - np.outer(self.mean, by_bias)
        gradient[-1] = by_bias
        return loss, gradient.ravel()

    def _block(self, block: slice, kernel: Rows, bias: Rows) -> _Part:
        """A block's part of the loss and of its derivatives by W' ``(C, D)`` and b; `kernel` is W', `bias` ``(C, 1)``.

        Logits are ``(C, n)``: with few classes, sums over them and both products are faster so.
        """
        signals.check()  # here, because folds and blocks are computed in threads, which no signal reaches
        rows, labels, weights = self._rows(block), self.labels[block], self.weights[block]
        z = kernel @ rows.T
        z += bias
        z -= z.max(axis=0)
        own, smoothed = (labels, np.arange(len(labels))), self.smoothing / self.n_classes
        target_z = (1 - self.smoothing) * z[own].astype(np.float64)
        if smoothed:
            target_z += smoothed * z.sum(axis=0, dtype=np.float64)
        slope = np.exp(z, out=z)
        total = slope.sum(axis=0)
        # CE = ln sum exp(z) - sum(target z), because the targets sum to 1.
        entropy = np.log(total, dtype=np.float64) - target_z
        weight = weights.astype(self.dtype)
        slope *= weight / total
        if smoothed:
            slope -= smoothed * weight
        slope[own] -= (1 - self.smoothing) * weight
        return float(weights @ entropy), slope @ rows, slope.sum(axis=1, dtype=np.float64)

    def _map(self, function: Callable[[slice], _Part]) -> Iterable[_Part]:
        rows = len(self.features)
        small = len(self.blocks) == 1 or (rows <= _SERIAL_ROWS and rows * self.n_classes <= _SERIAL_LOGITS)
        return map(function, self.blocks) if small else ordered_map(function, self.blocks, cores())

    def _rows(self, block: slice) -> Rows:
        return np.asarray(self.features[block], self.dtype)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread; blocks and folds run in parallel instead.

    OpenBLAS splits each of the many small products over its own threads and waits for them: 10 to 25 times slower as
    soon as another process wants a core (measured), and the bits depend on the number of threads.
    """
    import scipy.optimize  # noqa: F401  (before the limit, which holds for the libraries loaded by then)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, user_api="blas"):
        yield
