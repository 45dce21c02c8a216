"""The choice of the penalty `l2` by cross-validation on the training features."""

import math
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.head.data import HeadData, Ints, Rows
from finetune_cli.head.lbfgs import Head, Problem, one_blas_thread
from finetune_cli.metrics.calibration import fit_temperature, softmax
from finetune_cli.metrics.folds import group_folds
from finetune_cli.parallel import cores
from finetune_cli.progress import Advance, ignore_progress

FOLDS = 5
CV_ROWS = 4000  # `choose_l2` uses no more rows than about this
CV_WORK = 2e11  # and does no more work than this, in rows x features x classes x fits
_CV_CLASSES = 50  # it takes fewer rows before it takes fewer classes than this
_WEAKER, _STRONGER = 14, 8  # at most this many values of l2, half a decade apart, on either side of the first
_GAIN = 0.005  # a weaker penalty must lower the log loss by this share: the curve is flat, and strong is stable


@dataclass(frozen=True, slots=True)
class L2Search:
    """How `choose_l2` compares values.

    calibrated: take the log loss after the best temperature, for models that get one: a strong penalty is then not
    blamed for low confidence, which the temperature corrects. seed: of the folds, and of the part of large sets.
    """

    label_smoothing: float = 0.0
    seed: int = 0
    calibrated: bool = True


def choose_l2(
    data: HeadData,
    search: L2Search = L2Search(),
    progress: Advance = ignore_progress,
    note: Callable[[str], None] = lambda _text: None,
) -> tuple[float, list[tuple[float, float]]]:
    """The `l2` with the least log loss in cross-validation, and all (l2, log loss) tried, weakest first.

    `data` has features ``(N, D)``. Its own folds are used if it has some, else five, with the rows of a group in one.
    The values are half a decade apart; they go from strong to weak, each fit starting from the one before, until two in
    a row gain less than `_GAIN`, and then to stronger ones if the first was the best.

    Large sets are reduced: to at most about `CV_ROWS` rows, whole groups and all classes evenly, and of many classes to
    as many, drawn by the seed, as keep the work below `CV_WORK`, however long that takes. The result is scaled
    down in proportion, so that `l2` times the number of rows, the strength of the prior, is what was validated.
    `progress` gets 1 after every fit; `note` gets a line about what was left out. Raises `Interrupted` within a block
    of rows after a signal.
    """
    part, classes = _searched(data.labels, data.groups, data.features.shape[1], search.seed)
    reduced = data.part(part)
    if classes is not None:
        reduced = replace(reduced, labels=np.searchsorted(classes, reduced.labels), n_classes=len(classes))
    if not part.all():
        present = len(np.unique(data.labels))
        fewer = f" of {reduced.n_classes:,} of the {present:,} classes" if classes is not None else ""
        rows = f"{len(reduced.labels):,} of {len(data.labels):,}"
        note(f"l2 is chosen on {rows} views{fewer}, to bound the time of the search")
    first = _first_exponent(reduced.features, len(np.unique(reduced.groups)))
    tried: dict[int, float] = {}
    best = first
    with one_blas_thread():
        validation = _CrossValidation(reduced, _validation_folds(reduced, search.seed), search.label_smoothing)
        for exponents in (range(first, first - _WEAKER, -1), range(first + 1, first + 1 + _STRONGER)):
            if best != first:
                break
            penalties = [10.0 ** (exponent / 2) for exponent in exponents]
            with closing(validation.log_losses(penalties, search.calibrated, progress)) as losses:
                for exponent, loss in zip(exponents, losses, strict=False):
                    tried[exponent] = loss
                    if loss < tried[best] * (1 - _GAIN):
                        best = exponent
                    elif abs(exponent - best) >= 2:
                        break
    pairs = {exponent: 10.0 ** (exponent / 2) * float(part.mean()) for exponent in sorted(tried)}
    return pairs[best], [(l2, tried[exponent]) for exponent, l2 in pairs.items()]


