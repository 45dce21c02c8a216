"""`init`: a config that says what was found and trains as it is."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from finetune_cli import files
from finetune_cli.cache import folder
from finetune_cli.config.load import load_config
from finetune_cli.config.schema import Config
from finetune_cli.errors import DataError
from finetune_cli.photos.dataset import Dataset
from finetune_cli.progress import Silent
from finetune_cli.training import prepare, settings
from finetune_cli.training import starter_config as module
from finetune_cli.training.starter_config import starter_config, yaml_text


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photos(folder: Path, number: int, size: tuple[int, int] = (40, 30)) -> None:
    rng = np.random.default_rng([zlib.crc32(folder.name.encode()), zlib.crc32(folder.parent.name.encode())])
    folder.mkdir(parents=True)
    for index in range(number):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def indexed(config: Config) -> Dataset:
    return prepare.index(settings.data_settings(config), folder.locate(config.runtime.cache_dir), Silent())


def test_the_config_loads_and_its_photos_are_found_from_there(tmp_path: Path) -> None:
    photos(tmp_path / "my photos" / "cat", 8)
    photos(tmp_path / "my photos" / "dög", 6)
    target = tmp_path / "configs" / "pets.yaml"
    text = starter_config(tmp_path / "my photos", target, Silent())
    files.write_text(target, text)
    loaded = load_config(target)
    assert yaml.safe_load(text)["data"]["train"] == "../my photos"
    assert loaded.data.train == tmp_path / "my photos"
    assert loaded.model.backbone == "efficientnet_lite0"
    assert loaded.augmentation is not None
    assert loaded.augmentation.horizontal_flip
    data = indexed(loaded)
    assert data.classes == ("cat", "dög")
    assert len(data.train) + len(data.val) == 14


def test_few_photos_are_cross_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "set" / "cat", 8)
    photos(tmp_path / "set" / "dog", 6)
    target = tmp_path / "config.yaml"
    text = starter_config(tmp_path / "set", target, Silent())
    files.write_text(target, text)
    assert load_config(target).data.folds == 5
    assert "Found 14 photos of 2 classes: 14 for training, and for validation in 5 folds." in text
    assert len(indexed(load_config(target)).train) == 14
    monkeypatch.setattr(module, "FEW_PHOTOS", 14)
    assert "folds" not in yaml.safe_load(starter_config(tmp_path / "set", target, Silent()))["data"]


def test_photos_that_validate_already_and_photos_that_fill_no_folds_get_none(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        photos(tmp_path / "few" / name, 2)
        for split in ("train", "val"):
            photos(tmp_path / "set" / split / name, 8)
    for name in ("set", "few"):
        assert "folds" not in yaml.safe_load(starter_config(tmp_path / name, tmp_path / "c.yaml", Silent()))["data"]


def test_the_head_says_that_the_split_is_not_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "set" / "cat", 8)
    photos(tmp_path / "set" / "dog", 8)
    line = (
        "# Train may split the photos a little differently: it looks for near-duplicates and keeps them on one side.\n"
    )
    assert line not in starter_config(tmp_path / "set", tmp_path / "c.yaml", Silent())  # in folds
    monkeypatch.setattr(module, "FEW_PHOTOS", 0)
    assert line in starter_config(tmp_path / "set", tmp_path / "c.yaml", Silent())


def test_the_head_tells_what_was_found(tmp_path: Path) -> None:
    photos(tmp_path / "set" / "train" / "cat", 8, (400, 300))
    photos(tmp_path / "set" / "train" / "dog", 6, (400, 300))
    photos(tmp_path / "set" / "val" / "cat", 2)
    photos(tmp_path / "set" / "val" / "dog", 3)
    photos(tmp_path / "set" / "test" / "cat", 1)
    photos(tmp_path / "set" / "test" / "dog", 1)
    text = starter_config(tmp_path / "set", tmp_path / "config.yaml", Silent())
    head = text.partition("data:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert "Found 21 photos of 2 classes: 14 for training, 5 for validation, 2 for test." in head
    assert "Typical size: 400 x 300 pixels." in head
    assert "#   cat      11\n#   dog      10\n" in head
    assert "if a mirrored photo would be wrong: text, traffic signs" in text


def test_a_csv_will_do(tmp_path: Path) -> None:
    photos(tmp_path / "all", 10)
    rows = [f"all/{index}.png,{'odd' if index % 2 else 'even'}" for index in range(10)]
    (tmp_path / "labels.csv").write_text("image_path,label\n" + "\n".join(rows) + "\n")
    target = tmp_path / "config.yaml"
    files.write_text(target, starter_config(tmp_path / "labels.csv", target, Silent()))
    assert indexed(load_config(target)).classes == ("even", "odd")


def test_bad_photos_are_reported_and_skipped(tmp_path: Path) -> None:
    photos(tmp_path / "set" / "cat", 20)
    photos(tmp_path / "set" / "dog", 20)
    (tmp_path / "set" / "dog" / "broken.jpg").write_bytes(b"not a photo")
    target = tmp_path / "config.yaml"
    text = starter_config(tmp_path / "set", target, Silent())
    assert "1 cannot be read, such as dog/broken.jpg: " in text
    files.write_text(target, text)
    assert load_config(target).data.on_bad_image == "skip"


def test_too_many_bad_photos_are_reported(tmp_path: Path) -> None:
    photos(tmp_path / "set" / "cat", 5)
    photos(tmp_path / "set" / "dog", 5)
    for i in range(2):
        (tmp_path / "set" / "dog" / f"broken-{i}.jpg").write_bytes(b"not a photo")
    with pytest.raises(DataError, match="2 of 12 photos cannot be used, which is more than"):
        starter_config(tmp_path / "set", tmp_path / "config.yaml", Silent())


@pytest.mark.parametrize(("number", "balanced"), [(10, "none"), (40, "balanced")])
def test_rare_classes_get_more_weight(number: int, balanced: str, tmp_path: Path) -> None:
    photos(tmp_path / "set" / "common", number)
    photos(tmp_path / "set" / "rare", 10)
    target = tmp_path / "config.yaml"
    files.write_text(target, starter_config(tmp_path / "set", target, Silent()))
    assert load_config(target).training.class_weights == balanced


def test_a_folder_that_cannot_be_trained_on_is_an_error(tmp_path: Path) -> None:
    photos(tmp_path / "set" / "alone", 3)
    with pytest.raises(DataError):
        starter_config(tmp_path / "set", tmp_path / "config.yaml", Silent())


@pytest.mark.parametrize(
    "text",
    [
        *("photos", "../a/b-c.d", "a b", "null", "yes", "1e5", "12", "", "#1", "a: b", 'say "hi"', "back\\slash"),
        *("Å/猫/🐱", "line\nbreak", "tab\t", "\udcff raw byte", "- x", "\u2028", "~"),
    ],
)
def test_any_path_survives_yaml(text: str) -> None:
    assert yaml.safe_load(f"key: {yaml_text(text)}  # comment") == {"key": text}
    assert yaml_text("../photos/train") == "../photos/train"
