import hashlib
import random
from collections import Counter

import pytest

from finetune_cli.photos.split import choose, into_folds, merged, near_group


def digest(i):
    return hashlib.sha256(str(i).encode()).hexdigest()


def photos(n, n_classes=3, group=lambda i: None):
    return [(i % n_classes, digest(i), group(i)) for i in range(n)]


def as_dict(rows, fraction=0.2):
    return {row[1]: kept for row, kept in zip(rows, choose(rows, fraction), strict=True)}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_every_class_gives_its_share(fraction):
    rows = [(label, digest((label, i)), None) for label in range(7) for i in range(40 + label)]
    kept = choose(rows, fraction)
    given = Counter(label for (label, _, _), is_val in zip(rows, kept, strict=True) if is_val)
    assert all(int(fraction * (40 + label)) <= given[label] <= int(fraction * (40 + label)) + 1 for label in range(7))
    assert sum(kept) == round(fraction * len(rows))


def test_the_largest_remainders_get_the_photos_that_are_left():
    # Shares of 0.25: 1.25, 1.5 and 1.75 of 5, 6 and 7 photos; 4.5 in all, so 4 and one class more than its floor.
    rows = [(label, digest((label, i)), None) for label, count in enumerate((5, 6, 7)) for i in range(count)]
    kept = choose(rows, 0.25)
    given = Counter(label for (label, _, _), is_val in zip(rows, kept, strict=True) if is_val)
    assert [given[label] for label in range(3)] == [1, 1, 2]


def test_the_lowest_digests_validate():
    rows = [(i, f"{first:x}" + "0" * 63, None) for i in range(2) for first in range(16)]
    assert choose(rows, 0.25) == [first < 4 for _ in range(2) for first in range(16)]


def test_order_does_not_matter():
    rows = photos(500)
    before = as_dict(rows)
    random.Random(0).shuffle(rows)
    assert as_dict(rows) == before


@pytest.mark.parametrize(("group", "most"), [(lambda i: None, 0.02), (lambda i: f"g{i // 4}", 0.06)])
def test_adding_photos_moves_few(group, most):
    before = as_dict(photos(2000, group=group))
    after = as_dict(photos(2200, group=group))
    assert 0 < sum(after[key] != kept for key, kept in before.items()) < most * len(before)


def test_removing_photos_moves_few():
    rows = photos(2000)
    before, after = as_dict(rows), as_dict(rows[:1800])
    assert 0 < sum(before[key] != kept for key, kept in after.items()) < 0.02 * len(after)


def test_a_photo_mostly_stays_where_it_is_when_it_gets_a_near_duplicate():
    rows = photos(2000)
    before = as_dict(rows)
    new = [(label, digest(("new", i)), None) for i, (label, _, _) in enumerate(rows[:200])]
    pairs = [{old[1], added[1]} for old, added in zip(rows, new, strict=False)]
    groups = merged([(row[1], None) for row in [*rows, *new]], pairs)
    after = as_dict([(row[0], row[1], group) for row, group in zip([*rows, *new], groups, strict=True)])
    assert sum(after[key] != kept for key, kept in before.items()) < 0.05 * len(before)


def test_groups_validate_whatever_their_size():
    rows = [(0, digest(i), None) for i in range(1000)] + [
        (0, digest((g, i)), None) for g in range(200) for i in (1, 2, 3, 4, 5)
    ]
    groups = merged([(row[1], None) for row in rows], [{digest((g, i)) for i in (1, 2, 3, 4, 5)} for g in range(200)])
    rows = [(0, row[1], group) for row, group in zip(rows, groups, strict=True)]
    kept = choose(rows, 0.2)
    assert 0.15 < sum(kept[:1000]) / 1000 < 0.25
    assert 0.15 < sum(kept[1000:]) / 1000 < 0.25


def test_what_an_earlier_run_was_trained_on_does_not_validate():
    rows = photos(300)
    seen = {row[1] for row, kept in zip(rows, choose(rows, 0.2), strict=True) if kept}
    kept = choose(rows, 0.2, seen)
    assert sum(kept) == 60
    assert not seen & {row[1] for row, is_val in zip(rows, kept, strict=True) if is_val}
    assert choose(rows, 0.2, {row[1] for row in rows}) == [False] * 300


def test_the_groups_of_photos_that_earlier_runs_were_trained_on_do_not_validate():
    rows = photos(300, group=lambda i: f"g{i // 3}")
    kept = choose(rows, 0.2, {digest(3 * g) for g in range(0, 100, 2)})
    assert sum(kept) == 60
    assert not any(is_val for i, is_val in enumerate(kept) if i // 3 % 2 == 0)


def test_near_duplicates_get_one_group():
    rows = [("a", None), ("b", None), ("c", None), ("b", None), ("d", "g1"), ("e", "g2"), ("f", None), ("h", "g3")]
    names = merged(rows, [{"a", "b"}, {"d", "e", "f"}])
    assert names[0] == names[1] == names[3] == near_group({"a", "b"})
    assert names[2] is None
    assert names[4] == names[5] == names[6] == "g1"
    assert names[7] == "g3"
    assert merged(rows, []) == [group for _digest, group in rows]


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


def sizes(rows, folds, label=None):
    """How many photos each fold holds out, of a class or of all."""
    found = Counter(fold for row, fold in zip(rows, into_folds(rows, folds), strict=True) if label in (None, row[0]))
    return [found[fold] for fold in range(1, folds + 1)]


@pytest.mark.parametrize(("n", "folds"), [(20, 5), (33, 5), (101, 7), (300, 10)])
def test_folds_differ_by_one_photo_in_every_class_and_as_a_whole(n, folds):
    rows = photos(n)
    for label in (None, 0, 1, 2):
        assert max(sizes(rows, folds, label)) - min(sizes(rows, folds, label)) <= 1
    assert sum(sizes(rows, folds)) == n


def test_folds_depend_on_content_alone():
    rows = photos(100)
    before = dict(zip(rows, into_folds(rows, 5), strict=True))
    random.Random(0).shuffle(rows)
    assert dict(zip(rows, into_folds(rows, 5), strict=True)) == before


def test_groups_and_copies_are_in_one_fold():
    copies = [(0, digest(0), None), (1, digest(500), None), (1, digest(500), "x")]
    rows = [*photos(60, group=lambda i: f"g{i // 7}"), *copies]
    folds = into_folds(rows, 4)
    for key in (lambda row: row[2] or row[1], lambda row: row[1]):
        together = {}
        for row, fold in zip(rows, folds, strict=True):
            together.setdefault(key(row), set()).add(fold)
        assert all(len(found) == 1 for found in together.values())


def test_persons_who_show_every_class_are_spread_evenly():
    rows = [(label, digest((person, label)), f"p{person}") for person in range(12) for label in range(10)]
    assert sorted(sizes(rows, 5)) == [20, 20, 20, 30, 30]


def test_a_class_of_two_units_is_in_two_folds_whatever_else_they_hold():
    # Both units of class 1 would go to the emptiest fold by the shares of class 0 alone.
    rows = [(0, digest(i), f"g{i // 10}") for i in range(40)] + [(1, digest(100), "g0"), (1, digest(101), "g1")]
    folds = into_folds(rows, 2)
    assert {fold for row, fold in zip(rows, folds, strict=True) if row[0] == 1} == {1, 2}


def test_the_only_unit_of_a_class_is_never_held_out():
    rows = [*photos(20, 2), (2, digest(900), "g"), (2, digest(901), "g"), (0, digest(902), "g")]
    folds = into_folds(rows, 5)
    assert folds[20:] == [None, None, None]
    assert None not in folds[:20]
