"""Pipes, sockets, devices and folders in the places of files: refused at once, in a line, whatever waits at their end.

Every test has an alarm: a command that opens a pipe and waits would never come back.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from built import built
from manifest_example import export_manifest
from paths import SOURCE

from finetune_cli import files
from finetune_cli.cache.digests import DigestCache
from finetune_cli.cache.features import FeatureStore, info
from finetune_cli.config.load import load_config
from finetune_cli.errors import BadImage, ConfigError, DataError, FinetuneError, RunError, StorageError, WeightsError
from finetune_cli.evaluation.photos import pixels
from finetune_cli.exports import manifest, opening
from finetune_cli.exports.card import Card
from finetune_cli.inference import predict
from finetune_cli.photos import decode, folders, scan
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.runs import checkpoints
from finetune_cli.runs.run import Run
from finetune_cli.untrusted import hdf5, keras_archive, openvino_ir

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX has pipes and devices with names")

SECONDS = 20
KINDS = {"pipe": "a pipe", "socket": "a socket", "device": "a device", "folder": "a folder"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


@pytest.fixture(autouse=True)
def alarm():
    def ring(_number, _frame):
        raise AssertionError(f"it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def place(path: Path, kind: str) -> Path:
    """Something of that kind called `path`; the device is a link to one, because only root can make others."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # the address of a socket has 108 bytes at most
        try:
            with socket.socket(socket.AF_UNIX) as bound:  # the name stays
                bound.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


def in_place_of(path: Path, kind: str) -> None:
    """The same, in the place of an existing file."""
    path.unlink()
    place(path, kind)


kinds = pytest.mark.parametrize("kind", KINDS)


# What a person names


@kinds
def test_a_config(tmp_path, kind):
    path = place(tmp_path / "config.yaml", kind)
    with pytest.raises(ConfigError, match=KINDS[kind]) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_table_of_photos(tmp_path, kind):
    with pytest.raises(DataError, match=r"photos\.csv is neither a folder nor a regular file"):
        folders.read(place(tmp_path / "photos.csv", kind))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_table_that_is_replaced_after_it_was_looked_at(tmp_path, kind, monkeypatch):
    path = place(tmp_path / "photos.csv", kind)
    monkeypatch.setattr(Path, "is_file", lambda _self: True)
    with pytest.raises(DataError, match=f"it is {KINDS[kind]}, not a regular file"):
        folders.read(path)


@kinds
def test_a_photo(tmp_path, kind):
    path = place(tmp_path / "photo.jpg", kind)
    sample = Sample(path, path.name, 0, "00" * 32)
    for read in (
        lambda: decode.read_header(path, 10**6),
        lambda: decode.decode(path, ImageSettings()),
        lambda: scan.decode_sample(sample, ImageSettings()),
        lambda: pixels(sample, ImageSettings()),
    ):
        with pytest.raises(
            BadImage, match="this is a folder" if kind == "folder" else f"it is {KINDS[kind]}, not a reg"
        ):
            read()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_photos_to_predict(tiny_run, tmp_path, kind):
    good = next(iter(sorted(tiny_run.photos.rglob("*.png"))))
    paths = [place(tmp_path / "photo.jpg", kind), good]
    bad, answer = predict.predict(predict.RunPredictor(tiny_run.run, workers=1), paths, 3)
    assert bad.error == f"it is {KINDS[kind]}, not a regular file"
    assert answer.label is not None


@kinds
def test_weights_and_models(tmp_path, kind):
    def open_weights():
        with hdf5.open_file(place(tmp_path / "weights.h5", kind)):
            pass

    for read in (
        open_weights,
        lambda: keras_archive.load_keras_file(place(tmp_path / "backbone.keras", kind)),
        lambda: built(place(tmp_path / "other.keras", kind), None, 64),
    ):
        with pytest.raises(FinetuneError):
            read()
    with pytest.raises(OSError, match=KINDS[kind]):
        files.has_digest(place(tmp_path / "keras.h5", kind), "00" * 16)
    with pytest.raises(RunError, match=KINDS[kind]):
        openvino_ir.read_files(place(tmp_path / "model.xml", kind))


