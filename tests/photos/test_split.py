import hashlib
import random
from collections import Counter

import pytest

from finetune_cli.photos.split import choose


def digest(i):
    return hashlib.sha256(str(i).encode()).hexdigest()


def photos(n, n_classes=3, group=lambda i: None):
    return [(i % n_classes, digest(i), group(i)) for i in range(n)]


def as_dict(rows, fraction=0.2):
    return {row[1]: kept for row, kept in zip(rows, choose(rows, fraction), strict=True)}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_share_is_about_what_was_asked_for(fraction):
    n = 6000
    kept = sum(choose(photos(n), fraction))
    assert abs(kept - n * fraction) < 4 * (n * fraction * (1 - fraction)) ** 0.5


def test_the_threshold_is_on_the_first_digits_of_the_digest():
    rows = [(i, f"{first:x}" + "0" * 63, None) for i in range(2) for first in range(16)]
    assert choose(rows, 0.25) == [first < 4 for _ in range(2) for first in range(16)]


def test_order_does_not_matter():
    rows = photos(500)
    before = as_dict(rows)
    random.Random(0).shuffle(rows)
    assert as_dict(rows) == before


@pytest.mark.parametrize("group", [lambda i: None, lambda i: f"g{i // 4}"])
def test_adding_photos_moves_no_photo(group):
    before = as_dict(photos(600, group=group))
    after = as_dict(photos(2000, group=group))
    assert all(after[key] == kept for key, kept in before.items())


def test_adding_photos_may_give_back_the_lent_one_and_no_other():
    few = [(label, f"{first:x}{label}" + "0" * 62, None) for label in (0, 1) for first in (8, 9, 10)]
    lent = as_dict(few)
    assert [key for key, kept in lent.items() if kept] == ["80" + "0" * 62, "81" + "0" * 62]
    more = as_dict([*few, (0, "00" * 32, None)])
    assert {key for key in lent if lent[key] != more[key]} == {"80" + "0" * 62}
    assert more["00" * 32]


def test_removing_photos_moves_no_photo():
    rows = photos(900)
    before, after = as_dict(rows), as_dict(rows[::2])
    assert all(before[key] == kept for key, kept in after.items())


def test_copies_stay_together():
    rows = [(0, digest(i % 50), None) for i in range(100)] + [(1, digest(-i), None) for i in range(1, 50)]
    kept = choose(rows, 0.5)
    assert kept[:50] == kept[50:100]


def test_groups_stay_together_also_over_classes():
    rows = photos(800, n_classes=2, group=lambda i: f"session {i % 80}")
    sides = {}
    for (_, _, group), kept in zip(rows, choose(rows, 0.3), strict=True):
        assert sides.setdefault(group, kept) == kept
    assert 10 < sum(sides.values()) < 40


def test_groups_that_share_a_copy_stay_together():
    rows = [(i % 2, digest(i), f"g{i // 2}") for i in range(200)]
    rows += [(0, digest(2 * g), f"g{(g + 1) % 100}") for g in range(0, 100, 10)]  # a copy in the next group
    sides = {}
    for (_, _, group), kept in zip(rows, choose(rows, 0.5), strict=True):
        assert sides.setdefault(group, kept) == kept
    assert all(sides[f"g{g}"] == sides[f"g{g + 1}"] for g in range(0, 100, 10))
    assert len(Counter(sides.values())) == 2


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.999])
def test_every_class_has_both_sides_where_it_can(fraction):
    rows = [(label, digest((label, i)), None) for label in range(30) for i in range(2 + label % 3)]
    sides = {}
    for (label, _, _), kept in zip(rows, choose(rows, fraction), strict=True):
        sides.setdefault(label, set()).add(kept)
    assert set(map(frozenset, sides.values())) == {frozenset({True, False})}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_class_of_one_photo_trains_on_it(fraction):
    assert choose([(0, digest(0), None), (1, digest(1), None)], fraction) == [False, False]
    assert choose([(0, digest(0), None)] * 3, fraction) == [False, False, False]
    assert choose([(0, digest(i), "one group") for i in range(5)], fraction) == [False] * 5


def test_every_class_trains_whatever_the_groups():
    for seed in range(50):
        random_ = random.Random(seed)
        rows = [(random_.randrange(4), digest((seed, i)), f"g{random_.randrange(5)}") for i in range(20)]
        trained = {row[0] for row, kept in zip(rows, choose(rows, 0.5), strict=True) if not kept}
        assert trained == {row[0] for row in rows}
