import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from finetune_cli.errors import WeightsError
from finetune_cli.untrusted import hdf5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.h5"


def test_reads_what_is_plainly_there(path: Path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with h5py.File(path, "w") as file:
        file.create_dataset("layer/inner/kernel:0", data=values, compression="gzip")
    with hdf5.open_file(path) as file:
        np.testing.assert_array_equal(hdf5.array(file, "layer/inner/kernel:0", (2, 3)), values)


def test_text_attributes_whole_split_and_absent(path: Path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([b"a", b"b"])
        file.attrs["weight_names0"] = np.array([b"c"])
        file.attrs["weight_names1"] = np.array([b"d", b"e"])
        file.attrs["name"] = "conv"
        file.attrs["empty"] = np.array([])
    with hdf5.open_file(path) as file:
        assert hdf5.text_attribute(file, "layer_names") == ["a", "b"]
        assert hdf5.text_attribute(file, "weight_names") == ["c", "d", "e"]
        assert hdf5.text_attribute(file, "name") == ["conv"]
        assert hdf5.text_attribute(file, "empty") == []
        assert hdf5.text_attribute(file, "other") is None


def external_link(file: h5py.File, other: Path) -> None:
    file["kernel"] = h5py.ExternalLink(str(other), "kernel")


def soft_link(file: h5py.File, other: Path) -> None:
    file["elsewhere"] = np.zeros(4, np.float32)
    file["kernel"] = h5py.SoftLink("/elsewhere")


def external_storage(file: h5py.File, other: Path) -> None:
    file.create_dataset("kernel", (4,), np.float32, external=[(str(other), 0, 16)])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource(str(other), "kernel", (4,))
    file.create_virtual_dataset("kernel", layout)


@pytest.mark.parametrize("make", [external_link, soft_link, external_storage, virtual], ids=lambda make: make.__name__)
def test_data_from_elsewhere_is_refused(path: Path, tmp_path: Path, make):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["kernel"] = np.ones(4, np.float32)
    with h5py.File(path, "w") as file:
        make(file, other)
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match="refused"):
        hdf5.array(file, "kernel", (4,))


def test_a_link_to_a_pipe_is_seen_without_opening_it(path: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "w") as file:
        file["layers"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/")
    with hdf5.open_file(path) as file:
        assert hdf5.has(file, "layers")
        with pytest.raises(WeightsError, match="ExternalLink"):
            hdf5.member(file, "layers")


def test_a_shape_bomb_is_refused_before_it_is_read(path: Path):
    with h5py.File(path, "w") as file:
        file.create_dataset("kernel", (10**7, 10**6), np.float64, chunks=(1024, 1024), compression="gzip")
    assert path.stat().st_size < 10_000
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match=r"has shape \(10000000, 1000000\), expected"):
        hdf5.array(file, "kernel", (4, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(path: Path, value: float):
    with h5py.File(path, "w") as file:
        file["kernel"] = np.array([1, value], np.float32)
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match="kernel contains values that are not finite"):
        hdf5.array(file, "kernel", (2,))


def test_text_and_objects_are_not_numbers(path: Path):
    with h5py.File(path, "w") as file:
        file["kernel"] = np.array([b"ab", b"cd"])
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match="not an array of numbers"):
        hdf5.array(file, "kernel", (2,))


@pytest.mark.parametrize("name", ["", ".", "layer//kernel", "layer/./kernel", "layer/kernel/deeper", "none"])
def test_odd_paths_are_missing(path: Path, name: str):
    with h5py.File(path, "w") as file:
        file["layer/kernel"] = np.zeros(2)
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match="missing"):
        hdf5.member(file, name)


def test_a_huge_attribute_is_refused(path: Path):
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.create("layer_names", np.full(300_000, b"layer"))
    with hdf5.open_file(path) as file, pytest.raises(WeightsError, match="too large"):
        hdf5.text_attribute(file, "layer_names")


def test_files_that_are_not_hdf5(path: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="no weight file"), hdf5.open_file(path):
        pass
    with pytest.raises(WeightsError, match="no weight file"), hdf5.open_file(tmp_path):
        pass
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(WeightsError, match=r"weights\.h5 is damaged or not an HDF5 file"), hdf5.open_file(path):
        pass


def test_every_truncation_is_an_error_or_the_whole_truth(path: Path):
    values = np.random.default_rng(0).random(2000)
    with h5py.File(path, "w") as file:
        file["layer/kernel"] = values
    data = path.read_bytes()
    for part in range(16):
        path.write_bytes(data[: len(data) * part // 16])
        with pytest.raises(WeightsError), hdf5.open_file(path) as file:
            hdf5.array(file, "layer/kernel", (2000,))
