import hashlib
import io
import json
import os
import subprocess
import zipfile

import numpy as np
import pytest
from file_faults import failing, inject, names, posix

from finetune_cli import files
from finetune_cli.errors import CheckpointError, StorageError
from finetune_cli.runs import checkpoints

FILES = ["SHA256SUMS", "arrays.npz", "state.json"]


def arrays(epoch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(epoch)
    return {
        "kernel": rng.normal(size=(5, 3)).astype(np.float32),
        "adam/m:0": rng.normal(size=(5, 3)).astype(np.float32),
        "dropout seed": np.array([epoch, 2**32 - 1], np.uint32),
        "iterations": np.int64(epoch * 10),
        "file": np.zeros((0, 4)),
        "classes": np.array(["bee", "Ämeise"]),
    }


def state(epoch: int) -> dict:
    return {
        "history": [{"loss": 0.1 + 0.2, "val": float("inf")}] * epoch,
        "classes": ["bee", "Ämeise"],
        "patience": None,
    }


def save(folder, epoch, best=False):
    return checkpoints.save(folder, epoch, arrays(epoch), state(epoch), best)


def assert_is(found, epoch):
    assert found.epoch == epoch
    assert found.state == state(epoch)
    assert list(found.arrays) == list(arrays(epoch))
    for name, array in arrays(epoch).items():
        np.testing.assert_array_equal(found.arrays[name], array, strict=True)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    path = save(tmp_path / "checkpoints", 7, best=True)
    assert path == tmp_path / "checkpoints" / "epoch-0007"
    assert names(path) == FILES
    found = checkpoints.load_latest(tmp_path / "checkpoints")
    assert_is(found, 7)
    assert found.best
    assert found.warnings == ()
    assert found.path == path


@posix
def test_the_sums_are_those_of_coreutils(tmp_path):
    path = save(tmp_path, 1)
    answer = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=True)
    assert answer.stdout == "arrays.npz: OK\nstate.json: OK\n"


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.load_latest(tmp_path) is None
    assert checkpoints.load_latest(tmp_path / "absent") is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for epoch in range(1, 7):
        save(tmp_path, epoch, best=epoch in {1, 3})
    assert names(tmp_path) == ["epoch-0003", "epoch-0005", "epoch-0006"]
    assert_is(checkpoints.load(tmp_path / "epoch-0003"), 3)
    save(tmp_path, 7, best=True)
    assert names(tmp_path) == ["epoch-0006", "epoch-0007"]


def test_of_a_finished_training_the_last_one_is_kept(tmp_path):
    for epoch in range(1, 5):
        path = save(tmp_path, epoch, best=epoch == 1)
    checkpoints.keep_only(path)
    assert names(tmp_path) == ["epoch-0004"]
    assert_is(checkpoints.load_latest(tmp_path), 4)


def test_beyond_ten_thousand_epochs_the_order_is_that_of_numbers(tmp_path):
    save(tmp_path, 9_999)
    save(tmp_path, 10_000)
    assert checkpoints.load_latest(tmp_path).epoch == 10_000


def test_a_checkpoint_of_the_same_epoch_is_replaced(tmp_path):
    save(tmp_path, 1)
    checkpoints.save(tmp_path, 2, {}, {"first": "try"}, best=False)
    save(tmp_path, 2)
    assert names(tmp_path) == ["epoch-0001", "epoch-0002"]
    assert_is(checkpoints.load_latest(tmp_path), 2)


