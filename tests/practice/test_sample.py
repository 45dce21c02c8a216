"""The drawn practice set: complete, varied, the same every time, and never over somebody's files."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune_cli.errors import UsageError
from finetune_cli.photos.decode import EXTENSIONS
from finetune_cli.practice import city, forest, sample

NUMBER = 30


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "set"
    sample.draw(folder, NUMBER)
    return folder


def test_layout(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == ["README.txt", "city", "forest"]
    for name in ("city", "forest"):
        assert [path.name for path in sorted((drawn / name).iterdir())] == [
            f"{name}-{number:03}.jpg" for number in range(1, NUMBER + 1)
        ]


def test_pictures_are_small_rgb_jpegs(drawn: Path) -> None:
    for path in drawn.glob("*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            assert min(image.size) >= 200
            assert max(image.size) == 320


def test_pictures_are_varied(drawn: Path) -> None:
    small = {path: np.asarray(Image.open(path).resize((32, 32)), dtype=np.float32) for path in drawn.glob("*/*.jpg")}
    for name in ("city", "forest"):
        pictures = [pixels for path, pixels in small.items() if path.parent.name == name]
        brightness = [pixels.mean() for pixels in pictures]
        assert max(brightness) - min(brightness) > 100, "day and night"
        nearest = [min(np.abs(one - other).mean() for other in pictures if other is not one) for one in pictures]
        assert min(nearest) > 3, "no two pictures are alike"
        assert min(pixels.std() for pixels in pictures) > 4, "no picture is empty"


def test_the_same_seed_draws_the_same_pictures(drawn: Path, tmp_path: Path) -> None:
    for path in sample.draw(tmp_path / "again", 2):
        assert path.read_bytes() == (drawn / path.parent.name / path.name).read_bytes()


def test_another_seed_draws_other_pictures(drawn: Path, tmp_path: Path) -> None:
    for path in sample.draw(tmp_path / "other", 2, seed=1):
        assert path.read_bytes() != (drawn / path.parent.name / path.name).read_bytes()


def test_it_says_that_they_are_drawings(drawn: Path) -> None:
    assert "drawings, not photos" in (drawn / "README.txt").read_text()
    assert ".txt" not in EXTENSIONS, "the README must not be taken for a photo"


def test_progress_and_paths(tmp_path: Path) -> None:
    steps: list[int] = []
    written = sample.draw(tmp_path, 2, advance=steps.append)  # an empty folder that exists is fine
    assert steps == [1, 1, 1, 1]
    assert all(path.is_file() for path in written)
    assert len(set(written)) == 4


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is not empty"):
        sample.draw(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        sample.draw(tmp_path / "file", 2)


def test_an_interrupted_set_leaves_nothing(tmp_path: Path) -> None:
    def stop(_number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.draw(tmp_path / "set", 2, advance=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("paint", [city.paint, forest.paint])
def test_every_scene_can_be_painted(paint: object) -> None:
    assert callable(paint)
    for number in range(80):  # all compositions in all lights come up; any seed must give a picture
        picture = paint(random.Random(f"other {number}"))
        assert picture.mode == "RGB"
