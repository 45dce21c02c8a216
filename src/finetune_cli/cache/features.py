"""The feature store: `bytes` key -> `float32 (D,)`, in one SQLite file that several processes may use at once.

A cache must never cost a run: whatever happens to the file, reading gives fewer rows and writing stops, with a warning
in `FeatureStore.warnings`, and the features are computed again. A damaged row (its CRC covers key and value) is not
returned and is overwritten. `sqlite_file.py` opens and recovers the file.

    features(id, key, crc, value)   id grows, so the lowest is the oldest; value is little-endian float32
"""

import contextlib
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.cache import sqlite_file
from finetune_cli.cache.sqlite_file import FAULTS, PAGE, NotOursError, SqliteFile, companions
from finetune_cli.errors import StorageError

KIND = sqlite_file.Kind(
    "features.sqlite",
    "the feature cache",
    0x46744673,  # "FtFs"
    1,
    "CREATE TABLE features "
    "(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, crc INTEGER NOT NULL, value BLOB NOT NULL)",
)


class FeatureStore:
    """The features in `folder`; a context manager, safe to use from several threads.

    Opening never fails: a store that cannot be opened or written works without what it lacks, and `warnings` says so.
    `writable` False: the caller knows that nothing can be written in `folder`. prove: called before anything is stored,
    as often as that; raises when what was computed is not to be kept.
    """

    def __init__(self, folder: Path, writable: bool = True, prove: Callable[[], object] = lambda: None) -> None:
        self._file = SqliteFile(folder, KIND, writable)
        self._prove = prove

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the file."""
        return self._file.warnings

    @property
    def writable(self) -> bool:
        """Whether new features are stored."""
        return self._file.writable

    def close(self) -> None:
        """Close the file; `warnings` stays readable."""
        self._file.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The rows of those `keys` that are present and undamaged, as read-only arrays."""
        found: dict[bytes, NDArray[np.float32]] = {}
        for key, crc, value in self._file.select("SELECT key, crc, value FROM features WHERE key IN", keys):
            if isinstance(value, bytes) and len(value) % 4 == 0 and _crc(key, value) == crc:
                found[key] = np.frombuffer(value, "<f4")
        return found

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` that are present; `get` may still leave out one whose value is damaged."""
        return {row[0] for row in self._file.select("SELECT key FROM features WHERE key IN", keys)}

    def put(self, items: Sequence[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Store `items` in one transaction, over what the keys had before.

        When the disk is full or another fault stops the writing, a warning says so and nothing is stored from then on.
        Raises what `prove` raises.
        """
        if not items:
            return
        self._prove()
        rows = []
        for key, array in items:
            value = np.ascontiguousarray(array, "<f4").tobytes()
            rows.append((key, _crc(key, value), value))
        self._file.write("INSERT OR REPLACE INTO features (key, crc, value) VALUES (?, ?, ?)", rows)

    def size(self) -> int:
        """Bytes that the store takes on the disk."""
        return sqlite_file.size(companions(self._file.path))


@dataclass(frozen=True)
class CacheInfo:
    """The result of `info`: `rows` features in `size` bytes, files set aside as damaged with `aside_size` bytes.

    `problem` is empty, or the reason why the rows cannot be counted.
    """

    path: Path
    rows: int
    size: int
    aside: tuple[Path, ...]
    aside_size: int
    problem: str = ""


def info(folder: Path) -> CacheInfo:
    """Look at the store in `folder` without changing it."""
    path = folder / KIND.name
    aside = sqlite_file.aside(folder, KIND)
    size = sqlite_file.size(companions(path))  # before SQLite makes an empty log to look into the file
    rows, problem = 0, ""
    if path.exists():
        try:
            with contextlib.closing(sqlite_file.connect_reader(path, KIND)) as connection:
                rows = connection.execute("SELECT count(*) FROM features").fetchone()[0]
        except (*FAULTS, NotOursError, OSError) as exc:
            problem = f"{path} {exc}" if isinstance(exc, NotOursError) else f"{path} cannot be read: {exc}"
    return CacheInfo(path, rows, size, aside, sqlite_file.size(aside), problem)


def clear(folder: Path) -> int:
    """Remove the store and what was set aside; returns the bytes freed. A run that uses them keeps what it opened.

    Raises `StorageError` when the folder cannot be written, `RunError` when another process blocks it.
    """
    return sqlite_file.remove([*companions(folder / KIND.name), *sqlite_file.aside(folder, KIND)], folder)


def prune(folder: Path, max_bytes: int) -> int:
    """Make the store at most `max_bytes` large, oldest features first, and return the bytes freed.

    What was set aside goes in any case. Raises `StorageError` or `RunError` as `clear` does.
    """
    path = folder / KIND.name
    freed = sqlite_file.remove(sqlite_file.aside(folder, KIND), folder)
    before = sqlite_file.size(companions(path))
    if before <= max_bytes:
        return freed
    try:
        with files.lock(folder, wait=sqlite_file.BUSY_SECONDS):
            connection = sqlite_file.connect(path, KIND)
        with contextlib.closing(connection):
            _shrink(connection, max_bytes)
    except (*FAULTS, NotOursError, OSError) as exc:
        # Deleting rows takes some space of its own before it gives any back.
        remedy = "free a few MB first, or remove it with: finetune cache clear"
        raise StorageError(f"{path} cannot be pruned: {exc}", remedy) from exc
    return freed + before - sqlite_file.size(companions(path))


def _shrink(connection: sqlite3.Connection, max_bytes: int) -> None:
    """Delete the oldest rows until the pages in use fit, then give the free pages back to the disk."""

    def pragma(name: str) -> int:
        return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

    def used() -> int:
        return PAGE * (pragma("page_count") - pragma("freelist_count"))

    while (surplus := used() - max_bytes) > 0:
        rows = connection.execute("SELECT count(*) FROM features").fetchone()[0]
        if not rows:
            break
        # Small transactions, so that a run which writes at the same time waits for a moment only.
        number = min(1000, max(1, rows * surplus // used()))
        connection.execute(
            "DELETE FROM features WHERE id <= (SELECT id FROM features ORDER BY id LIMIT 1 OFFSET ?)", (number - 1,)
        )
    while pragma("freelist_count"):
        before = pragma("page_count")
        connection.execute("PRAGMA incremental_vacuum(2000)").fetchall()
        if pragma("page_count") == before:
            break
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _crc(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))
