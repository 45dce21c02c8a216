"""Folds for cross-validation: labels and groups go in, one fold number per row comes out.

What belongs together (views of one photo, exact duplicates, photos of one burst) shares a group and is never on
both sides of a split; the classes are spread evenly.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def group_numbers(photos: Iterable[tuple[str | None, str]]) -> NDArray[np.int64]:
    """``int64 (n,)``: a number for the group of each photo, given as (group, digest), or for its content without one.

    Photos that share a number, those of a group and copies of a photo, stay together.
    """
    keys = [f"group {group}" if group else digest for group, digest in photos]
    number = {key: i for i, key in enumerate(sorted(set(keys)))}  # NumPy would copy every key, at 4 bytes a letter
    return np.array([number[key] for key in keys], np.int64)


def group_folds(labels: ArrayLike, groups: ArrayLike, folds: int, seed: int = 0) -> NDArray[np.intp]:
    """The fold, ``0 <= fold < folds``, of each row; rows of one group share it. The same inputs give the same folds.

    `labels` and `groups` are integers of shape (N,). A group counts for the class of its first row. Groups are
    shuffled within their class and dealt to the folds in turn, each class starting where the last one ended, so that
    fold sizes differ by at most one group, overall and within every class. With fewer groups than `folds`, the last
    folds are empty.
    """
    _, first, group_of_row = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    class_of_group = np.asarray(labels)[first]
    shuffled = np.random.default_rng(seed).permutation(len(first))
    dealt = shuffled[np.argsort(class_of_group[shuffled], kind="stable")]
    fold_of_group = np.empty(len(first), np.intp)
    fold_of_group[dealt] = np.arange(len(first)) % folds
    return fold_of_group[group_of_row.reshape(-1)]