@pytest.mark.parametrize("suffix", [".onnx", ".tflite", ".xml", ".keras"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_an_exported_file_alone(tmp_path, kind, suffix):
    with pytest.raises(WeightsError, match="there is no model"):
        opening.open_model(place(tmp_path / f"model{suffix}", kind), 1)


# Our own files


@kinds
def test_every_file_of_a_run(tiny_run, tmp_path, kind):
    copy = Path(shutil.copytree(tiny_run.run.folder, tmp_path / "run"))
    run = Run.load(copy)
    for name in run.manifest.files:
        in_place_of(copy / name, kind)
        for read in (run.file, run.read):
            with pytest.raises(RunError, match="is a symbolic link" if kind == "device" else KINDS[kind]) as caught:
                read(name)
            assert name in caught.value.problem
    in_place_of(copy / "run.json", kind)
    with pytest.raises(RunError, match=r"run\.json"):
        Run.load(copy)


@kinds
def test_every_file_of_a_checkpoint(tmp_path, kind):
    for name in (checkpoints.ARRAYS, checkpoints.STATE, checkpoints.SUMS):
        path = checkpoints.save(tmp_path / "checkpoints", 1, {"a": np.ones(2)}, {}, best=True)
        in_place_of(path / name, kind)
        with pytest.raises(FinetuneError, match=name):
            checkpoints.load(path)
        with pytest.raises(FinetuneError, match="no checkpoint is whole"):
            checkpoints.load_latest(tmp_path / "checkpoints")


@kinds
def test_every_file_of_an_export(tmp_path, kind):
    for name in ("model.onnx", "classes.json", "manifest.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for listed in ("model.onnx", "classes.json"):
            (folder / listed).write_bytes(b"{}")
        digest = files.sha256(folder / "model.onnx")
        listed_files = {"model.onnx": digest, "classes.json": digest}
        files.write_json(
            folder / "manifest.json",
            export_manifest(listed_files),
        )
        assert manifest.verify(folder)
        in_place_of(folder / name, kind)
        with pytest.raises(WeightsError, match=name):
            manifest.verify(folder)
        if name == "classes.json":
            with pytest.raises(WeightsError, match=name):
                Card.read(folder)


@pytest.mark.parametrize("name", ["features.sqlite", "features.sqlite-wal", "digests.sqlite", "digests.sqlite-journal"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_every_file_of_the_cache(tmp_path, kind, name):
    place(tmp_path / name, kind)
    info(tmp_path)
    with FeatureStore(tmp_path) as store, DigestCache(tmp_path) as digests:
        store.put([(b"k" * 32, np.ones(4, np.float32))])
        assert store.get([b"k" * 32])
        warnings = [*store.warnings, *digests.warnings]
    assert any(name in warning or "digests" in warning for warning in warnings)


@kinds
@pytest.mark.parametrize("name", [".lock", ".lock-holder"])
def test_the_files_of_a_lock(tmp_path, kind, name):
    place(tmp_path / name, kind)
    if name == ".lock" and kind != "device":
        with pytest.raises(StorageError, match=r"\.lock is not a regular file; remove it"), files.lock(tmp_path):
            pass
        return
    with files.lock(tmp_path), pytest.raises(RunError, match="in use by"), files.lock(tmp_path):
        pass


# The commands, from outside


def finetune(*arguments: object, stdin: int | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "finetune_cli", *map(str, arguments)],
        env=ENVIRONMENT,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_a_pipe_as_the_config_of_a_command(tmp_path):
    place(tmp_path / "pipe", "pipe")
    answer = finetune("train", tmp_path / "pipe")
    assert answer.returncode == 2
    assert "it is a pipe, not a regular file" in answer.stderr
    assert "save it as a YAML file" in answer.stderr


def test_standard_input_as_a_config(tmp_path):
    """A pipe is refused; a file that the shell opened is a file."""
    reader, writer = os.pipe()
    answer = finetune("check", "/dev/stdin", stdin=reader)
    os.close(writer)
    os.close(reader)
    assert answer.returncode == 2
    assert "it is a pipe, not a regular file" in answer.stderr
    (tmp_path / "config.yaml").write_text("data: {train: /nowhere}\n")
    with (tmp_path / "config.yaml").open("rb") as file:
        answer = finetune("check", "/dev/stdin", stdin=file.fileno())
    assert answer.returncode == 3, answer.stderr
    assert "/nowhere does not exist" in answer.stderr
