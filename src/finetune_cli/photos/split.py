"""Which training photos are kept for validation: decided by content, so that it stays as it was when photos are added.

A unit is what must not be torn apart: all photos of a group, and all copies of a photo. Its hash is a number in
[0, 1); below `fraction` it is kept for validation. Adding photos moves no other photo, but for the one that a class
lends or gets back.
"""

import hashlib
from collections.abc import Hashable, Sequence


def choose(photos: Sequence[tuple[int, str, str | None]], fraction: float) -> list[bool]:
    """For each photo, given as (label, digest, group), whether it is kept for validation.

    A class without a validation photo lends the unit with the lowest hash; a class without a training photo gets the
    one with the highest hash back, so a class of a single unit trains on it and has nothing to be validated with.
    """
    units = _units(photos)
    places: dict[str, float] = {}
    classes: dict[int, dict[str, None]] = {}
    for (label, digest, group), unit in zip(photos, units, strict=True):
        places[unit] = min(places.get(unit, 1.0), _place(digest, group))
        classes.setdefault(label, {})[unit] = None
    kept = {unit for unit, place in places.items() if place < fraction}
    for own in classes.values():
        if len(own) > 1 and kept.isdisjoint(own):
            kept.add(min(own, key=places.__getitem__))
    for own in classes.values():
        if kept.issuperset(own):
            kept.remove(max(own, key=places.__getitem__))
    return [unit in kept for unit in units]


def _place(digest: str, group: str | None) -> float:
    """The hash of a photo or of its group, evenly spread over [0, 1)."""
    if group is not None:
        digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).hexdigest()
    return int(digest[:13], 16) / 16**13


def _units(photos: Sequence[tuple[int, str, str | None]]) -> list[str]:
    """The name of each photo's unit. Groups that share a copy of a photo become one unit."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]
            node = above
        return node

    for _label, digest, group in photos:
        if group is not None:
            parent[root(("digest", digest))] = root(("group", group))
    return [repr(root(("digest", digest))) if parent else digest for _label, digest, _group in photos]
