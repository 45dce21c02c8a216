"""The two saved forms of a model: proven, and on the disk whole or not at all."""

import warnings

import numpy as np
import pytest
import runs_fixture

from finetune_cli.errors import GateError, StorageError
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.training import outputs

PHOTOS = np.random.default_rng(0).integers(0, 256, (3, runs_fixture.SIZE, runs_fixture.SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(1)
    head = Head(rng.normal(size=(24, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32))
    return runs_fixture.with_head(runs_fixture.tiny_backbone(), head)


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(model(PHOTOS.astype(np.float32), training=False))


def save(folder, model, expected):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # inside Keras
        return outputs.save_models(folder, model, PHOTOS, expected)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_answers_alike(model, expected, tmp_path):
    parity = save(tmp_path, model, expected)
    assert parity.photos == 3
    assert max(parity.openvino_against_keras, parity.openvino_against_measured) < 1e-5
    assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]
    with pytest.raises(GateError, match="disagrees with the trained one"):
        save(tmp_path, model, expected[:, ::-1])


def test_a_write_that_fails_leaves_neither_half_a_folder_nor_litter(model, expected, tmp_path, monkeypatch):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "model.bin").write_bytes(b"of a killed training")

    def fail(_model, path, **_options):
        path.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("a stream broke")

    monkeypatch.setattr(runtimes.import_openvino(), "save_model", fail)
    with pytest.raises(StorageError, match=r"inference cannot be written \(\d"):
        save(tmp_path, model, expected)
    assert names(tmp_path) == ["model.keras"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    monkeypatch.undo()
    save(tmp_path, model, expected)
    assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]


def test_the_folder_appears_when_it_is_whole(model, expected, tmp_path, monkeypatch):
    ov, seen = runtimes.import_openvino(), []
    write = ov.save_model

    def watched(model, path, **options):
        seen.append((tmp_path / "inference").exists())
        write(model, path, **options)
        seen.append((tmp_path / "inference").exists())

    monkeypatch.setattr(ov, "save_model", watched)
    save(tmp_path, model, expected)
    assert seen == [False, False]
    assert (tmp_path / "inference" / "model.xml").is_file()
