from finetune_cli.duplicates.groups import grouped


def groups(links, also=()):
    known = {frozenset(pair) for pair in (*links, *also)}
    return grouped(links, lambda a, b: frozenset((a, b)) in known)


def test_linked_photos_are_a_group():
    assert groups([(1, 2), (5, 4)]) == [[1, 2], [4, 5]]
    assert groups([]) == []


def test_all_copies_of_a_photo_are_one_group():
    copies = range(10)
    pairs = [(a, b) for a in copies for b in copies if a < b]
    assert groups(pairs[:9], also=pairs) == [list(copies)]


def test_links_do_not_chain():
    frames = 200  # each frame of a pan resembles the next one, and no other
    found = groups([(i, i + 1) for i in range(frames)])
    assert max(map(len, found)) <= 4
    members = [i for group in found for i in group]
    assert len(members) == len(set(members))


def test_longer_overlaps_do_not_chain_either():
    near = [(i, i + step) for step in (1, 2) for i in range(200)]
    assert max(map(len, groups(near))) <= 7
    backwards = [(200 - a, 200 - b) for a, b in near]
    assert max(map(len, groups(backwards))) <= 7


def test_one_link_does_not_join_two_large_groups():
    one, other = list(range(10)), list(range(10, 20))
    inside = [(a, b) for part in (one, other) for a in part for b in part if a < b]
    assert groups([*inside, (0, 10)]) == [one, other]


def test_a_photo_that_resembles_a_third_of_a_group_joins_it():
    inside = [(0, 1), (0, 2), (1, 2)]
    assert groups([*inside, (2, 3)]) == [[0, 1, 2, 3]]
