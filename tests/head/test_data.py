"""What a head is fitted on."""

import numpy as np

from finetune_cli.head.data import views_in_turn


def test_every_photo_takes_all_views_in_turn_from_a_first_one_of_its_own():
    epochs = np.stack([views_in_turn(200, 4, 7, epoch) for epoch in range(8)])
    assert (np.sort(epochs[:4], axis=0) == np.arange(4)[:, None]).all()
    np.testing.assert_array_equal(epochs[4:], epochs[:4])
    np.testing.assert_array_equal(epochs[1], (epochs[0] + 1) % 4)
    assert set(np.unique(epochs[0], return_counts=True)[1] // 10) <= {3, 4, 5, 6}  # of 50 each on average
    assert not np.array_equal(epochs[0], views_in_turn(200, 4, 8, 0))
    np.testing.assert_array_equal(epochs[0], views_in_turn(200, 4, 7, 0))
