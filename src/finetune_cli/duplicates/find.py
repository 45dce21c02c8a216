"""Thumbnails and features in, near-duplicates out: pairs of photos that show the same picture, and groups of them.

    features, hashes -> candidates: the few nearest neighbours of every photo, by cosine
    candidates -> links: pairs whose thumbnails fit over each other
    links -> groups

Neither similarity decides alone. Two photos of ants may be closer to the backbone than a photo and its crop.
"""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli.duplicates import groups, hashes, neighbours
from finetune_cli.duplicates.alignment import Alignment
from finetune_cli.duplicates.screening import Screening
from finetune_cli.parallel import ordered_map
from finetune_cli.progress import Advance, ignore_progress

_BY_FEATURES, _FIRST = 8, 3  # neighbours of a photo; those that it is compared with in any case
_PER_GROUPS = 2  # pairs of photos of two groups that are compared at once
_LEAST_COSINE, _LEAST_HASH = 0.1, 0.8
_BAR, _HIGHEST_BAR = 0.6, 0.86
_COMPARED = 600  # pairs of different photos that the bar is raised by
_CHUNK = 256
_EXACT = 1 << 24  # float32 holds whole numbers up to this
VERSION = 2  # part of the cache key: raise it when `find` gives something else than before

# A group above this share of a class, and above this many photos, is reported and not used: it would decide the split.
LARGEST_SHARE, SMALLEST_LARGE = 0.05, 25


class Link(NamedTuple):
    """Two photos, by number, and how well they fit over each other, 0 to 1."""

    first: int
    second: int
    score: float


@dataclass(frozen=True)
class Found:
    """All links; the `groups` that stay together; those that are too `large` for that. Photos are numbers."""

    links: tuple[Link, ...]
    groups: tuple[tuple[int, ...], ...]
    large: tuple[tuple[int, ...], ...]

    def packed(self) -> NDArray[np.float32]:
        """All of it in one row, for the feature cache: the counts, the links, and each group after its size."""
        groups = [number for group in (*self.groups, *self.large) for number in (len(group), *group)]
        links = [number for link in self.links for number in link]
        return np.array([len(self.links), len(self.groups), len(self.large), *links, *groups], np.float32)

    @classmethod
    def unpacked(cls, row: NDArray[np.float32] | None, photos: int) -> "Found | None":
        """What `packed` gave for so many `photos`; `None` if `row` is nothing of that kind."""
        if row is None or len(row) < 3 or photos > _EXACT:
            return None
        links, groups, large = (int(number) for number in row[:3])
        end = 3 + 3 * links
        pairs, rest = row[3:end].reshape(-1, 3) if end <= len(row) else row[:0], row[end:].astype(int).tolist()
        if links < 0 or len(pairs) != links or not all(0 <= number <= photos for number in (*pairs[:, :2].flat, *rest)):
            return None
        found: list[tuple[int, ...]] = []
        start = 0
        while start < len(rest):
            found.append(tuple(rest[start + 1 : start + 1 + rest[start]]))
            start += 1 + rest[start]
        if start != len(rest) or len(found) != groups + large or any(photos in group for group in found):
            return None
        ready = tuple(Link(int(a), int(b), float(score)) for a, b, score in pairs)
        return cls(ready, tuple(found[:groups]), tuple(found[groups:]))


def find(
    thumbnails: NDArray[np.uint8],
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    workers: int,
    advance: Advance = ignore_progress,
) -> Found:
    """The near-duplicates among n different photos.

    `thumbnails`: ``uint8 (n, SIDE, SIDE)``; `features`: ``float32 (n, D)`` of view 0, perhaps a memory map; `labels`:
    ``int64 (n,)``. Memory: about 8 KB a photo, and 64 MB a thread. `advance` counts comparisons, and learns their
    total, which grows: photos that have a near-duplicate are compared with more of their neighbours.
    """
    comparison = _Comparison(thumbnails, labels, workers)
    found: list[list[int]] = []
    group_of = np.arange(len(labels))
    for stage in _candidates(thumbnails, features, workers):
        if stage.only_grouped:
            grouped = group_of < len(found)
            stage.keep[~(grouped[:, None] | grouped[stage.index])] = False
        comparison.compare(_between_groups(stage, group_of), advance)
        found = comparison.groups()
        group_of = np.arange(len(labels)) + len(found)
        for number, group in enumerate(found):
            group_of[group] = number
    large = [group for group in found if _is_large(group, labels)]
    used = tuple(tuple(group) for group in found if group not in large)
    return Found(tuple(comparison.links()), used, tuple(map(tuple, large)))


