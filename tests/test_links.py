"""Links inside a run, an export or the cache: refused by name in reading, never followed in writing.

`outside` is what a link leads to: no test may change it. "Swapped" is a link that is put in the place of a file or a
folder between the check and the use.
"""

import contextlib
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from manifest_example import export_manifest

from finetune_cli import files, safe_open
from finetune_cli.cache.digests import DigestCache, Facts
from finetune_cli.cache.features import FeatureStore, clear, info
from finetune_cli.config.load import load_config
from finetune_cli.errors import CheckpointError, ConfigError, RunError, StorageError, UsageError, WeightsError
from finetune_cli.evaluation import evaluate
from finetune_cli.exports import manifest, opening, place
from finetune_cli.inference import predict
from finetune_cli.progress import Silent
from finetune_cli.runs import checkpoints
from finetune_cli.runs.run import Run
from finetune_cli.training import resume

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")

SECRET = b"precious"
ITEMS = [(bytes([i]) * 32, np.full(8, i, np.float32)) for i in range(4)]
KEYS = [key for key, _value in ITEMS]


@pytest.fixture
def outside(tmp_path):
    """A file and a folder that nothing may write to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(SECRET)
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"file": SECRET}
    assert (folder / "file").stat().st_nlink <= 2


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of the tiny run, to be changed, without the evaluations of other tests."""
    others = shutil.ignore_patterns("evaluations")
    return Path(shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1", ignore=others))


def plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1


# Writing


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("target", ["file", "nothing"])
def test_a_link_is_replaced_and_not_followed(tmp_path, outside, make, target):
    if make == "hardlink_to" and target == "nothing":
        target = "file"
    for name in ("bytes", "library.keras"):
        getattr(tmp_path / name, make)(outside / target)
    files.write_bytes(tmp_path / "bytes", b"new")
    with files.atomic_path(tmp_path / "library.keras") as temporary:
        assert temporary.name == "library.keras"
        temporary.write_bytes(b"new")
    for name in ("bytes", "library.keras"):
        assert plain(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "library.keras", "outside"]


def test_a_folder_that_is_a_link_is_refused_and_stays(tmp_path, outside):
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "evaluations"
    link.symlink_to(outside)
    for attempt in (
        lambda: files.write_bytes(link / "val-1" / "metrics.json", b"x", tmp_path / "run"),
        lambda: files.check_writable(link, tmp_path / "run"),
        lambda: files.check_writable(link / "val-1", tmp_path / "run"),
        lambda: files.remove_folder(link / "file", tmp_path / "run"),
    ):
        with pytest.raises(StorageError, match=rf"{link} is a symbolic link, which is not followed") as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 2
    assert link.is_symlink()


def test_removing_a_link_leaves_what_it_leads_to(tmp_path, outside):
    (tmp_path / "checkpoints").symlink_to(outside)
    (tmp_path / ".model-01234567.tmp").symlink_to(outside)
    files.remove_folder(tmp_path / "checkpoints")
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


def test_folders_above_may_be_links(tmp_path):
    (tmp_path / "disk" / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "newest").symlink_to(tmp_path / "runs" / "x")
    for run in (tmp_path / "runs" / "x", tmp_path / "newest"):
        files.write_bytes(run / "evaluations" / "a" / "metrics.json", b"{}", run)
        assert files.read_own(run / "evaluations" / "a" / "metrics.json", run) == b"{}"
        with files.lock(run):
            pass


def test_names_never_lead_out_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="leads out"):
        files.read_own(tmp_path / "run" / ".." / "secret" / "file", tmp_path / "run")
    with pytest.raises(ValueError, match="subpath"):
        files.write_bytes(tmp_path / "elsewhere", b"x", tmp_path / "run")


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
def test_the_lock_writes_to_no_other_file(tmp_path, outside, make):
    (tmp_path / "run").mkdir()
    getattr(tmp_path / "run" / ".lock-holder", make)(outside / "file")
    if make == "symlink_to":
        (tmp_path / "run" / ".lock").symlink_to(outside / "new")
    with files.lock(tmp_path / "run"):
        holder = tmp_path / "run" / ".lock-holder"
        assert plain(holder)
        assert holder.read_text().split()[0] == str(os.getpid())
    assert plain(tmp_path / "run" / ".lock")