def test_later_epochs_of_a_training_that_was_given_up_are_removed(tmp_path):
    for epoch in (3, 4, 5):
        save(tmp_path, epoch, best=epoch == 5)
    (tmp_path / "epoch-0005" / "arrays.npz").write_bytes(b"")
    (tmp_path / "epoch-0004" / "arrays.npz").write_bytes(b"")
    save(tmp_path, 4)
    assert names(tmp_path) == ["epoch-0004"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_each_sixteenth_is_passed_over(tmp_path, name, record_property):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(whole[: len(whole) * sixteenth // 16])
        found = checkpoints.load_latest(tmp_path)
        assert_is(found, 1)
        assert len(found.warnings) == 1
        assert "epoch-0002 is damaged" in found.warnings[0]
        assert "resuming from epoch-0001" in found.warnings[0]
        assert name in found.warnings[0]
    path.write_bytes(whole)
    assert_is(checkpoints.load_latest(tmp_path), 2)
    record_property("tries", 16)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_passed_over(tmp_path, name, record_property):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    bits = range(8 * len(whole)) if name == "SHA256SUMS" else rng.choice(8 * len(whole), 500, replace=False)
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = checkpoints.load_latest(tmp_path)
        assert found.epoch == 1
        assert name in found.warnings[0]
    record_property("tries", len(bits))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_passed_over(tmp_path, name):
    save(tmp_path, 1)
    (save(tmp_path, 2) / name).unlink()
    found = checkpoints.load_latest(tmp_path)
    assert_is(found, 1)
    assert name in found.warnings[0]


def test_files_swapped_between_checkpoints_are_passed_over(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / "arrays.npz").write_bytes((old / "arrays.npz").read_bytes())
    assert checkpoints.load_latest(tmp_path).epoch == 1
    save(tmp_path, 2)
    new.rename(tmp_path / "epoch-0009")
    found = checkpoints.load_latest(tmp_path)
    assert found.epoch == 1
    assert "it is the checkpoint of epoch 2" in found.warnings[0]


def test_when_none_is_whole_training_does_not_silently_start_over(tmp_path):
    for epoch in (1, 2):
        (save(tmp_path, epoch) / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_latest(tmp_path)
    assert "epoch-0001" in caught.value.problem
    assert "epoch-0002" in caught.value.problem
    assert str(tmp_path) in caught.value.remedy


@posix
def test_exit_at_every_step_of_saving_leaves_a_checkpoint_that_loads(tmp_path, record_property):
    start = tmp_path / "start"
    for epoch in range(1, 5):
        save(start, epoch, best=epoch == 1)
    steps = inject("checkpoint", start, tmp_path / "work")
    record_property("tries", steps)
    epochs = []
    for step in range(1, steps + 1):
        folder = tmp_path / "work" / str(step)
        found = checkpoints.load_latest(folder)
        assert found.warnings == (), "no half of a checkpoint ever has the name of one"
        if found.epoch == 4:
            assert_is(found, 4)
        else:
            np.testing.assert_array_equal(found.arrays["kernel"], np.full((3, 2), 5.0))
        assert_is(checkpoints.load(folder / "epoch-0001"), 1)
        epochs.append(found.epoch)
        save(folder, 6)  # and the next one clears the litter away
        assert names(folder) == [f"epoch-{epoch:04d}" for epoch in (1, found.epoch, 6)]
    assert epochs == sorted(epochs)
    assert set(epochs) == {4, 5}


@pytest.mark.parametrize("step", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch, step):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(28))
        with pytest.raises(StorageError, match=r"no space left to write .*epoch-0003 \(2\.\d kB are needed\)"):
            save(tmp_path, 3)
    assert names(tmp_path) == ["epoch-0001", "epoch-0002"]
    assert_is(checkpoints.load_latest(tmp_path), 2)


def test_what_cannot_be_removed_only_takes_space(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(path, root):
        raise StorageError("no permission", "ask for it")

    monkeypatch.setattr(files, "remove_folder", refuse)
    save(tmp_path, 3)
    assert_is(checkpoints.load_latest(tmp_path), 3)


def test_arrays_that_need_pickles_are_refused_when_saving(tmp_path):
    with pytest.raises(TypeError, match="names has the type object"):
        checkpoints.save(tmp_path, 1, {"names": np.array([None, "a"])}, {}, best=False)
    assert names(tmp_path) == []


def forge(path, npz: bytes, state_json: bytes) -> None:
    """A checkpoint whose sums are right, as a stranger can make it."""
    path.mkdir(parents=True)
    contents = {"arrays.npz": npz, "state.json": state_json}
    for name, data in contents.items():
        (path / name).write_bytes(data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    (path / "SHA256SUMS").write_text(sums)


def npz(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"code": 1}], object), allow_pickle=True)
    return buffer.getvalue()


GOOD = {"format": 2, "epoch": 1, "best": False, "arrays": ["a"], "state": {}}
BOMB = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 100000), }")


@pytest.mark.parametrize(
    ("arrays_npz", "document"),
    [
        (npz({"0.npy": pickled()}), GOOD),
        (npz({"0.npy": BOMB}), GOOD),
        (npz({"0.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\0" * 10**6)},
             zipfile.ZIP_DEFLATED), GOOD),
        (npz({"0.npy": npy("__import__('os').abort()")}), GOOD),
        (npz({"0.npy": b"text"}), GOOD),
        (npz({}), GOOD),
        (b"no zip", GOOD),
        (npz({}), {**GOOD, "format": 3}),
        (npz({}), {**GOOD, "epoch": "7"}),
        (npz({}), {**GOOD, "arrays": None}),
        (npz({}), []),
        (npz({}), b"[" * 200_000),
        (npz({}), b"\xff"),
    ],
)  # fmt: skip
def test_a_strangers_checkpoint_is_refused_in_a_line(tmp_path, arrays_npz, document):
    path = tmp_path / "epoch-0001"
    forge(path, arrays_npz, document if isinstance(document, bytes) else json.dumps(document).encode())
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(path)
    assert "epoch-0001" in caught.value.problem
    assert len(caught.value.problem.splitlines()) == 1
