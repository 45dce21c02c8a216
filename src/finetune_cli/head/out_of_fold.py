"""Out-of-fold logits: every photo is answered by a head that was fitted without it and without the rest of its fold."""

from dataclasses import replace

import numpy as np

from finetune_cli.head.data import HeadData, Ints, Rows
from finetune_cli.head.lbfgs import Head, fit_lbfgs, one_blas_thread
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.progress import Advance, ignore_progress

_BLOCK_PHOTOS = 4096  # so many features are copied out of a memory map at once


def numbers(folds: Ints) -> list[int]:
    """The folds that hold photos, ascending; 0 in `folds` ``(n,)`` stands for none."""
    return [int(fold) for fold in np.unique(folds) if fold]


def without(data: HeadData, fold: int) -> HeadData:
    """`data` to learn from when `fold` is held out: its photos have the weight 0, so that no feature is copied."""
    return replace(data, weights=np.where(data.folds == fold, 0.0, data.weights))


def logits(heads: dict[int, Head], folds: Ints, held_out: Rows) -> Rows:
    """What the `heads` by fold answer for the photos of their folds, ``float32 (n, C)``; NaN where the fold is 0.

    folds: ``(n,)``. held_out: the features ``(n, D)`` that are answered, view 0 in the precision of a prediction.
    """
    found = np.full((len(folds), len(next(iter(heads.values())).bias)), np.nan, np.float32)
    for fold, head in heads.items():
        photos = np.flatnonzero(folds == fold)
        for start in range(0, len(photos), _BLOCK_PHOTOS):
            rows = photos[start : start + _BLOCK_PHOTOS]
            found[rows] = head.logits(held_out[rows])
    return found


def fit_folds(
    data: HeadData, held_out: Rows, l2: float, label_smoothing: float = 0.0, advance: Advance = ignore_progress
) -> Rows:
    """The out-of-fold `logits` of heads that L-BFGS fits on `data`, features ``(n, views, D)`` with folds.

    All heads have the same `l2`, and none starts from another one, which could know the photos that it answers for.
    They are fitted side by side. `advance` gets 1 after every fit. Raises `Interrupted` within a block of rows after a
    signal.
    """
    assert data.folds is not None
    folds = numbers(data.folds)

    def fit(fold: int) -> Head:
        return fit_lbfgs(without(data, fold).rows(), l2, label_smoothing)

    heads = {}
    with one_blas_thread():  # a fit that ends must not lift the limit for those that go on
        for fold, head in zip(folds, ordered_map(fit, folds, cores()), strict=True):
            heads[fold] = head
            advance(1)
    return logits(heads, data.folds, held_out)
