import numpy as np
from planted import copy, picture, pixels
from scipy.fft import dctn

from finetune_cli.duplicates.hashes import hashes, mirrored
from finetune_cli.duplicates.thumbnails import thumbnail


def test_a_hash_holds_the_low_frequencies_of_scipys_dct():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 48, 48)).astype(np.uint8)
    for found, pixels_ in zip(hashes(pictures), pictures, strict=True):
        # SciPy's unscaled DCT-II is twice this one in each direction.
        expected = dctn(pixels_.astype(np.float64), type=2)[:8, :8].ravel()[1:]
        assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-5)


def test_the_mirrored_hash_is_that_of_the_mirrored_picture():
    pictures = np.random.default_rng(1).integers(0, 256, (5, 48, 48)).astype(np.uint8)
    assert np.allclose(mirrored(hashes(pictures)), hashes(pictures[:, :, ::-1]), atol=1e-5)


def test_a_blank_picture_resembles_nothing():
    assert np.all(hashes(np.full((1, 48, 48), 200, np.uint8)) == 0)


def test_resizing_and_brightness_hardly_change_a_hash():
    original = picture(3)
    kinds = ("half the size", "brightened", "compressed")
    images = [original, *(copy(original, kind) for kind in kinds), picture(4)]
    found = hashes(np.stack([thumbnail(pixels(image)) for image in images]))
    cosines = found[0] @ found.T
    assert np.all(cosines[1:4] > 0.97)
    assert cosines[4] < 0.7
