"""Where the caches are: the user's folder, a private one inside a shared folder, or a temporary one.

Whoever can write a cache's rows decides the numbers that come from them, so nobody else may be able to put files where
ours are: in a folder that others can write to, or that is another user's, everyone has a folder ``user-UID``.
"""

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import StorageError

_CHOOSE = "set runtime.cache_dir to a folder that you can write to"


@dataclass(frozen=True)
class CacheFolder:
    """The caches are in `path`; scratch files go to `scratch`, which is another folder if `path` can only be read.

    `warning` is empty, or says that nothing is stored for other runs, and why.
    """

    path: Path
    scratch: Path
    warning: str = ""

    @property
    def writable(self) -> bool:
        """Whether anything can be stored in `path`."""
        return self.path == self.scratch


def default_folder() -> Path:
    """The user's cache folder for this program. Raises `StorageError` for a user without a home directory."""
    from platformdirs import user_cache_path

    with contextlib.suppress(RuntimeError):  # where earlier versions of platformdirs return a path with a ~
        folder = user_cache_path("finetune-cli", appauthor=False)
        if folder.is_absolute():
            return folder
    raise StorageError("there is no home directory for the cache: HOME is not set", _CHOOSE)


def own_folder(asked: Path | None) -> Path:
    """The folder of this user's caches for `asked`, by default the user's cache folder; nothing is created.

    Raises `StorageError` as `default_folder` does.
    """
    folder = asked or default_folder()
    if not hasattr(os, "geteuid"):
        return folder
    try:
        status = folder.stat()
    except OSError:  # who creates it will own it
        return folder
    return folder if _only_ours(status) else folder / f"user-{os.geteuid()}"


def locate(asked: Path | None) -> CacheFolder:
    """Find or create the folder of this user's caches for `asked`, by default the user's cache folder.

    If it cannot be written, it is only read, or else replaced by a temporary folder until the process ends.
    Raises `StorageError` when there is no room for that either.
    """
    folder: Path | None = None
    try:
        # Twice: where a file system has no modes (FAT), the new folder, too, is open to others.
        for _ in range(2):
            folder = own_folder(asked)
            files.make_folder(folder, 0o755)
        assert folder is not None
        if not _is_ours(folder):
            raise StorageError(f"{folder} belongs to another user", _CHOOSE)
        files.check_writable(folder)
    except StorageError as exc:
        return _instead(folder, exc)
    except OSError as exc:
        assert folder is not None
        return _instead(folder, files.storage_error(exc, folder))
    return CacheFolder(folder, folder)


def _instead(folder: Path | None, problem: StorageError) -> CacheFolder:
    try:
        temporary = _temporary_folder()
    except OSError as exc:
        raise StorageError(f"{problem.problem}; and there is no temporary folder either", _CHOOSE) from exc
    if folder is not None and _holds_a_cache(folder):
        return CacheFolder(folder, temporary, f"{problem.problem}: the cache is only read; to store more, {_CHOOSE}")
    warning = f"{problem.problem}: a temporary cache is used, which is removed at the end; to keep it, {_CHOOSE}"
    return CacheFolder(temporary, temporary, warning)


def _only_ours(status: os.stat_result) -> bool:
    """Whether a folder is this user's or root's, and nobody else can put files in it."""
    others = stat.S_IWOTH
    # Many systems give every user a group of his own, and let it write (umask 002).
    if status.st_uid != os.geteuid() or status.st_gid != os.getegid():
        others |= stat.S_IWGRP
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & others


def _is_ours(folder: Path) -> bool:
    """Whether `folder`, and the link if it is one, is this user's or root's. Raises `OSError`."""
    if not hasattr(os, "geteuid"):
        return True
    return {folder.lstat().st_uid, folder.stat().st_uid} <= {0, os.geteuid()}


def _holds_a_cache(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return _is_ours(folder) and any(folder.glob("*.sqlite"))
    return False


@functools.cache
def _temporary_folder() -> Path:
    """A folder for as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-cli-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
