"""Kills, full disks, forbidden folders and races against the parts that promise to survive them.

Every test works on real processes and real file systems. `test_files.py`, `runs/test_checkpoints.py` and
`cache/test_features.py` hold the faults that can be injected from inside.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import cacher
import numpy as np
import pytest
from paths import PROGRAMS, SOURCE

from finetune_cli import files
from finetune_cli.cache import features
from finetune_cli.errors import StorageError
from finetune_cli.runs import checkpoints

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, limits, users and mounts")

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{PROGRAMS}", "OMP_NUM_THREADS": "1"}
NOBODY = 65534


def start(script: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, PROGRAMS / script, *map(str, arguments)]
    # Unbuffered, so that the first line can be read without taking others with it.
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def kill_later(process: "subprocess.Popen[bytes]", seconds: float) -> list[bytes]:
    """SIGKILL `process` that long after its first line; all the whole lines that it wrote."""
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first, process.communicate()[1]
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest, _errors = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return [line for line in (first + rest).splitlines(keepends=True) if line.endswith(b"\n")]


def run_script(script: str, *arguments: object) -> str:
    """Run Python text in a process of its own; its standard output."""
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


# Kills


def trajectory(epochs: int) -> dict[int, np.ndarray]:
    """The kernel after each epoch of checkpointer.py when nothing interrupts it."""
    kernel, moments, kernels = np.zeros((256, 8)), np.zeros((256, 8)), {}
    for epoch in range(1, epochs + 1):
        moments = 0.9 * moments + np.random.default_rng(epoch).normal(size=(256, 8))
        kernel = np.tanh(kernel + 0.1 * moments)
        kernels[epoch] = kernel
    return kernels


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_loses_no_checkpoint_and_changes_no_bit(tmp_path, kills):
    rng, cut_short, epochs = random.Random(kills), 0, []
    for _kill in range(kills):
        lines = kill_later(start("checkpointer.py", tmp_path, 10**6), rng.uniform(0, 0.06))
        cut_short += any(path.name.startswith(".") for path in tmp_path.iterdir())
        found = checkpoints.load_latest(tmp_path)
        assert found is not None
        assert found.warnings == ()
        assert int(lines[-1]) <= found.epoch <= int(lines[-1]) + 1
        epochs.append(found.epoch)
    assert epochs == sorted(epochs)
    last = start("checkpointer.py", tmp_path, epochs[-1] + 3)
    last.communicate()
    assert last.returncode == 0
    found = checkpoints.load_latest(tmp_path)
    np.testing.assert_array_equal(found.arrays["kernel"], trajectory(epochs[-1] + 3)[found.epoch], strict=True)
    assert found.epoch == epochs[-1] + 3 == len(found.state["history"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "litter of the killed is gone"
    print(f"{cut_short} of {kills} kills came in the middle of a save")
    assert cut_short, "no kill came in the middle of a save"


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_while_the_cache_writes_loses_nothing_that_was_stored(tmp_path, kills):
    rng, stored = random.Random(kills), 0
    for _kill in range(kills):
        stored = int(kill_later(start("cacher.py", "write", tmp_path, stored), rng.uniform(0, 0.1))[-1])
        with features.FeatureStore(tmp_path) as store:
            assert store.warnings == []
            assert cacher.check(store, range(max(0, stored - 400), stored)) == min(400, stored)
            assert len(store.has([cacher.key(i) for i in range(stored)])) == stored
    assert not list(tmp_path.glob("*damaged*"))


@pytest.mark.slow
def test_sigkill_while_pruning_leaves_a_whole_store(tmp_path):
    rng = random.Random(0)
    with features.FeatureStore(tmp_path) as store:
        store.put([(cacher.key(i), cacher.row(i)) for i in range(6000)])
    for _kill in range(20):
        with contextlib.closing(features.FeatureStore(tmp_path)) as store:
            before = store.has([cacher.key(i) for i in range(6000)])
        process = start("cacher.py", "prune", tmp_path, max(0, len(before) - 300) * 5500)
        time.sleep(rng.uniform(0.2, 0.6))
        process.kill()
        process.communicate()
        with features.FeatureStore(tmp_path) as store:
            assert cacher.check(store, range(6000)) == len(store.has([cacher.key(i) for i in range(6000)]))
        assert store.warnings == []


# Races


def test_two_processes_read_and_write_one_cache_at_once(tmp_path):
    processes = [start("cacher.py", "both", tmp_path, first) for first in (0, 100)]  # half of the rows are shared
    for process in processes:
        _output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with features.FeatureStore(tmp_path) as store:
        assert cacher.check(store, range(400)) == 300
    assert store.warnings == []


def test_five_processes_that_begin_a_cache_at_once_agree_on_one_file(tmp_path):
    (tmp_path / "features.sqlite").write_bytes(b"damaged" * 1000)
    firsts = range(0, 50_000, 10_000)
    processes = [start("cacher.py", "write", tmp_path, first) for first in firsts]
    lines = [kill_later(process, 0.5) for process in processes]
    assert len(list(tmp_path.glob("features.sqlite.damaged-*"))) <= 1
    with features.FeatureStore(tmp_path) as store:
        written = {i for first, some in zip(firsts, lines, strict=True) for i in range(first, int(some[-1]))}
        assert cacher.check(store, written) >= len(written) - 8 * 5  # what was stored while another set the file aside
    assert store.warnings == []


# Limits and full disks

LIMITED = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from finetune_cli import files
    from finetune_cli.errors import StorageError
    from finetune_cli.cache.features import FeatureStore
    from finetune_cli.runs import checkpoints
    import cacher

    folder = Path(sys.argv[1])
    files.write_bytes(folder / "file", b"old")
    checkpoints.save(folder / "checkpoints", 1, {"a": np.arange(3)}, {}, best=True)
    with FeatureStore(folder / "cache") as store:
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # Python itself ignores SIGXFSZ
    for write in (
        lambda: files.write_bytes(folder / "file", bytes(400_000)),
        lambda: checkpoints.save(folder / "checkpoints", 2, {"a": np.zeros(50_000)}, {}, best=True),
    ):
        try:
            write()
        except StorageError as error:
            print(error.problem)
        else:
            raise SystemExit("no error")
    with FeatureStore(folder / "cache") as store:
        for i in range(20, 200):
            store.put([(cacher.key(i), cacher.row(i))])
        assert cacher.check(store, range(20)) == 20
    assert len(store.warnings) == 1, store.warnings
    print(store.warnings[0])
"""


