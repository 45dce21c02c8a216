import contextlib
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from built import answers

from finetune_cli.errors import WeightsError
from finetune_cli.keras_setup import import_keras
from finetune_cli.untrusted.keras_archive import load_keras_file

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


@pytest.fixture(scope="module")
def source(keras: Any) -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(5, name="dense"),
        ]
    )


@pytest.fixture
def good(tmp_path: Path, source: Any) -> Path:
    source.save(tmp_path / "good.keras")
    return tmp_path / "good.keras"


def rewrite(path: Path, config: Change | None = None, **members: bytes) -> Path:
    """A copy of a .keras file with another description, or with members replaced or added."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    if config:
        description = json.loads(content["config.json"])
        config(description)
        content["config.json"] = json.dumps(description).encode()
    target = path.with_name("changed.keras")
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in (content | members).items():
            archive.writestr(name, data)
    return target


def refused(path: Path, message: str) -> str:
    """The one line that refuses `path`, in less than 5 seconds."""
    start = time.monotonic()
    with pytest.raises(WeightsError, match=message) as caught:
        load_keras_file(path)
    assert time.monotonic() - start < 5
    assert "\n" not in caught.value.problem
    assert str(path) in caught.value.problem
    return caught.value.problem


def layer(description: dict[str, Any], name: str) -> dict[str, Any]:
    found = next(item for item in description["config"]["layers"] if item["config"]["name"] == name)
    assert isinstance(found, dict)
    return found


def test_a_good_file_gives_the_model_back(good: Path, source: Any):
    model = load_keras_file(good)
    photos = np.random.default_rng(0).random((2, 8, 8, 3))
    np.testing.assert_array_equal(answers(model, photos), answers(source, photos))


def test_only_regular_keras_files(good: Path, tmp_path: Path):
    refused(tmp_path / "absent.keras", "no file")
    (tmp_path / "folder.keras").mkdir()
    refused(tmp_path / "folder.keras", "not a regular file")
    os.mkfifo(tmp_path / "pipe.keras")
    refused(tmp_path / "pipe.keras", "not a regular file")
    good.rename(tmp_path / "model.h5")
    refused(tmp_path / "model.h5", "is not a .keras file")
    (tmp_path / "text.keras").write_text("no archive")
    refused(tmp_path / "text.keras", "cannot be read")


def test_a_lambda_layer(good: Path, keras: Any, tmp_path: Path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "lambda.keras")
    assert "contains a Lambda" in refused(tmp_path / "lambda.keras", "Lambda|__lambda__")


def test_a_layer_of_somebody_else(good: Path):
    def custom(description: dict[str, Any]) -> None:
        layer(description, "dense").update(module="evil.package", class_name="Dense", registered_name="Evil>Dense")

    refused(rewrite(good, custom), "needs Evil>Dense from evil.package")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("subprocess", "run"),
        ("keras.utils", "get_file"),
        ("keras.src.utils.file_utils", "get_file"),
        ("keras.saving", "load_model"),
        ("keras.config", "enable_unsafe_deserialization"),
        ("keras", "__dict__"),
        ("builtins", "exec"),
    ],
)
def test_a_function_as_activation(good: Path, module: str, name: str):
    def gadget(description: dict[str, Any]) -> None:
        layer(description, "dense")["config"]["activation"] = {
            "module": module,
            "class_name": "function",
            "config": name,
            "registered_name": name,
        }

    refused(rewrite(good, gadget), "needs|cannot be read")


def test_a_file_that_asks_for_a_petabyte(good: Path):
    def bomb(description: dict[str, Any]) -> None:
        layer(description, "dense")["config"]["units"] = 10**14
        layer(description, "dense")["build_config"] = {"input_shape": [None, 4]}

    problem = refused(rewrite(good, bomb), "describes a model of")
    assert f"{4 * 10**14 + 10**14 + 3 * 9 * 4 + 4 + 16:,} weights" in problem


def test_a_build_that_fails(good: Path):
    def shape(description: dict[str, Any]) -> None:
        layer(description, "conv")["config"]["kernel_size"] = [50, 50]

    refused(rewrite(good, shape), "cannot be read as a .keras model")


def test_archives_that_unpack_to_much_more_than_they_hold(good: Path, tmp_path: Path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("metadata.json", "config.json"):
            archive.writestr(name, "{}")
        archive.writestr("model.weights.h5", bytes(200 << 20))
    refused(path, "model.weights.h5 unpacks to 209,715,200 bytes")


def test_members_that_do_not_belong(good: Path):
    refused(rewrite(good, **{"assets/vocabulary.txt": b"x"}), "does not hold exactly")
    refused(rewrite(good, **{"../escaped": b"x"}), "does not hold exactly")
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("config.json", "{}")
    refused(good, "does not hold exactly")


@pytest.mark.parametrize(
    "description", [b"", b"{", b"[]", b"{}", b'{"class_name": 3}', b"[" * 100_000, b"\xff\xfe", b"NaN", b'"Sequential"']
)
def test_descriptions_that_are_invalid(good: Path, description: bytes):
    refused(rewrite(good, **{"config.json": description}), "cannot be read|needs|is not a model")


def test_links_in_the_weights(good: Path, tmp_path: Path):
    weights = tmp_path / "weights.h5"
    with zipfile.ZipFile(good) as archive:
        weights.write_bytes(archive.read("model.weights.h5"))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["0"] = np.zeros((4, 5), np.float32)
    with h5py.File(weights, "r+") as file:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "0")
    refused(rewrite(good, **{"model.weights.h5": weights.read_bytes()}), "cannot be read")


def test_weights_that_are_missing_or_not_finite(good: Path, tmp_path: Path, keras: Any, source: Any):
    weights = tmp_path / "weights.h5"
    with zipfile.ZipFile(good) as archive:
        weights.write_bytes(archive.read("model.weights.h5"))
    with h5py.File(weights, "r+") as file:
        del file["layers/dense"]
    refused(rewrite(good, **{"model.weights.h5": weights.read_bytes()}), "cannot be read")
    broken = keras.models.clone_model(source)
    broken.get_layer("norm").moving_mean.assign([0, np.nan, 0, 0])
    broken.save(tmp_path / "nan.keras")
    assert "norm/moving_mean" in refused(tmp_path / "nan.keras", "not finite")


def test_every_truncation_and_flipped_bits(good: Path, tmp_path: Path, record_property: Any):
    data = good.read_bytes()
    path = tmp_path / "cut.keras"
    for sixteenth in range(16):
        path.write_bytes(data[: len(data) * sixteenth // 16])
        refused(path, "cannot be read")
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with contextlib.suppress(WeightsError):  # the archive's checksums do not cover its names and dates
            load_keras_file(path)
    record_property("tries", 16 + 40)