def test_the_holder_is_not_read_through_a_link(tmp_path, outside):
    with files.lock(tmp_path):
        (tmp_path / ".lock-holder").unlink()
        (tmp_path / ".lock-holder").symlink_to(outside / "file")
        with pytest.raises(RunError, match="in use by another process"), files.lock(tmp_path):
            pass


# Runs


def test_every_file_of_a_run_that_is_a_link_is_named(copy, tmp_path):
    """Even to a file with the right content: the next one to write there must not find a link."""
    run = Run.load(copy)
    for name in run.manifest.files:
        real = tmp_path / "moved"
        (copy / name).rename(real)
        (copy / name).symlink_to(real)
        for read in (run.file, run.read):
            with pytest.raises(RunError, match=f"{copy / name} is a symbolic link"):
                read(name)
        (copy / name).unlink()
        real.rename(copy / name)
        assert run.read(name) == run.file(name).read_bytes()
    (copy / "run.json").rename(tmp_path / "run.json")
    (copy / "run.json").symlink_to(tmp_path / "run.json")
    with pytest.raises(RunError, match=f"{copy / 'run.json'} is a symbolic link"):
        Run.load(copy)


def test_a_folder_of_a_run_that_is_a_link_is_named(copy, tmp_path):
    (copy / "inference").rename(tmp_path / "inference")
    (copy / "inference").symlink_to(tmp_path / "inference")
    with pytest.raises(RunError, match=f"{copy / 'inference'} is a symbolic link"):
        predict.RunPredictor(Run.load(copy), workers=1)


def test_an_evaluation_is_not_written_through_a_link(copy, outside):
    (copy / "evaluations").symlink_to(outside)
    with pytest.raises(StorageError, match=f"{copy / 'evaluations'} is a symbolic link"):
        evaluate.evaluate(Run.load(copy), Silent())


def test_the_config_in_a_run_is_not_read_through_a_link(copy, tmp_path):
    (copy / "config.yaml").rename(tmp_path / "config.yaml")
    (copy / "config.yaml").symlink_to(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml is a symbolic link"):
        load_config(copy / "config.yaml", own=True)
    assert load_config(copy / "config.yaml").data.train.name == "train"  # a person's own may be one


def test_checkpoints_are_neither_written_nor_read_through_links(tmp_path, outside):
    run = tmp_path / "run"
    run.mkdir()

    def save(epoch):
        checkpoints.save(run / "checkpoints", epoch, {"a": np.ones(3)}, {}, best=False)

    (run / "checkpoints").symlink_to(outside)
    with pytest.raises(StorageError, match=f"{run / 'checkpoints'} is a symbolic link"):
        save(1)
    (run / "checkpoints").unlink()
    save(1)
    save(2)
    (run / "checkpoints" / "epoch-0002").rename(tmp_path / "epoch-0002")
    (run / "checkpoints" / "epoch-0002").symlink_to(tmp_path / "epoch-0002")
    with pytest.raises(CheckpointError, match="epoch-0002 is a symbolic link"):
        checkpoints.load(run / "checkpoints" / "epoch-0002")
    found = checkpoints.load_latest(run / "checkpoints")
    assert found is not None
    assert found.epoch == 1
    save(2)
    assert not (run / "checkpoints" / "epoch-0002").is_symlink()
    assert checkpoints.load(run / "checkpoints" / "epoch-0002").epoch == 2


def test_the_record_of_the_start_is_not_read_through_a_link(tmp_path, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "split.csv").write_text("")
    (tmp_path / "run" / "checkpoints").symlink_to(outside)
    with pytest.raises(RunError, match="checkpoints is a symbolic link"):
        resume.check_files(tmp_path / "run")


# Exports


def write_export(folder: Path) -> None:
    """An export with its manifest; what its files hold does not matter here."""
    (folder / "assets").mkdir(parents=True)
    listed = {}
    for name in ("model.onnx", "assets/words"):
        (folder / name).write_bytes(name.encode())
        listed[name] = files.sha256(folder / name)
    files.write_json(
        folder / "manifest.json",
        export_manifest(listed),
    )


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "assets/words", "assets"])
def test_a_link_in_an_export_is_named(tmp_path, name):
    export = tmp_path / "export"
    write_export(export)
    assert manifest.verify(export).form == "onnx"
    (export / name).rename(tmp_path / "moved")
    (export / name).symlink_to(tmp_path / "moved")
    with pytest.raises(WeightsError, match=name.split("/")[0]) as caught:
        opening.open_model(export, 1)
    assert "link" in caught.value.problem or "not listed" in caught.value.problem