def assert_nothing_is_lost(folder: Path) -> None:
    assert (folder / "file").read_bytes() == b"old"
    found = checkpoints.load_latest(folder / "checkpoints")
    assert (found.epoch, found.warnings) == (1, ())
    with features.FeatureStore(folder / "cache") as store:
        assert cacher.check(store, range(20)) == 20
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "checkpoints", "file"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch-0001"]


def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path):
    first, second, third = run_script(LIMITED, tmp_path).splitlines()
    assert first == f"{tmp_path}/file would be larger than the system allows (400 kB are needed)"
    assert second.startswith(f"{tmp_path}/checkpoints/epoch-0002 would be larger than the system allows (40")
    assert "cannot be written" in third
    assert_nothing_is_lost(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small disk can only be mounted by root")
    answer = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if answer.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {answer.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill_up(folder: Path) -> Path:
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return path


def test_a_full_disk_loses_nothing_and_says_how_much_is_needed(small_disk):
    files.write_bytes(small_disk / "file", b"old")
    checkpoints.save(small_disk / "checkpoints", 1, {"a": np.arange(3)}, {}, best=True)
    with features.FeatureStore(small_disk / "cache") as store:
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20)])
        ballast = fill_up(small_disk)
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20, 40)])
        assert cacher.check(store, range(40)) == 20
    assert len(store.warnings) == 1
    assert "disk is full; at least 103 kB more are needed" in store.warnings[0]
    with pytest.raises(StorageError, match=r"no space left to write .*/file \(9\.0 kB are needed\)"):
        files.write_bytes(small_disk / "file", bytes(9000))
    with pytest.raises(StorageError, match=r"no space left to write .*/epoch-0002 \(80\.\d kB are needed\)"):
        checkpoints.save(small_disk / "checkpoints", 2, {"a": np.zeros(10_000)}, {}, best=True)
    with pytest.raises(StorageError, match=r"needs 1\.0 MB of disk space, and 0 bytes are free"):
        files.free_space_check(small_disk / "runs", 10**6)
    with features.FeatureStore(small_disk / "cache") as store:  # opened on a full disk
        assert cacher.check(store, range(20)) == 20
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20, 40)])
    assert store.warnings
    ballast.unlink()
    assert_nothing_is_lost(small_disk)
    checkpoints.save(small_disk / "checkpoints", 2, {"a": np.zeros(10_000)}, {}, best=True)
    with features.FeatureStore(small_disk / "cache") as store:
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20, 40)])
        assert cacher.check(store, range(40)) == 40
    assert store.warnings == []