class _Comparison:
    """Scores of pairs (lower, higher), each computed once, and the least score of a link."""

    def __init__(self, thumbnails: NDArray[np.uint8], labels: NDArray[np.int64], workers: int) -> None:
        self._screening = Screening(thumbnails, workers)
        self._alignment = Alignment(thumbnails)
        self._workers = workers
        self._bar = _bar(self._alignment, labels)
        self._scores: dict[tuple[int, int], float] = {}
        self._asked = 0

    def compare(self, pairs: Set[tuple[int, int]], advance: Advance) -> None:
        """Compute the scores of `pairs` that are not known yet."""
        new = sorted(pairs - self._scores.keys())
        self._asked += len(new)

        passing, mirrored = self._screening.screened(np.array(new, np.intp).reshape(-1, 2))
        self._scores.update((new[i], 0.0) for i in np.flatnonzero(~passing))
        advance(int((~passing).sum()), self._asked)
        likely = np.flatnonzero(passing)

        def scores(start: int) -> list[tuple[tuple[int, int], float]]:
            some = likely[start : start + _CHUNK]
            return [(new[i], self._alignment.score(new[i][0], new[i][1], bool(mirrored[i]))) for i in some]

        for part in ordered_map(scores, range(0, len(likely), _CHUNK), self._workers):
            self._scores.update(part)
            advance(len(part), self._asked)

    def links(self) -> list[Link]:
        """The pairs that show the same picture, as far as they were compared, the most certain ones first."""
        found = [Link(a, b, score) for (a, b), score in self._scores.items() if score >= self._bar]
        return sorted(found, key=lambda link: (-link.score, link.first, link.second))

    def groups(self) -> list[list[int]]:
        """The groups that the links make; pairs that this needs are compared."""
        return groups.grouped([link[:2] for link in self.links()], self._is_link)

    def _is_link(self, a: int, b: int) -> bool:
        pair = (min(a, b), max(a, b))
        if pair not in self._scores:
            self._scores[pair] = self._alignment.score(*pair)
        return self._scores[pair] >= self._bar


@dataclass(frozen=True)
class _Stage:
    """Neighbours ``(n, k)`` of every photo that are compared with it where `keep` ``(n, k)`` is true.

    only_grouped: only pairs of which one photo has a near-duplicate already.
    """

    index: NDArray[np.intp]
    keep: NDArray[np.bool_]
    only_grouped: bool = False


def _candidates(thumbnails: NDArray[np.uint8], features: NDArray[np.float32], workers: int) -> Iterator[_Stage]:
    """The most likely pairs first: what they bring together need not be compared again."""
    rows = neighbours.directions(features)
    nearest, cosines = neighbours.nearest(rows, rows, _BY_FEATURES, workers)
    likely = cosines >= _LEAST_COSINE
    yield _Stage(nearest[:, :1], likely[:, :1])
    plain = hashes.hashes(thumbnails)
    for queries in (plain, hashes.mirrored(plain)):
        index, cosines = neighbours.nearest(queries, plain, 1, workers)
        yield _Stage(index, cosines >= _LEAST_HASH)
    yield _Stage(nearest[:, 1:_FIRST], likely[:, 1:_FIRST])
    yield _Stage(nearest[:, _FIRST:], likely[:, _FIRST:], only_grouped=True)


def _between_groups(stage: _Stage, group_of: NDArray[np.intp]) -> set[tuple[int, int]]:
    """The pairs of `stage` whose photos are in different groups, at most a few for any two groups."""
    counts: Counter[tuple[int, int]] = Counter()
    found = set()
    for pair in neighbours.pairs(stage.index, stage.keep):
        a, b = sorted((int(group_of[pair[0]]), int(group_of[pair[1]])))
        if a != b and pair not in found and counts[a, b] < _PER_GROUPS:
            counts[a, b] += 1
            found.add(pair)
    return found


def _bar(alignment: Alignment, labels: NDArray[np.int64]) -> float:
    """The least score of a link: 0.6, and more where different photos of a class fit over each other, too.

    Hands before a white wall, all in the middle, reach 0.8. So pairs of photos of one class are drawn, of which hardly
    any are near-duplicates, and 0.4 of what one in twenty of them reaches is added. It is never more than 0.86, so that
    a set that consists of copies does not hide them.
    """
    rng = np.random.default_rng(0)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels, side="left")
    sizes = np.searchsorted(labels[order], labels, side="right") - starts
    first = rng.integers(0, len(labels), _COMPARED)
    second = order[starts[first] + (rng.random(_COMPARED) * sizes[first]).astype(int)]
    scores = [alignment.score(int(a), int(b)) for a, b in zip(first, second, strict=True) if a != b]
    usual = float(np.quantile(scores, 0.95)) if scores else 0.0
    return min(_BAR + 0.4 * usual, _HIGHEST_BAR)


def _is_large(group: Sequence[int], labels: NDArray[np.int64]) -> bool:
    """Whether `group` is too large a part of one of its classes."""
    sizes = np.bincount(labels)
    own = np.bincount(labels[list(group)], minlength=len(sizes))
    return bool(np.any((own > SMALLEST_LARGE) & (own > LARGEST_SHARE * sizes)))