def test_a_version_that_is_a_link_is_named(tmp_path):
    write_export(tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "7").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="7 is a symbolic link"):
        opening.open_model(tmp_path / "models", 1)


def test_a_form_is_not_written_through_a_link(tmp_path, outside):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "savedmodel").symlink_to(outside)
    with pytest.raises(UsageError, match="savedmodel is a symbolic link"):
        place.refuse_links(tmp_path / "models", tmp_path / "models" / "savedmodel" / "1")
    (tmp_path / "here").symlink_to(tmp_path / "models")
    place.refuse_links(tmp_path / "here", tmp_path / "here" / "onnx")


# The cache


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_the_feature_cache_writes_to_no_other_file(tmp_path, outside, make, suffix):
    cache = tmp_path / "cache"
    cache.mkdir()
    name = f"features.sqlite{suffix}"
    getattr(cache / name, make)(outside / "file")
    if not suffix or suffix == "-wal":
        assert ("link" in info(cache).problem) == (suffix == "")
    with FeatureStore(cache) as store:
        store.put(ITEMS)
        assert set(store.get(KEYS)) == set(KEYS)
        (warning,) = store.warnings
        assert name in warning
        assert "link" in warning
    with FeatureStore(cache) as store:
        assert set(store.get(KEYS)) == set(KEYS)
        assert store.warnings == []
    clear(cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_the_digest_cache_writes_to_no_other_file(tmp_path, outside, make, suffix):
    cache = tmp_path / "cache"
    cache.mkdir()
    getattr(cache / f"digests.sqlite{suffix}", make)(outside / "file")
    photo = outside / "file"
    os.utime(photo, (1e9, 1e9))
    for warnings in (1, 0):
        with DigestCache(cache) as digests:
            digests.put(photo, photo.stat(), Facts("00" * 32, 1, 1))
        assert len(digests.warnings) == warnings, digests.warnings
    assert plain(cache / "digests.sqlite")


# Swapped between the check and the use


def swap(path: Path, target: Path) -> None:
    """Put a link to `target` in the place of `path`, which is kept beside it."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(f"{path.name}.real"))
    path.symlink_to(target)


def test_a_folder_swapped_while_a_library_writes(tmp_path, outside):
    """The library gets a name that leads to the folder that was looked at (on Linux)."""
    run = tmp_path / "run"
    run.mkdir()
    with files.atomic_path(run / "deep" / "model.keras", root=run) as temporary:
        if not str(temporary).startswith("/proc/"):
            pytest.skip("this system has no names for open folders")
        swap(run / "deep", outside)
        temporary.write_bytes(b"new")
    assert (run / "deep.real" / "model.keras").read_bytes() == b"new"
    with pytest.raises(StorageError, match="deep is a symbolic link"):
        files.write_bytes(run / "deep" / "model.keras", b"x", run)


def test_a_temporary_folder_swapped_while_a_library_writes(tmp_path, outside):
    with contextlib.suppress(StorageError), files.atomic_folder(tmp_path / "model") as temporary:
        if not str(temporary).startswith("/proc/"):
            pytest.skip("this system has no names for open folders")
        (workshop,) = tmp_path.glob(".model-*")
        swap(workshop, outside)
        (temporary / "weights").write_bytes(b"new")
    assert (tmp_path / "model" / "weights").read_bytes() == b"new"


def test_a_folder_of_another_user_in_the_place_of_the_temporary_one(tmp_path, outside, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    real = safe_open.OpenFolder.mkdir

    def mkdir(self, name, mode=0o777):
        real(self, name, mode)
        if name.startswith(".model"):
            os.chown(self.path / name, 65534, 65534)

    monkeypatch.setattr(safe_open.OpenFolder, "mkdir", mkdir)
    for attempt in (files.atomic_path, files.atomic_folder):
        with pytest.raises(StorageError, match="permission"), attempt(tmp_path / "model"):
            pytest.fail("it was given to a library")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


@pytest.mark.parametrize("step", ["mkdir", "take", "open"])
def test_a_folder_swapped_during_a_write(tmp_path, outside, monkeypatch, step):
    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    real = getattr(safe_open.OpenFolder, step)

    def swapping(self, *arguments):
        if arguments[0] != "evaluations" and not (run / "evaluations").is_symlink():
            swap(run / "evaluations", outside)
        return real(self, *arguments)

    monkeypatch.setattr(safe_open.OpenFolder, step, swapping)
    files.write_bytes(run / "evaluations" / "metrics.json", b"new", run)
    assert (run / "evaluations").is_symlink(), "the step was not reached"
    assert (run / "evaluations.real" / "metrics.json").read_bytes() == b"new"


def test_a_file_swapped_during_a_read(tmp_path, outside, monkeypatch):
    (tmp_path / "run.json").write_bytes(b"{}")
    real = safe_open.OpenFolder.open

    def swapping(self, name, *arguments):
        swap(tmp_path / name, outside / "file")
        return real(self, name, *arguments)

    monkeypatch.setattr(safe_open.OpenFolder, "open", swapping)
    with pytest.raises(OSError, match="is a symbolic link"):
        files.read_own(tmp_path / "run.json")


def test_a_model_swapped_after_its_hash_was_checked(copy, tiny_run, monkeypatch):
    """The bytes that are used are those that were hashed: no name is opened a second time."""
    run, photos = Run.load(copy), sorted(tiny_run.photos.rglob("*.png"))[:2]
    wanted = [found.top for found in predict.predict(predict.RunPredictor(run, 1), photos, 3)]
    real = Run.read

    def swapping(self, name):
        content = real(self, name)
        (self.folder / name).write_bytes(b"something else")
        return content

    monkeypatch.setattr(Run, "read", swapping)
    assert [found.top for found in predict.predict(predict.RunPredictor(run, 1), photos, 3)] == wanted


@pytest.mark.parametrize("exists", [True, False])
def test_a_database_swapped_before_sqlite_opens_it(tmp_path, outside, monkeypatch, exists):
    cache = tmp_path / "cache"
    if exists:
        with FeatureStore(cache) as store:
            store.put(ITEMS)
    real, swaps = sqlite3.connect, []

    def swapping(*arguments, **options):
        if not swaps:
            swaps.append(1)
            swap(cache / "features.sqlite", outside / ("file" if exists else "nothing"))
        return real(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", swapping)
    with FeatureStore(cache) as store:
        store.put(ITEMS)
        assert set(store.get(KEYS)) == set(KEYS)
    assert swaps
    assert plain(cache / "features.sqlite")


def test_an_empty_file_swapped_in_is_not_made_a_database(tmp_path, monkeypatch):
    """SQLite would begin a database in it, and take it for ours from then on."""
    cache, empty = tmp_path / "cache", tmp_path / "empty"
    empty.touch()
    real, swaps = sqlite3.connect, []

    def swapping(*arguments, **options):
        if not swaps:
            swaps.append(1)
            swap(cache / "features.sqlite", empty)
        return real(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", swapping)
    with FeatureStore(cache) as store:
        store.put(ITEMS)
    assert swaps
    assert empty.read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "empty"]


def test_a_folder_that_is_swapped_all_the_time(tmp_path, outside):
    """A thread changes a folder and a link while files are written, read and removed below it."""
    run, ended = tmp_path / "run", threading.Event()
    (run / "checkpoints").mkdir(parents=True)

    def swap_for_ever():
        while not ended.is_set():
            with contextlib.suppress(OSError):
                (run / "checkpoints").rename(run / "real")
                (run / "checkpoints").symlink_to(outside)
                (run / "checkpoints").unlink()
            with contextlib.suppress(OSError):
                (run / "real").rename(run / "checkpoints")
            ended.wait(0.0005)

    thread = threading.Thread(target=swap_for_ever)
    thread.start()
    written, refused = 0, 0
    try:
        for i in range(100_000):
            if written >= 50 and refused >= 5:
                break
            path = run / "checkpoints" / f"epoch-{i % 3}"
            try:
                files.write_bytes(path / "state", b"x" * 100, run)
                files.read_own(path / "state", run)
                files.remove_folder(path, run)
                written += 1
            except (StorageError, OSError):
                refused += 1
    finally:
        ended.set()
        thread.join()
    assert written, "every write was refused"
    assert refused, "nothing was swapped in time"
