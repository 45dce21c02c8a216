"""`preview`: photos by rows, views by columns, whatever the photos and their names."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune_cli.errors import DataError
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.training import preview

SETTINGS = ImageSettings(size=64)
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def dataset(folder: Path, photos_per_class: int = 4) -> Dataset:
    """Photos of one plain colour for each class, darker from photo to photo."""
    samples = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(photos_per_class):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 60), tuple(part - 5 * number for part in colour)).save(path)
            samples.append(Sample(path, f"{name}/{path.name}", label, f"{label}{number}"))
    return Dataset(tuple(COLOURS), tuple(samples), (), (), (), (), (), {"train": folder})


def sheet(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def cells(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    """How many cells' worth of pixels have nearly this colour."""
    near = (np.abs(pixels.astype(int) - colour) < 30).all(axis=2)
    return round(near.sum() / preview._CELL**2)


def test_photos_by_rows_views_by_columns(tmp_path: Path) -> None:
    augmenter = Augmenter({"horizontal_flip": True, "width_shift_range": 0.2}, 3, 0, 64)
    written = preview.contact_sheet(dataset(tmp_path), augmenter, SETTINGS, tmp_path / "out" / "sheet.png", photos=4)
    assert written == tmp_path / "out" / "sheet.png"
    pixels = sheet(written)
    assert cells(pixels, COLOURS["red"]) == 2 * 3, "two photos of each class, three views of each"
    assert cells(pixels, COLOURS["blue"]) == 2 * 3


def test_the_columns_hold_what_training_sees(tmp_path: Path) -> None:
    augmenter = Augmenter({"brightness_range": [0.1, 0.2]}, 2, 0, 64)
    pixels = sheet(preview.contact_sheet(dataset(tmp_path), augmenter, SETTINGS, tmp_path / "sheet.png", photos=2))
    assert cells(pixels, COLOURS["red"]) == 1, "view 0 is bright"
    factor = augmenter.draw("00", 1).brightness
    assert factor is not None
    row, column = preview._HEADER + 80, preview._MARGIN + preview._LABELS + preview._CELL + preview._GAP + 80
    assert np.abs(pixels[row, column] - np.array(COLOURS["red"]) * factor).max() < 2


def test_without_a_transform_there_is_one_column_and_it_says_so(tmp_path: Path) -> None:
    augmenter = Augmenter({}, 5, 0, 64)
    pixels = sheet(preview.contact_sheet(dataset(tmp_path), augmenter, SETTINGS, tmp_path / "sheet.png"))
    assert cells(pixels, COLOURS["red"]) == 3
    assert preview._title(augmenter) == "no transform is active: each photo has one view"


def test_the_title_names_the_transforms() -> None:
    augmenter = Augmenter({"horizontal_flip": True, "zoom_range": [0.8, 1.2], "fill_mode": "wrap"}, 5, 0, 64)
    assert preview._title(augmenter) == "horizontal_flip, zoom_range [0.8, 1.2], fill_mode wrap"


def test_more_views_than_fit_are_cut(tmp_path: Path) -> None:
    augmenter = Augmenter({"horizontal_flip": True}, 50, 0, 64)
    pixels = sheet(preview.contact_sheet(dataset(tmp_path), augmenter, SETTINGS, tmp_path / "sheet.png", photos=2))
    assert cells(pixels, COLOURS["red"]) == preview.MAX_VIEWS


def test_a_bad_photo_is_left_out_and_odd_names_are_shown(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data.train[0].path.write_bytes(b"broken")
    odd = Sample(data.train[1].path, "red/\udcff\n\u202e" + 100 * "long" + ".png", 0, "odd")
    data = Dataset(data.classes, (data.train[0], odd, *data.train[4:]), (), (), (), (), (), data.roots)
    pixels = sheet(preview.contact_sheet(data, Augmenter({}, 1, 0, 64), SETTINGS, tmp_path / "sheet.png", photos=2))
    assert cells(pixels, COLOURS["red"]) + cells(pixels, COLOURS["blue"]) == 2


def test_only_bad_photos_are_an_error(tmp_path: Path) -> None:
    data = dataset(tmp_path, 1)
    for sample in data.train:
        sample.path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of the training photos"):
        preview.contact_sheet(data, Augmenter({}, 1, 0, 64), SETTINGS, tmp_path / "sheet.png")
