"""Whose the cache's folder is, and what happens where nothing can be written; as several users, when run as root."""

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from paths import SOURCE
from photo_files import write_photos

from finetune_cli.cache import folder as cachefolder
from finetune_cli.cache.digests import DigestCache
from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.load import load_config

NOBODY, SOMEBODY = 65534, 12345
KEY, ROW = b"k" * 32, np.arange(5, dtype=np.float32)
SOURCE = str(SOURCE)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX owners and permissions")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture
def public():
    """A folder that every user may reach; pytest's own is private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


# What is imported late is imported first, as root, who may own Python's files.
BECOME = """
import os, sys
from pathlib import Path
import filelock, platformdirs, rich.text, encodings.utf_8_sig
from finetune_cli.cache import folder as cachefolder, sqlite_file
from finetune_cli.cli import console
from finetune_cli.cli.app import app
from finetune_cli.config.load import load_config
from finetune_cli.cache import maintenance
from finetune_cli.training import check
from finetune_cli.cache.features import FeatureStore
from finetune_cli.cache.digests import DigestCache
import PIL.PngImagePlugin, PIL.JpegImagePlugin
Path("/").as_uri()
os.setgroups([]), os.setgid({user}), os.setuid({user})
"""


def run_as(user: int, script: str, *arguments: object, folder: Path = Path("/"), **environment: str):
    """Run `script` as `user` and return the finished process; HOME and the cache's variables are unset."""
    names = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
    return subprocess.run(
        [sys.executable, "-c", BECOME.format(user=user) + textwrap.dedent(script), *map(str, arguments)],
        cwd=folder,
        env={name: os.environ[name] for name in names if name in os.environ} | {"PYTHONPATH": SOURCE} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


STORE = """
    import numpy as np
    folder = cachefolder.locate(Path(sys.argv[1]))
    key, row = b"k" * 32, np.arange(5, dtype=np.float32)
    with FeatureStore(folder.path, folder.writable) as store:
        found = store.get([key])
        store.put([(key, row)])
    assert not store.warnings, store.warnings
    print(folder.path, len(found), folder.warning, sep="|")
"""


def store_as(user: int, folder: Path) -> list[str]:
    """Read a row and store it, as `user`: the cache's folder, the rows that were there, and the warning."""
    answer = run_as(user, STORE, folder)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip("\n").split("|")


def test_a_new_folder_is_ours_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        found = cachefolder.locate(tmp_path / "new" / "cache")
    finally:
        os.umask(before)
    assert (found.path, found.scratch, found.warning) == (tmp_path / "new" / "cache",) * 2 + ("",)
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o755
    assert cachefolder.locate(found.path) == found
    assert cachefolder.own_folder(found.path) == found.path


def test_a_link_to_our_own_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "cache").symlink_to("disk")
    assert cachefolder.locate(tmp_path / "cache").path == tmp_path / "cache"


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_everyone_has_a_folder_in_a_shared_one(tmp_path, mode):
    tmp_path.chmod(mode)
    own = tmp_path / f"user-{os.geteuid()}"
    assert cachefolder.own_folder(tmp_path) == own
    assert not own.exists()
    assert cachefolder.locate(tmp_path) == cachefolder.CacheFolder(own, own)
    assert own.is_dir()


def test_a_group_of_ones_own_is_nobody_else(tmp_path):
    tmp_path.chmod(0o775)
    assert cachefolder.own_folder(tmp_path) == tmp_path
    if os.geteuid() == 0:
        os.chown(tmp_path, -1, SOMEBODY)
        assert cachefolder.own_folder(tmp_path) == tmp_path / "user-0"


@as_root
def test_two_users_share_a_folder_with_the_sticky_bit_and_no_rows(public):
    shared = public / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    for user in (SOMEBODY, NOBODY):
        assert store_as(user, shared) == [str(shared / f"user-{user}"), "0", ""]
    for user in (SOMEBODY, NOBODY):
        assert store_as(user, shared) == [str(shared / f"user-{user}"), "1", ""]
        assert (shared / f"user-{user}").stat().st_uid == user


@as_root
def test_a_folder_that_somebody_put_in_our_place_is_not_used(public):
    shared = public / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    own, theirs = shared / f"user-{NOBODY}", shared / "theirs"
    for folder in (own, theirs):
        folder.mkdir()
    with FeatureStore(own) as store:
        store.put([(KEY, ROW + 1)])
    for path in (own, theirs, *own.iterdir()):
        os.chown(path, SOMEBODY, SOMEBODY)
    path, found, warning = store_as(NOBODY, shared)
    assert Path(path).parent == Path(tempfile.gettempdir())
    assert found == "0"
    assert warning.startswith(f"{own} belongs to another user: a temporary cache is used")
    own.rename(shared / "moved")
    own.symlink_to("theirs")
    os.chown(own, SOMEBODY, SOMEBODY, follow_symlinks=False)
    assert store_as(NOBODY, shared)[2].startswith(f"{own} belongs to another user")
    assert list(theirs.iterdir()) == []


