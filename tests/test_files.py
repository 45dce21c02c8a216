import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from file_faults import ENVIRONMENT, failing, inject, names, posix, write_half

from finetune_cli import files
from finetune_cli.errors import RunError, StorageError

# Atomic files


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    files.write_text(path, "old\n")
    files.write_text(path, "né\udcff\n")  # a byte that is not UTF-8, as a file name may hold
    assert path.read_bytes() == b"n\xc3\xa9\xff\n"
    assert names(path.parent) == ["file.txt"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == (0o640 if os.name != "nt" else 0o666)


@posix
def test_exit_at_every_step_leaves_the_old_or_the_new_file(tmp_path, record_property):
    start = tmp_path / "start"
    start.mkdir()
    (start / "file.json").write_bytes(b"old")
    steps = inject("file", start, tmp_path / "work")
    record_property("tries", steps)
    contents = []
    for step in range(1, steps + 1):
        folder = tmp_path / "work" / str(step)
        contents.append((folder / "file.json").read_bytes())
        files.remove_leftovers(folder)
        assert names(folder) == ["file.json"]
    assert set(contents) == {b"old", b"new" * 100}
    assert contents == sorted(contents, reverse=True), "once new, always new"
    assert steps >= 8  # open, close, two halves of the write, open and fsync, replace, the folder's fsync


@posix
def test_exit_at_every_step_leaves_the_whole_folder_or_none(tmp_path, record_property):
    start = tmp_path / "start"
    start.mkdir()
    steps = inject("folder", start, tmp_path / "work")
    record_property("tries", steps)
    seen = set()
    for step in range(1, steps + 1):
        parent = tmp_path / "work" / str(step) / "deep"
        files.remove_leftovers(parent)
        found = names(parent) if parent.exists() else []
        assert found in ([], ["model"])
        seen.add(bool(found))
        if found:
            assert names(parent / "model") == ["a", "b"]
            assert (parent / "model" / "a").read_bytes() == b"a" * 100
            assert (parent / "model" / "b").read_bytes() == b"b" * 100
    assert seen == {False, True}


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as temporary:
        write_half(temporary, KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.ENOSPC, ["no space left", "7 bytes are needed", "free some space"]),
        (errno.EDQUOT, ["quota", "7 bytes"]),
        (errno.EFBIG, ["larger than the system allows", "ulimit -f"]),
        (errno.EACCES, ["no permission", "give yourself permission"]),
        (errno.EROFS, ["no permission"]),
        (errno.EXDEV, ["mounted by itself"]),
        (errno.EBUSY, ["mounted by itself"]),
        (errno.EIO, ["Input/output error"]),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_faults_of_the_disk_are_reported_and_leave_the_old_file(tmp_path, monkeypatch, error, words, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(error))
        with pytest.raises(StorageError) as caught:
            files.write_bytes(path, b"content")
    for word in [*words, "file"]:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_fsync_a_folder_are_accepted(tmp_path, monkeypatch, error):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(error, os.strerror(error))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "new" / "file", b"x")
    assert (tmp_path / "new" / "file").read_bytes() == b"x"


def test_a_fault_of_another_file_names_that_one(tmp_path):
    with pytest.raises(StorageError, match=r"source\.bin"), files.atomic_path(tmp_path / "copy"):
        (tmp_path / "elsewhere" / "source.bin").read_bytes()


