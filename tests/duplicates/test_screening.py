import numpy as np
import pytest
from planted import KINDS, copy, picture, pixels

from finetune_cli.duplicates.screening import Screening
from finetune_cli.duplicates.thumbnails import SIDE, thumbnail


def screened(*pairs):
    """What becomes of pairs of pictures."""
    thumbnails = np.stack([thumbnail(pixels(image)) for pair in pairs for image in pair])
    return Screening(thumbnails, 2).screened(np.arange(len(thumbnails)).reshape(-1, 2))


@pytest.mark.parametrize("kind", [*KINDS, "cropped to 70 %"])
def test_copies_pass_and_it_is_told_whether_they_are_mirrored(kind):
    found = screened(*((picture(seed), copy(picture(seed), kind)) for seed in range(5)))
    assert found.passing.all()
    assert (found.mirrored == (kind == "mirrored")).all()


def test_most_pairs_of_different_pictures_do_not_pass():
    found = screened(*((picture(a), picture(b)) for a in range(30) for b in range(a)))
    assert found.passing.mean() < 0.25


def test_there_may_be_no_pairs_and_blank_frames_do_not_pass():
    screening = Screening(np.full((2, SIDE, SIDE), 128, np.uint8), 1)
    assert not screening.screened(np.array([[0, 1]])).passing.any()
    assert len(screening.screened(np.zeros((0, 2), int)).passing) == 0


def test_the_correlation_is_the_one_of_opencv():
    """Of a middle at scale 1 in a scene, at every place where it fits."""
    import cv2

    from finetune_cli.duplicates import screening as module
    from finetune_cli.duplicates.alignment import margin, smaller

    thumbnails = np.stack([thumbnail(pixels(picture(seed))) for seed in (1, 2)])
    scene = smaller(thumbnails[0], 16, 1.5)
    expected = -1.0
    for side in module._SIDES:
        inside = slice(margin(side), side - margin(side))
        middle = np.ascontiguousarray(smaller(thumbnails[1], side, 1.5)[inside, inside])
        expected = max(expected, float(cv2.matchTemplate(scene, middle, cv2.TM_CCOEFF_NORMED).max()))
    found = Screening(thumbnails, 1)._correlations(np.array([0]), np.array([1]))
    assert found[0, 0] == pytest.approx(expected, abs=2e-3)
