"""The most similar rows by cosine, block by block: no matrix of all pairs, and a bounded amount of memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.parallel import ordered_map

_BLOCK_NUMBERS = 1 << 23  # similarities that a thread holds at once: 32 MB, and a few copies of parts of them
_BUCKETS = 32
_REDUCED = 256  # dimensions that many photos are compared in
_MANY = 4096  # rows from which on reducing costs less than it saves
_SAMPLED = 1024  # rows that the principal components are computed from


def directions(features: NDArray[np.floating[Any]], centred: bool = True) -> NDArray[np.float32]:
    """Unit vectors ``float32 (n, d)`` of `features` ``(n, D)``, which may be a memory map, less their mean.

    Centring makes photos comparable that all look alike to the backbone; without it, the cosine of a photo that is
    unlike all others is low. Of more than 4,096 rows, the 256 principal
    components of a sample are kept, because a search takes time in proportion to d.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, user_api="blas"):  # more threads wait for each other where other programs run
        return _directions(features, centred)


def _directions(features: NDArray[np.floating[Any]], centred: bool) -> NDArray[np.float32]:
    count, width = features.shape
    sample = np.array(features[:: max(1, count // _SAMPLED)][:_SAMPLED], np.float64)
    mean = sample.mean(axis=0) if centred else np.zeros(width)
    basis = np.eye(width, dtype=np.float32)
    if count > _MANY and width > _REDUCED:
        basis = _principal_components(sample - mean)
    found = np.empty((count, basis.shape[1]), np.float32)
    for start in range(0, count, _MANY):
        block = slice(start, start + _MANY)
        rows = np.asarray(features[block], np.float32) - mean.astype(np.float32)
        found[block] = rows @ basis if basis.shape[1] < width else rows
        found[block] /= np.maximum(np.linalg.norm(found[block], axis=1, keepdims=True), 1e-12)
    return found


def _principal_components(sample: NDArray[np.float64]) -> NDArray[np.float32]:
    """The first ones ``(D, d)`` of a centred sample ``(s, D)``, by the products of its rows: fewer than its columns."""
    vectors = np.linalg.eigh(sample @ sample.T)[1]  # by ascending variance
    components = sample.T @ vectors[:, : -_REDUCED - 1 : -1]
    return np.asarray(components / np.maximum(np.linalg.norm(components, axis=0), 1e-12), np.float32)


def nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], count: int, workers: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The `count` rows of the highest product with each query, but for the row of the same number.

    `queries` ``(n, d)`` belong to `rows` ``(n, d)`` one by one. Returns indexes ``intp (n, k)`` and products
    ``float32 (n, k)``, the highest first, with k = `count`, or n - 1 if that is less. Memory is bounded by the block
    that each of the `workers` threads holds.
    """
    from threadpoolctl import threadpool_limits

    total = len(rows)
    count = min(count, total - 1)
    index = np.empty((total, max(count, 0)), np.intp)
    values = np.empty((total, max(count, 0)), np.float32)
    if count < 1:
        return index, values
    step = max(1, _BLOCK_NUMBERS // total)

    def search(start: int) -> int:
        stop = min(start + step, total)
        products = queries[start:stop] @ rows.T
        products[np.arange(stop - start), np.arange(start, stop)] = -np.inf
        found = _largest(products, count)
        own = np.take_along_axis(products, found, axis=1)
        order = np.argsort(-own, axis=1, kind="stable")
        index[start:stop] = np.take_along_axis(found, order, axis=1)
        values[start:stop] = np.take_along_axis(own, order, axis=1)
        return start

    with threadpool_limits(1, user_api="blas"):  # the blocks run in parallel instead
        for _start in ordered_map(search, range(0, total, step), workers):
            pass
    return index, values


def _largest(products: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The columns of the `count` largest values of each row.

    They are in those `count` of many buckets that have the largest maxima: finding these is one pass over the products,
    and only a few columns are left to be sorted.
    """
    rows, columns = products.shape
    width = columns // _BUCKETS
    if width <= 4 * count:
        return np.argpartition(products, columns - count, axis=1)[:, columns - count :]
    even = products[:, : width * _BUCKETS].reshape(rows, _BUCKETS, width)
    best = np.argpartition(even.max(axis=1), width - count, axis=1)[:, width - count :]
    inside = (best[:, :, None] + width * np.arange(_BUCKETS)).reshape(rows, -1)
    rest = np.broadcast_to(np.arange(width * _BUCKETS, columns), (rows, columns - width * _BUCKETS))
    candidates = np.concatenate([inside, rest], axis=1)
    taken = np.take_along_axis(products, candidates, axis=1)
    chosen = np.argpartition(taken, taken.shape[1] - count, axis=1)[:, taken.shape[1] - count :]
    return np.take_along_axis(candidates, chosen, axis=1)


def pairs(index: NDArray[np.intp], keep: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The pairs (lower, higher) of a row and its neighbours `index` ``(n, k)`` where `keep` ``(n, k)`` is true."""
    rows, columns = np.nonzero(keep)
    others = index[rows, columns]
    yield from zip(np.minimum(rows, others).tolist(), np.maximum(rows, others).tolist(), strict=True)
