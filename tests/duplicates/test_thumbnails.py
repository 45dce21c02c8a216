import numpy as np
import pytest

from finetune_cli.duplicates import thumbnails
from finetune_cli.duplicates.thumbnails import SIDE
from finetune_cli.photos.decode import ImageSettings


def test_a_thumbnail_is_the_mean_of_blocks():
    rng = np.random.default_rng(0)
    photo = np.repeat(rng.integers(0, 256, (4 * SIDE, 4 * SIDE, 1)), 3, axis=2).astype(np.uint8)
    means = photo[:, :, 0].reshape(SIDE, 4, SIDE, 4).mean(axis=(1, 3))
    assert np.abs(thumbnails.thumbnail(photo) - means).max() <= 1


@pytest.mark.parametrize(("colour", "grey"), [((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)])
def test_the_grey_of_colours_is_their_luma(colour, grey):  # 0.299, 0.587 and 0.114 of 255
    photo = np.full((64, 64, 3), colour, np.uint8)
    assert np.all(thumbnails.thumbnail(photo) == grey)


def test_packed_thumbnails_come_back_bit_by_bit():
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
    row = thumbnails.packed(pixels)
    assert row.dtype == np.float32
    assert np.array_equal(thumbnails.unpacked(row), pixels)


def test_what_is_no_thumbnail_is_not_taken_for_one():
    assert thumbnails.unpacked(None) is None
    assert thumbnails.unpacked(np.zeros(1280, np.float32)) is None


def test_the_key_depends_on_what_the_pixels_depend_on():
    keys = {
        thumbnails.key(digest, ImageSettings(size, resize))
        for digest in ("a", "b")
        for size in (224, 160)
        for resize in ("crop", "pad")
    }
    assert len(keys) == 8
    assert thumbnails.key("a", ImageSettings(max_pixels=5)) == thumbnails.key("a", ImageSettings(max_pixels=6))