@as_root
def test_another_users_cache_is_not_read(public):
    """Whoever writes the rows decides the numbers: they are trusted from root and from oneself only."""
    with FeatureStore(public / "cache") as store:
        store.put([(KEY, ROW)])
    for path in ((public / "cache"), *(public / "cache").iterdir()):
        os.chown(path, SOMEBODY, SOMEBODY)
    path, found, warning = store_as(NOBODY, public / "cache")
    assert found == "0"
    assert not Path(path).exists(), "a temporary cache is removed at the end"
    own = public / "cache" / f"user-{NOBODY}"
    assert warning == (
        f"no permission to write {own}: a temporary cache is used, which is removed at the end; "
        "to keep it, set runtime.cache_dir to a folder that you can write to"
    )


@as_root
def test_a_cache_that_root_made_is_read_where_it_cannot_be_written(public):
    with FeatureStore(public / "cache") as store:
        store.put([(KEY, ROW)])
    before = {path: path.read_bytes() for path in (public / "cache").iterdir()}
    path, found, warning = store_as(NOBODY, public / "cache")
    assert (path, found) == (str(public / "cache"), "1")
    assert warning.startswith(f"no permission to write {path}: the cache is only read; ")
    assert {path: path.read_bytes() for path in (public / "cache").iterdir()} == before


COMMAND = """
    app(sys.argv[1:])
"""


@as_root
@pytest.mark.parametrize("home", [None, "/root-of-nobody", "locked"])
def test_a_container_without_a_home_warns_once_and_continues(public, home):
    """HOME is unset for a user whom the system does not know, absent, or read-only."""
    write_photos(public / "photos", " ".join(f"{label}/{i}.png" for label in "ab" for i in range(4)))
    (public / "photos.yaml").write_text("data: {train: photos}\noutput: {directory: runs}\n")
    for name in ("runs", "tmp"):
        (public / name).mkdir()
        (public / name).chmod(0o777)
    (public / "locked").mkdir()
    environment = {"TMPDIR": str(public / "tmp")}
    if home is not None:
        environment["HOME"] = str(public / home) if home == "locked" else home
    answer = run_as(SOMEBODY, COMMAND, "check", "photos.yaml", folder=public, **environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("a temporary cache is used") == 1
    assert ("HOME is not set" if home is None else "no permission to write") in answer.stderr.replace("\n", " ")
    assert list((public / "tmp").iterdir()) == []
    assert not (public / "~").exists()
    if home is None:
        answer = run_as(SOMEBODY, COMMAND, "cache", "info", folder=public, **environment)
        assert answer.returncode == 1
        assert "there is no home directory for the cache: HOME is not set\ntry: " in answer.stderr


def test_no_temporary_folder_either(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cachefolder._temporary_folder.cache_clear()

    def fail(**_options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(cachefolder.StorageError, match="and there is no temporary folder either"):
        cachefolder.locate(tmp_path / "file" / "cache")


def test_the_temporary_folder_is_one_a_process(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = (cachefolder.locate(tmp_path / "file" / name) for name in "ab")
    assert first.path == second.path
    assert first.writable
    with DigestCache(first.path, first.writable) as cache:
        assert cache.warnings == []


def test_a_training_without_a_cache_folder(tmp_path):
    """From photos to a finished run; nothing is left but the run."""
    from runs_fixture import tiny_backbone

    from finetune_cli.progress import Silent
    from finetune_cli.training.pipeline import train

    write_photos(tmp_path / "photos", " ".join(f"{label}/{i}.png" for label in "ab" for i in range(10)))
    tiny_backbone().save(tmp_path / "tiny.keras")
    (tmp_path / "file").write_text("")
    settings = [
        f"data.train={tmp_path / 'photos'}",
        f"model.backbone={tmp_path / 'tiny.keras'}",
        "image.size=64",
        "augmentation=null",
        f"output.directory={tmp_path / 'runs'}",
        f"runtime.cache_dir={tmp_path / 'file' / 'cache'}",
    ]
    observer = Silent()
    run = train(load_config(None, settings), observer)
    assert run.manifest.views.computed >= 20  # where cores have bfloat16, validation photos are computed twice
    assert sum("a temporary cache is used" in text for text in observer.warnings) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "tiny.keras", "file", "runs"}