def _searched(
    labels: Ints, groups: Ints, width: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.integer[Any]] | None]:
    """The rows that `choose_l2` uses, ``bool (N,)``, and their classes, ascending, if not all are among them.

    They depend on counts and `seed` alone, never on the clock. All classes are used, with at most `CV_ROWS` rows, if

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
    features' total variance. The search starts where their standard deviation is 1, near or above the best l2 on
    hymenoptera and scenes with 1 to 16 views; the rule adapts the search to backbones with larger or smaller features.
    """
    sample = np.asarray(features[:: max(1, len(features) // 1000)], np.float64)
    return round(2 * math.log10(max(float(sample.var(axis=0).sum()), 1e-12) / (2 * groups)))


def _validation_folds(data: HeadData, seed: int) -> NDArray[np.integer[Any]]:
    """The fold of each row, -1 for the only group of a class: without it nothing could be learned about the class."""
    if data.folds is not None:
        return data.folds - 1
    labels, groups = data.labels, data.groups
    fold = group_folds(labels, groups, FOLDS, seed)
    for label in np.unique(labels):
        own = labels == label
        if len(np.unique(groups[own])) == 1:
            fold[own] = -1
    return fold


class _CrossValidation:
    """A fit for each fold, which starts from its last result.

    The rows are sorted by fold and laid out twice, as a circle is: what follows a fold, until it comes again, are the
    rows of all others, so a fit reads no row that is held out, and its rows are not copied again.
    """

    def __init__(self, data: HeadData, fold: NDArray[np.integer[Any]], label_smoothing: float) -> None:
        order, count = np.argsort(fold, kind="stable"), len(fold)
        self.first = int((fold < 0).sum())  # rows that are never held out
        self.data = data.part(np.concatenate([order, order]))
        bounds = np.searchsorted(fold[order], [(k, k + 1) for k in np.unique(fold[fold >= 0])])
        self.held_out = [slice(start, stop) for start, stop in bounds]
        self.problems = [
            Problem(self.data.part(slice(rows.stop, rows.start + count)), label_smoothing) for rows in self.held_out
        ]
        self.heads: list[Head | None] = [None] * len(self.problems)

    def log_losses(
        self, penalties: Iterable[float], calibrated: bool, progress: Advance
    ) -> Generator[float, None, None]:
        """The weighted mean log loss of the held-out rows for each of the `penalties`; 0 if there are none.

        The folds are fitted side by side, and none waits for the others: one that is ready goes on with the next
        penalty, so that no core idles while the last fold is fitted. What was begun in vain is dropped when the
        generator is closed. Every fit starts from its fold's last one, so the number of threads changes no bit.
        """
        closed = threading.Event()

        def fit(k: int, l2: float, before: Future[Head] | None) -> Head:
            start = self.heads[k] if before is None else before.result()
            return self.problems[k].minimise(l2, start, stop_if_closed, tolerance=1e-5)

        def stop_if_closed(_done: int, _total: int | None = None) -> None:
            if closed.is_set():
                raise StopIteration  # which SciPy takes for the wish to end

        pool = ThreadPoolExecutor(cores(), thread_name_prefix="finetune")
        begun: list[Future[Head]] | None = None
        try:
            for l2 in (*penalties, None):
                waited = begun
                if l2 is not None:
                    # Tasks are begun in order: the one that a task waits for is never behind it.
                    begun = [
                        pool.submit(fit, k, l2, None if waited is None else waited[k])
                        for k in range(len(self.problems))
                    ]
                if waited is not None:
                    for k, future in enumerate(waited):
                        self.heads[k] = future.result()
                        progress(1)
                    yield self._held_out_loss(calibrated)
        finally:
            closed.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _held_out_loss(self, calibrated: bool) -> float:
        """The weighted mean log loss of the held-out rows by the folds' heads."""
        if not self.held_out:
            return 0.0
        logits = [
            head.logits(self.data.features[rows])
            for head, rows in zip(self.heads, self.held_out, strict=True)
            if head is not None
        ]
        rows = slice(self.first, self.held_out[-1].stop)
        z, y, w = np.concatenate(logits), self.data.labels[rows], self.data.weights[rows]
        p = softmax(z, fit_temperature(z, y, w) if calibrated else 1.0)
        return float(w @ -np.log(np.maximum(p[np.arange(len(y)), y], 1e-15)) / w.sum())
