"""Where converted backbones lie in the cache: a folder each, named by a key, beside the features.

What is in such a folder is the business of `training/converted.py`. Its time of modification is that of its last use.
"""

import contextlib
import os
import stat
from pathlib import Path

from finetune_cli import files, safe_open

NAME = "backbones"
BUSY_SECONDS = 600.0  # as long as another process may take to convert the largest backbone


def entry(cache: Path, key: str) -> Path:
    """The folder of the backbone with this key, whether it exists or not."""
    return cache / NAME / key


def cache_of(entry: Path) -> Path:
    """The cache in which the folder `entry` of a backbone lies."""
    return entry.parent.parent


def make_parent(cache: Path) -> None:
    """Create the folder of all backbones in `cache`. Raises `StorageError`, for a link of that name, too."""
    files.make_folder(cache)
    try:
        with safe_open.open_folder(cache / NAME, cache, make=True):
            pass
    except OSError as exc:
        raise files.storage_error(exc, cache / NAME) from exc


def mark_used(entry: Path) -> None:
    """Note that the backbone in the folder `entry` is used now, where that can be written."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def size(cache: Path) -> tuple[int, int]:
    """How many converted backbones there are, and how many bytes they take."""
    entries = _entries(cache)
    return len(entries), sum(map(_size, entries))


def _entries(cache: Path) -> list[Path]:
    return [path for path in (cache / NAME).glob("*") if path.is_dir() and not path.is_symlink()]


def _size(entry: Path) -> int:
    found = (path.lstat() for path in entry.rglob("*"))
    return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


def prune(cache: Path, max_bytes: int) -> int:
    """Remove converted backbones, those that were not used for the longest first, until they take `max_bytes`.

    Returns the bytes freed. Raises `StorageError` or `RunError`.
    """
    before = left = size(cache)[1]
    if left <= max_bytes or (cache / NAME).is_symlink():
        return 0
    with files.lock(cache / NAME):
        for path in sorted(_entries(cache), key=lambda path: path.lstat().st_mtime):
            if left > max_bytes:
                left -= _size(path)
                files.remove_folder(path, cache)
    return before - left


def clear(cache: Path) -> int:
    """Remove all converted backbones; returns the bytes freed. Raises `StorageError` or `RunError`."""
    _count, freed = size(cache)
    folder = cache / NAME
    if folder.is_symlink() or not folder.is_dir():
        return 0
    with files.lock(folder):
        files.remove_leftovers(folder, cache)
        for path in list(folder.iterdir()):
            if path.is_dir() or path.is_symlink():
                files.remove_folder(path, cache)
    return freed
