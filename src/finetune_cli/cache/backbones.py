"""Where converted backbones lie in the cache: a folder each, named by a key, beside the features.

What is in such a folder is the business of `training/converted.py`.
"""

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


def size(cache: Path) -> tuple[int, int]:
    """How many converted backbones there are, and how many bytes they take."""
    entries = [path for path in (cache / NAME).glob("*") if path.is_dir() and not path.is_symlink()]
    found = [path.lstat() for entry in entries for path in entry.rglob("*")]
    return len(entries), sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


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
