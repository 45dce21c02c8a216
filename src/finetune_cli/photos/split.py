"""The validation split: decided by the content of the photos, so that it is stable when photos are added.

A unit is what must stay on one side: all photos of a group, and all copies of a photo. Its hash is a number in [0, 1);
units below `fraction` are used for validation. Adding photos moves no other photo, except for the unit that a class
lends or gets back.
"""

import hashlib
from collections.abc import Hashable, Sequence


def choose(photos: Sequence[tuple[int, str, str | None]], fraction: float) -> list[bool]:
    """For each photo, given as (label, digest, group), whether it is used for validation.

    A class without a validation photo lends the unit with the lowest hash; a class without a training photo gets the
    one with the highest hash back, so a class of a single unit has no validation photos.
    """
    units = _units(photos)
    hashes: dict[str, float] = {}
    classes: dict[int, dict[str, None]] = {}
    for (label, digest, group), unit in zip(photos, units, strict=True):
        hashes[unit] = min(hashes.get(unit, 1.0), _hash(digest, group))
        classes.setdefault(label, {})[unit] = None
    chosen = {unit for unit, value in hashes.items() if value < fraction}
    for own in classes.values():
        if len(own) > 1 and chosen.isdisjoint(own):
            chosen.add(min(own, key=hashes.__getitem__))
    for own in classes.values():
        if chosen.issuperset(own):
            chosen.remove(max(own, key=hashes.__getitem__))
    return [unit in chosen for unit in units]


def _hash(digest: str, group: str | None) -> float:
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
