import numpy as np
import pytest
from planted import KINDS, copy, picture, pixels

from finetune_cli.duplicates.alignment import Alignment
from finetune_cli.duplicates.thumbnails import SIDE, thumbnail


def score(*images):
    return Alignment(np.stack([thumbnail(pixels(image)) for image in images])).score(0, 1)


@pytest.mark.parametrize("kind", [*KINDS, "cropped to 70 %"])
def test_copies_fit_over_the_original(kind):
    scores = [score(picture(seed), copy(picture(seed), kind)) for seed in range(5)]
    assert min(scores) > 0.7


def test_it_does_not_matter_which_one_is_the_crop():
    original = picture(1)
    crop = copy(original, "cropped to 90 %")
    assert score(original, crop) == pytest.approx(score(crop, original), abs=0.02)


def test_different_pictures_do_not_fit():
    assert max(score(picture(a), picture(b)) for a in range(6) for b in range(a)) < 0.5


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_blank_frames_resemble_nothing(grey):
    blank = np.full((2, SIDE, SIDE), grey, np.uint8)
    assert Alignment(blank).score(0, 1) == 0
    nearly = blank.copy()
    nearly[1, 10, 10] ^= 1
    assert Alignment(nearly).score(0, 1) == 0


def test_a_line_and_noise_are_no_reason_to_fail():
    stripes = np.zeros((SIDE, SIDE), np.uint8)
    stripes[:, ::2] = 255
    dot = np.zeros((SIDE, SIDE), np.uint8)
    dot[20:28, 20:28] = 255
    alignment = Alignment(np.stack([stripes, dot, stripes.T]))
    for a in range(3):
        for b in range(a):
            assert 0 <= alignment.score(a, b) + 1 <= 2.0001
