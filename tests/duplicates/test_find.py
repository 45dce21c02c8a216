import itertools

import numpy as np
import pytest
from planted import KINDS, copy, picture, pixels

from finetune_cli.duplicates import find as module
from finetune_cli.duplicates.find import Found, find
from finetune_cli.duplicates.thumbnails import thumbnail


@pytest.fixture(scope="module")
def planted():
    """40 pictures; the first 8 come with a copy of every kind. Their features nearly agree."""
    rng = np.random.default_rng(0)
    images, sources = [], []
    for seed in range(40):
        images += [picture(seed), *(copy(picture(seed), kind) for kind in KINDS if seed < 8)]
        sources += [seed] * (1 + len(KINDS) * (seed < 8))
    sources = np.array(sources)
    features = rng.normal(size=(40, 64))[sources] + 0.3 * rng.normal(size=(len(sources), 64))
    return np.stack([thumbnail(pixels(image)) for image in images]), features.astype(np.float32), sources


def test_every_planted_copy_is_found_and_nothing_else(planted):
    thumbnails, features, sources = planted
    calls = []
    found = find(thumbnails, features, sources % 4, 2, lambda n, total: calls.append((n, total)))
    assert [set(sources[list(group)]) for group in found.groups] == [{seed} for seed in range(8)]
    assert all(len(group) == 1 + len(KINDS) for group in found.groups)
    assert all(sources[link.first] == sources[link.second] for link in found.links)
    assert found.large == ()
    assert sum(n for n, _total in calls) == calls[-1][1] >= len(found.links)


def test_what_was_found_comes_back_from_the_cache(planted):
    thumbnails, features, sources = planted
    found = find(thumbnails, features, sources % 4, 2)
    again = Found.unpacked(found.packed(), len(sources))
    assert (again.groups, again.large) == (found.groups, found.large)
    assert [link[:2] for link in again.links] == [link[:2] for link in found.links]
    assert [link.score for link in again.links] == pytest.approx([link.score for link in found.links], abs=1e-6)
    both = Found((), ((0, 1), (2, 3, 4)), ((5, 6),))
    assert Found.unpacked(both.packed(), 7) == both
    nothing = Found((), (), ())
    assert Found.unpacked(nothing.packed(), 7) == nothing


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        [0, 0],
        [1, 0, 0],
        [-1, 0, 0],
        [0, 1, 0],
        [0, 1, 0, 2, 3],
        [0, 1, 0, 2, 3, 7],
        [1, 0, 0, 0, 9, 0.5],
        [0, 2, 0, 2, 0, 1],
    ],
)
def test_a_row_of_another_kind_is_not_taken_for_what_was_found(row):
    assert Found.unpacked(None if row is None else np.array(row, np.float32), 7) is None


def test_the_number_of_threads_changes_nothing(planted):
    thumbnails, features, sources = planted
    assert find(thumbnails, features, sources % 4, 1) == find(thumbnails, features, sources % 4, 3)


def test_copies_that_the_features_do_not_recognise_are_found_by_their_hash(planted):
    thumbnails, features, sources = planted
    strange = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    found = find(thumbnails, strange, sources % 4, 1)
    pairs = {(sources[link.first], KINDS.index("mirrored")) for link in found.links}
    assert len(pairs) == 8
    assert all(sources[link.first] == sources[link.second] for link in found.links)


def test_too_large_groups_are_reported_and_not_used(planted, monkeypatch):
    thumbnails, features, sources = planted
    monkeypatch.setattr(module, "SMALLEST_LARGE", 4)
    found = find(thumbnails, features, sources % 4, 1)
    assert found.groups == ()
    assert len(found.large) == 8


def test_a_large_group_is_one_of_more_than_25_photos_and_5_percent():
    labels = np.repeat([0, 1], [500, 10_000])
    assert not module._is_large(range(25), labels)
    assert module._is_large(range(26), labels)
    assert not module._is_large(range(500, 1000), labels)
    assert module._is_large(range(500, 1001), labels)
    assert not module._is_large([*range(20), *range(500, 520)], labels)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_photos(count):
    thumbnails = np.stack([thumbnail(pixels(picture(seed))) for seed in range(count)])
    found = find(
        thumbnails, np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32), np.zeros(count, int), 1
    )
    assert found.links == found.groups == found.large == ()


def test_photos_that_are_all_alike_raise_the_bar(planted):
    thumbnails, _features, _sources = planted
    same_background = np.tile(thumbnails[:1], (30, 1, 1))
    rng = np.random.default_rng(2)
    for row in same_background:
        top, left = rng.integers(0, 36, 2)
        row[top : top + 12, left : left + 12] = 128
    labels = np.zeros(30, np.int64)
    bar = module._bar(module.Alignment(same_background), labels)
    different = module._bar(module.Alignment(thumbnails[48:]), np.zeros(len(thumbnails) - 48, np.int64))
    assert different == pytest.approx(0.6)
    assert different < bar <= 0.86


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hymenoptera", "scenes"])
def test_real_photos_and_their_copies(name, shared_data):
    """The floors of the documentation, with noisy features in place of a backbone's."""
    from PIL import Image

    paths = sorted((shared_data / name / "train").rglob("*.jp*g"))[::4]
    images, sources = [], []
    for number, path in enumerate(paths):
        with Image.open(path) as file:
            original = file.convert("RGB")
        kinds = KINDS if number < 30 else ()
        images += [original, *(copy(original, kind) for kind in kinds)]
        sources += [number] * (1 + len(kinds))
    sources = np.array(sources)
    thumbnails = np.stack([thumbnail(pixels(image)) for image in images])
    features = np.random.default_rng(0).normal(size=(len(paths), 64))[sources]
    features = (features + 0.5 * np.random.default_rng(1).normal(size=(len(sources), 64))).astype(np.float32)
    found = find(thumbnails, features, sources % 3, 2)
    pairs = [pair for group in found.groups for pair in itertools.combinations(group, 2)]
    right = sum(sources[a] == sources[b] for a, b in pairs)
    assert right >= 0.95 * len(pairs)
    originals = {source: row for row, source in reversed(list(enumerate(sources)))}
    together = {row: set(group) for group in found.groups for row in group}
    copies = [row for row, source in enumerate(sources) if row != originals[source]]
    assert len(copies) == 30 * len(KINDS)
    assert sum(originals[sources[row]] in together.get(row, ()) for row in copies) >= 0.95 * len(copies)
