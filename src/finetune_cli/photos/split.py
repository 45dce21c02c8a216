"""The validation split: decided by the content of the photos, so that adding photos moves few others.

A unit is what must stay on one side: all photos of a group, and all copies of a photo. Its place is a number in [0, 1)
that its content decides. Every class gives its share of photos (largest remainder), from the units with the lowest
places on. So when photos are added, only units move whose place is near the end of a class's share.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence, Set

# The group of near-duplicates that have no other one: this, and the beginning of the digest of one of them.
NEAR = "near:"
_NEAR_NAME = re.compile(NEAR + "[0-9a-f]{16}")
_PLACE_DIGITS = 13


def choose(
    photos: Sequence[tuple[int, str, str | None]], fraction: float, trained_on: Set[str] = frozenset()
) -> list[bool]:
    """For each photo, given as (label, digest, group), whether it is used for validation.

    The units are gone through by their place, and one is taken if that brings the classes of its photos nearer to their
    shares of `fraction`. A class without a validation photo lends its smallest unit; a class without a training photo
    gets its last one back, so a class of a single unit has no validation photos. Units with a photo whose digest is in
    `trained_on` are never taken.
    """
    units = _units(photos)
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    places: dict[str, float] = {}
    for (label, digest, group), unit in zip(photos, units, strict=True):
        counts[unit][label] += 1
        places[unit] = min(places.get(unit, 1.0), _place(digest, group))
    ordered = sorted(counts, key=lambda unit: (places[unit], unit))
    fixed = {unit for (_label, digest, _group), unit in zip(photos, units, strict=True) if digest in trained_on}
    free = [unit for unit in ordered if unit not in fixed]
    missing = _shares(Counter(label for label, _digest, _group in photos), fraction)
    chosen = set()
    for unit in free:
        own = counts[unit]
        if sum(abs(missing[label] - count) - abs(missing[label]) for label, count in own.items()) < 0:
            chosen.add(unit)
            missing.subtract(own)
    for label in sorted(missing):
        own_units = [unit for unit in ordered if label in counts[unit]]
        lendable = [unit for unit in own_units if unit not in fixed]
        if len(own_units) > 1 and lendable and chosen.isdisjoint(own_units):
            chosen.add(min(lendable, key=lambda unit: counts[unit].total()))
    for label in sorted(missing):
        own_units = [unit for unit in ordered if label in counts[unit]]
        if chosen.issuperset(own_units):
            chosen.remove(own_units[-1])
    return [unit in chosen for unit in units]


def _shares(photos: Mapping[int, int], fraction: float) -> Counter[int]:
    """How many photos of each label validate: `fraction` of all, rounded by the largest remainders."""
    exact = {label: fraction * count for label, count in photos.items()}
    shares = Counter({label: math.floor(share) for label, share in exact.items()})
    left = round(sum(exact.values())) - shares.total()
    by_remainder = sorted(exact, key=lambda label: (shares[label] - exact[label], label))
    shares.update(by_remainder[: max(left, 0)])
    return shares


def into_folds(photos: Sequence[tuple[int, str, str | None]], folds: int) -> list[int | None]:
    """The fold, from 1 to `folds`, of each photo, given as (label, digest, group); units stay whole.

    The largest units come first, class by class and in the order of their places; each goes to the fold that has the
    smallest shares of its classes so far, of equals to the smallest fold. So for photos without groups or copies, the
    folds' sizes differ by at most one photo, in every class and as a whole.

    A class must be in two folds for either to be judged by a head that knows it: the last unit of a class avoids the
    fold that holds the others. The units of a class for which that is impossible, because it has one unit only, get no
    fold, None: they are in the training part of every fold.
    """
    units = _units(photos)
    contents: dict[str, Counter[int]] = {}
    places: dict[str, float] = {}
    for (label, digest, group), unit in zip(photos, units, strict=True):
        contents.setdefault(unit, Counter())[label] += 1
        places[unit] = min(places.get(unit, 1.0), _place(digest, group))
    totals = Counter(label for label, _digest, _group in photos)
    waiting = Counter(label for content in contents.values() for label in content)
    in_fold = {fold: Counter[int]() for fold in range(1, folds + 1)}

    def only_fold(label: int) -> int | None:
        found = [fold for fold, counts in in_fold.items() if counts[label]]
        return found[0] if len(found) == 1 else None

    chosen: dict[str, int] = {}
    for unit in sorted(contents, key=lambda unit: (-contents[unit].total(), min(contents[unit]), places[unit], unit)):
        content = contents[unit]
        alone = [only_fold(label) for label in content if waiting[label] == 1]
        chosen[unit] = min(
            in_fold,
            key=lambda fold: (
                alone.count(fold),
                sum(count * in_fold[fold][label] / totals[label] for label, count in sorted(content.items())),
                in_fold[fold].total(),
                fold,
            ),
        )
        in_fold[chosen[unit]].update(content)
        waiting.subtract(content.keys())
    unknown = {label for label in totals if only_fold(label) is not None}
    return [None if unknown & contents[unit].keys() else chosen[unit] for unit in units]


def near_group(digests: Collection[str]) -> str:
    """The name of a group of near-duplicates, by the digest of one of them.

    Which one is decided by another hash, so that the place of a group says nothing about its size.
    """
    return NEAR + min(digests, key=lambda digest: hashlib.sha256(digest.encode()).digest())[:16]


def merged(photos: Sequence[tuple[str, str | None]], together: Iterable[Collection[str]]) -> list[str | None]:
    """The group of each photo, given as (digest, group), after the digests in each of `together` were united.

    A group of near-duplicates joins the group that one of them has; of several such groups, the first by name gives
    the name. Photos that nothing was united with keep what they had.
    """
    joined = _Joined()
    for digest, group in photos:
        if group is not None:
            joined.join(("digest", digest), ("group", group))
    for digests in together:
        first, *others = digests
        for digest in others:
            joined.join(("digest", first), ("digest", digest))
    digests_of: dict[Hashable, set[str]] = defaultdict(set)
    groups_of: dict[Hashable, set[str]] = defaultdict(set)
    for digest, group in photos:
        root = joined.root(("digest", digest))
        digests_of[root].add(digest)
        if group is not None:
            groups_of[root].add(group)
    names = {
        root: min(groups_of[root]) if groups_of[root] else near_group(digests) if len(digests) > 1 else None
        for root, digests in digests_of.items()
    }
    return [names[joined.root(("digest", digest))] for digest, _group in photos]


def _place(digest: str, group: str | None) -> float:
    """The place of a photo or of its group, evenly spread over [0, 1)."""
    if group is not None:
        digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).hexdigest()
        if _NEAR_NAME.fullmatch(group):  # a photo that gets a near-duplicate mostly stays where it was
            digest = group.removeprefix(NEAR)
    return float(int(digest[:_PLACE_DIGITS], 16) / 16**_PLACE_DIGITS)


def _units(photos: Sequence[tuple[int, str, str | None]]) -> list[str]:
    """The name of each photo's unit. Groups that share a copy of a photo become one unit."""
    if all(group is None for _label, _digest, group in photos):
        return [digest for _label, digest, _group in photos]
    joined = _Joined()
    for _label, digest, group in photos:
        if group is not None:
            joined.join(("digest", digest), ("group", group))
    return [repr(joined.root(("digest", digest))) for _label, digest, _group in photos]


class _Joined:
    """Sets of what was joined, each known by one of its members, its root."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def root(self, node: Hashable) -> Hashable:
        while (above := self._parent.setdefault(node, node)) != node:
            self._parent[node] = self._parent[above]
            node = above
        return node

    def join(self, one: Hashable, other: Hashable) -> None:
        self._parent[self.root(one)] = self.root(other)