def test_a_cache_that_fills_its_disk_can_be_cleared(small_disk):
    with features.FeatureStore(small_disk) as store:
        for i in range(1000):
            store.put([(cacher.key(i), cacher.row(i))])
        stored = cacher.check(store, range(1000))
    assert 30 < stored < 200
    assert "disk is full" in store.warnings[0]
    with pytest.raises(
        StorageError, match="disk is full\nfree a few MB first, or remove it with: finetune cache clear"
    ):
        features.prune(small_disk, 100_000)
    assert features.clear(small_disk) > 500_000


# Permissions


@pytest.fixture
def public_path():
    """A folder that every user may reach; pytest's own is private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


READ_ONLY = """
    import os, sys, tempfile
    from pathlib import Path
    import numpy as np
    from finetune_cli import files
    from finetune_cli.errors import StorageError
    from finetune_cli.cache.features import FeatureStore
    from finetune_cli.runs import checkpoints
    import cacher

    folder, user = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as other, files.lock(Path(other)), FeatureStore(Path(other, "cache")) as store:
        store.get([b"key"])  # what is imported late is imported now: Python's own files may be private to root
        Path(other).absolute().as_uri()
        checkpoints.load(checkpoints.save(Path(other), 1, {"a": np.arange(3)}, {}, best=True))
    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(user), os.setuid(user)
    for write in (
        lambda: files.write_bytes(folder / "file", b"new"),
        lambda: files.write_bytes(folder / "new" / "file", b"new"),
        lambda: checkpoints.save(folder / "checkpoints", 2, {"a": np.arange(3)}, {}, best=True),
        lambda: files.check_writable(folder / "runs" / "new"),
        lambda: files.lock(folder / "checkpoints").__enter__(),
    ):
        try:
            write()
        except StorageError as error:
            print(error.problem)
        else:
            raise SystemExit("no error")
    assert checkpoints.load_latest(folder / "checkpoints").epoch == 1
    with FeatureStore(folder / "cache") as store:
        assert cacher.check(store, range(40)) == 20
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20, 40)])
        assert cacher.check(store, range(40)) == 20
    assert len(store.warnings) == 1, store.warnings
    print(store.warnings[0])
"""


def test_a_read_only_folder_is_read_and_every_write_says_so(public_path):
    files.write_bytes(public_path / "file", b"old")
    checkpoints.save(public_path / "checkpoints", 1, {"a": np.arange(3)}, {}, best=True)
    with features.FeatureStore(public_path / "cache") as store:
        store.put([(cacher.key(i), cacher.row(i)) for i in range(20)])
    folders = [public_path, *(path for path in public_path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        lines = run_script(READ_ONLY, public_path, NOBODY).splitlines()  # root may write everywhere
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert len(lines) == 6
    assert [line for line in lines[:5] if not line.startswith("no permission to write")] == []
    assert "it is only read" in lines[5]
    assert_nothing_is_lost(public_path)
