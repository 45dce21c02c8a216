"""Folds keep groups together and classes even."""

import numpy as np
import pytest

from finetune_cli.metrics.folds import group_folds, group_numbers


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_stay_together_and_classes_are_spread(seed):
    rng = np.random.default_rng(seed)
    group_label = rng.integers(0, 3, 103)
    groups = rng.permutation(np.repeat(np.arange(103), 4)) * 7 + 1000
    labels = group_label[(groups - 1000) // 7]
    fold = group_folds(labels, groups, 5, seed)
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1
    for label in (None, 0, 1, 2):
        sizes = [len(set(groups[(fold == k) & ((labels == label) | (label is None))])) for k in range(5)]
        assert max(sizes) - min(sizes) <= 1


def test_the_same_inputs_give_the_same_folds_and_another_seed_others():
    labels, groups = np.arange(50) % 2, np.arange(50)
    assert np.array_equal(group_folds(labels, groups, 5, 1), group_folds(labels, groups, 5, 1))
    assert not np.array_equal(group_folds(labels, groups, 5, 1), group_folds(labels, groups, 5, 2))


def test_fewer_groups_than_folds():
    fold = group_folds([0, 0, 1, 1], [7, 7, 9, 9], 5)
    assert sorted(set(fold.tolist())) == [0, 1]
    assert fold[0] == fold[1] != fold[2]


def test_photos_of_a_group_and_copies_share_a_number():
    photos = [("a", "00"), (None, "01"), ("a", "02"), ("", "01"), ("b", "03"), (None, "a")]
    numbers = group_numbers(photos).tolist()
    assert numbers[0] == numbers[2]
    assert numbers[1] == numbers[3]
    assert len(set(numbers)) == 4
    assert group_numbers([]).shape == (0,)


def test_numbers_follow_the_order_of_groups_and_contents():
    photos = [("b", "00"), (None, "ff"), (None, "0a"), ("a", "01"), (None, "0a")]
    assert group_numbers(photos).tolist() == [3, 1, 0, 2, 0]
