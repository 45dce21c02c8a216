"""Links between photos -> groups that stay on one side of a split. Links cannot chain.

If a resembles b and b resembles c, a and c need not: in a slow pan of a camera, every frame resembles the next one, and
the first has nothing to do with the last. So two groups are joined only if at least a third of the pairs between them
are links, too (average linkage), of up to nine such pairs, evenly chosen.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

_PAIRS, _PER_GROUP = 9, 3
_LEAST_LINKED = 1 / 3


def grouped(links: Iterable[tuple[int, int]], is_link: Callable[[int, int], bool]) -> list[list[int]]:
    """Groups of at least two of the numbers in `links`, each ascending, in the order of their first members.

    `links` come with the most certain ones first. `is_link` answers for any other pair.
    """
    members: dict[int, list[int]] = {}
    group_of: dict[int, int] = {}
    refused: set[tuple[int, int, int, int]] = set()
    for pair in links:
        a, b = sorted(group_of.setdefault(i, i) for i in pair)
        for i in (a, b):
            members.setdefault(i, [i])
        if a == b:
            continue
        key = (a, b, len(members[a]), len(members[b]))
        if key in refused:
            continue
        if not _belong_together(members[a], members[b], is_link):
            refused.add(key)
            continue
        for i in members[b]:
            group_of[i] = a
        members[a] += members.pop(b)
    return sorted(sorted(group) for group in members.values() if len(group) > 1)


def _belong_together(one: list[int], other: list[int], is_link: Callable[[int, int], bool]) -> bool:
    if len(one) == len(other) == 1:
        return True  # a link joins them
    smaller, larger = sorted((one, other), key=len)
    some = _some(smaller, _PER_GROUP)
    pairs = [(a, b) for a in some for b in _some(larger, _PAIRS // len(some))]
    missing = math.ceil(_LEAST_LINKED * len(pairs))
    for left, (a, b) in zip(range(len(pairs), 0, -1), pairs, strict=True):
        if not 0 < missing <= left:
            break
        missing -= is_link(a, b)
    return missing <= 0


def _some(group: list[int], most: int) -> list[int]:
    chosen = np.linspace(0, len(group) - 1, min(len(group), most)).astype(int)
    return [group[i] for i in chosen]