@posix
def test_outputs_that_are_links_stay_links_and_devices_stay_devices(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with files.atomic_output(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    with files.atomic_output(Path(os.devnull)) as temporary:
        temporary.write_bytes(b"gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_folder_in_the_way_is_reported(tmp_path):
    with pytest.raises(StorageError, match="it is a folder"):
        files.write_bytes(tmp_path, b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a file has that name"):
        files.write_bytes(tmp_path / "file" / "below", b"x")


def test_long_names_and_their_suffix(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")  # 245 of the 255 bytes that a name may have
    with files.atomic_path(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"


def test_json_refuses_what_other_readers_refuse(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1, 0.1]})
    assert (tmp_path / "a.json").read_text("ascii").endswith("}\n")
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "a.json", float("nan"))


# Atomic folders and leftovers


def test_a_folder_never_replaces_another(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(StorageError, match="exists already"), files.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"a")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == []


def test_a_failed_folder_vanishes(tmp_path):
    with pytest.raises(ValueError, match="no"), files.atomic_folder(tmp_path / "model") as temporary:
        write_half(temporary / "a", ValueError("no"))
    assert names(tmp_path) == []


def test_leftovers_go_and_nothing_else(tmp_path):
    kept = ["file.tmp", ".hidden", ".x-12345678.tmpx", "y-12345678.tmp", ".lock"]
    gone = [".model-0a1b2c3d.tmp.keras", ".epoch-0007-0a1b2c3d.tmp"]
    for name in kept + gone:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".model-0a1b2c3e.tmp").mkdir()
    (tmp_path / ".model-0a1b2c3e.tmp" / "file").write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)
    files.remove_leftovers(tmp_path / "absent")


def leftover(folder: Path, age: float, locked: bool = True) -> Path:
    """A temporary folder of a killed writer."""
    (folder / "model").mkdir(parents=True)
    if locked:
        (folder / ".lock").write_bytes(b"")
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_abandoned_folders_go_when_they_are_old_and_nobody_holds_their_lock(tmp_path):
    leftover(tmp_path / ".model-0a1b2c3d.tmp", 100)
    young, never_locked = (
        leftover(tmp_path / ".model-0a1b2c3e.tmp", 10), leftover(tmp_path / ".model-0a1b2c42.tmp", 100, locked=False),
    )  # fmt: skip
    held, elsewhere = leftover(tmp_path / ".model-0a1b2c3f.tmp", 100), leftover(tmp_path / "elsewhere", 100)
    file, link = tmp_path / ".model-0a1b2c40.tmp", tmp_path / ".model-0a1b2c41.tmp"
    file.write_bytes(b"")
    link.symlink_to(elsewhere)
    with files.lock(held):
        os.utime(held, (time.time() - 100,) * 2)
        files.remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in (young, never_locked, held, elsewhere, file, link))
    assert (elsewhere / "model").is_dir()
    files.remove_abandoned(tmp_path / "absent")


@posix
def test_an_abandoned_folder_of_another_user_stays(tmp_path, monkeypatch):
    folder = leftover(tmp_path / ".model-0a1b2c3d.tmp", 100)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    files.remove_abandoned(tmp_path)
    assert folder.is_dir()


def test_removed_folders_are_gone(tmp_path):
    with files.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"a")
    files.remove_folder(tmp_path / "model")
    assert names(tmp_path) == []


# Space and permissions


def test_space_is_checked_for_folders_that_do_not_exist_yet(tmp_path):
    files.free_space_check(tmp_path / "a" / "b", 1)
    with pytest.raises(StorageError, match=r"needs 1000000 TB of disk space, and .* are free"):
        files.free_space_check(tmp_path / "a" / "b", 10**18)
    assert names(tmp_path) == []


def test_a_writable_folder_is_left_as_it_was(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"), (999_600, "1.0 MB"),
     (5 * 10**9, "5.0 GB"), (10**16, "10000 TB")],
)  # fmt: skip
def test_sizes_as_people_write_them(count, text):
    assert files.human_bytes(count) == text


# The lock

HOLD = """
    import sys, time
    from pathlib import Path
    from finetune_cli import files
    with files.lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), tmp_path], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_error_in_a_second_process_names_the_holder(tmp_path, holder):
    started = time.monotonic()
    with pytest.raises(RunError, match=f"{tmp_path.name} is in use by process {holder.pid}\n"), files.lock(tmp_path):
        pass
    assert time.monotonic() - started < 5


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    holder.wait()
    with files.lock(tmp_path):
        assert (tmp_path / ".lock-holder").read_text().split()[0] == str(os.getpid())
    assert not (tmp_path / ".lock-holder").exists()


def test_the_lock_can_be_waited_for(tmp_path, holder):
    with pytest.raises(RunError), files.lock(tmp_path, wait=0.2):
        pass
    holder.kill()
    with files.lock(tmp_path, wait=10):
        pass


def test_the_lock_is_free_after_an_error_and_excludes_the_same_process(tmp_path):
    with contextlib.suppress(ValueError), files.lock(tmp_path):
        with pytest.raises(RunError, match=f"process {os.getpid()}"), files.lock(tmp_path):
            pass
        raise ValueError
    with files.lock(tmp_path):
        pass


def test_the_lock_of_a_folder_that_is_gone(tmp_path):
    with pytest.raises(StorageError, match="absent"), files.lock(tmp_path / "absent"):
        pass


@posix
def test_standard_output_is_written_behind_what_is_there(tmp_path):
    """`--output /dev/stdout` with `>> file`: the file is not replaced."""
    script = "from pathlib import Path; from finetune_cli import files\n"
    script += "with files.atomic_output(Path('/dev/stdout')) as path: path.write_text('new\\n')"
    with (tmp_path / "log").open("ab") as log:
        log.write(b"old\n")
        log.flush()
        subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, stdout=log, check=True)
        log.write(b"more\n")
    assert (tmp_path / "log").read_bytes() == b"old\nnew\nmore\n"
    answer = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, check=True)
    assert answer.stdout == b"new\n"
