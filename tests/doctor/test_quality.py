import cv2
import numpy as np
import pytest
from planted import picture

from finetune_cli.doctor.quality import faults, measure

SHARP = np.array(picture(0))


def told(photo, width=300, height=200):
    usual = measure(SHARP, 300, 200).sharpness
    return faults(measure(photo, width, height), usual)


def test_a_usual_photo_has_no_fault():
    assert told(SHARP) == []


@pytest.mark.parametrize(
    ("photo", "fault"),
    [
        (np.full_like(SHARP, 120), "blank: all of it is grey level 120, +/- 0"),
        (np.where(SHARP > 215, 160, 2).astype(np.uint8), "nearly black"),
        (np.where(SHARP > 215, 100, 252).astype(np.uint8), "nearly white"),
        (cv2.GaussianBlur(SHARP, (0, 0), 6), "blurred"),
    ],
    ids=["blank", "black", "white", "blurred"],
)
def test_technical_trouble_is_named(photo, fault):
    found = told(photo)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_contrast_is_not_sharpness():
    assert told((100 + 0.3 * SHARP).astype(np.uint8)) == []


def test_sizes_and_shapes_of_files_are_named():
    assert told(SHARP, 40, 30) == ["tiny: 40 x 30 pixels"]
    assert told(SHARP, 200, 900) == ["odd shape: 200 x 900 pixels"]
    assert told(SHARP, 300, 100) == []
