"""The feature store: `bytes` key -> `float32 (D,)`, in one SQLite file that several processes may use at once.

A cache must never cost a run: whatever happens to the file, reading gives fewer rows and writing stops, with a warning
in `FeatureStore.warnings`, and the features are computed again. A damaged, truncated or foreign file is set aside
under another name and begun anew; a damaged row (its CRC covers key and value) is not returned and is overwritten.
`cachefile.py` knows the file.
"""

import contextlib
import sqlite3
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.cache import sqlite_file
from finetune_cli.cache.sqlite_file import BUSY_SECONDS, FAULTS, NAME, PAGE, NotOursError, companions
from finetune_cli.errors import FinetuneError, StorageError

_KEYS_A_QUERY = 1000


def default_folder() -> Path:
    """The user's cache folder for this program."""
    from platformdirs import user_cache_path

    return user_cache_path("finetune-cli", appauthor=False)


class FeatureStore:
    """The features in `folder`; a context manager, safe to use from several threads.

    Opening never fails: a store that cannot be opened or written works without what it lacks, and `warnings` says so.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.warnings: list[str] = []
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._writable = True
        self._rebuilt = False
        self._open()

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; `warnings` stays readable."""
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(*FAULTS):
                    self._connection.close()
            self._connection = None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The rows of those `keys` that are present and undamaged, as read-only arrays."""
        found: dict[bytes, NDArray[np.float32]] = {}
        for key, crc, value in self._select("SELECT key, crc, value FROM features WHERE key IN", keys):
            if isinstance(value, bytes) and len(value) % 4 == 0 and _crc(key, value) == crc:
                found[key] = np.frombuffer(value, "<f4")
        return found

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` that are present; `get` may still leave out one whose value is damaged."""
        return {row[0] for row in self._select("SELECT key FROM features WHERE key IN", keys)}

    def put(self, items: Sequence[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Store `items` in one transaction, over what the keys had before.

        When the disk is full or another fault stops the writing, a warning says so and nothing is stored from then on.
        """
        rows = []
        for key, array in items:
            value = np.ascontiguousarray(array, "<f4").tobytes()
            rows.append((key, _crc(key, value), value))
        with self._lock:
            for _attempt in range(2):
                if not rows or not self._writable or self._connection is None:
                    return
                try:
                    self._insert(self._connection, rows)
                except FAULTS as exc:
                    if self._failed(exc, sum(len(row[2]) for row in rows)):
                        continue
                return

    def size(self) -> int:
        """Bytes that the store takes on the disk."""
        return sum(_size(path) for path in companions(self.path))

    def _select(self, query: str, keys: Sequence[bytes]) -> list[tuple[bytes, int, bytes]]:
        rows: list[tuple[bytes, int, bytes]] = []
        with self._lock:
            for start in range(0, len(keys), _KEYS_A_QUERY):
                some = keys[start : start + _KEYS_A_QUERY]
                try:
                    if self._connection is not None:
                        rows += self._connection.execute(f"{query} ({','.join('?' * len(some))})", some)
                except FAULTS as exc:
                    self._failed(exc, 0)
        return rows

    def _insert(self, connection: sqlite3.Connection, rows: list[tuple[bytes, int, bytes]]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("INSERT OR REPLACE INTO features (key, crc, value) VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
        except BaseException:  # an interrupt, too, must not leave the transaction open
            if connection.in_transaction:
                with contextlib.suppress(*FAULTS):
                    connection.execute("ROLLBACK")
            raise

    def _open(self) -> None:
        try:
            files.make_folder(self.path.parent)
            with files.lock(self.path.parent, wait=BUSY_SECONDS):
                try:
                    self._connect()
                except NotOursError as exc:
                    self._set_aside(str(exc))
                    self._connect()
        except (FinetuneError, OSError, *FAULTS, NotOursError) as exc:
            self._read_only(exc)

    def _connect(self) -> None:
        self._connection = sqlite_file.connect(self.path)
        self._identity = files.identity(self.path)

    def _failed(self, exc: Exception, size: int) -> bool:
        """Go on after a fault, without writing or with a new file; whether it is a new file, worth another try.

        `size`: how many bytes were to be written, 0 for a fault in reading.
        """
        if sqlite_file.is_damage(exc) and self._writable and not self._rebuilt:
            self._rebuild()
            return self._writable
        if sqlite_file.is_busy(exc):
            self._warn(f"the feature cache {self.path} was locked for {BUSY_SECONDS:.0f} s; some rows were not stored")
        elif size:
            self._writable = False
            self._warn(
                f"the feature cache {self.path} cannot be written ({exc}; at least {files.human_bytes(size)} more are "
                "needed), so new features are not kept for other runs; free some space, or set runtime.cache_dir to "
                "another disk"
            )
        else:
            self._writable = False
            self.close()
            self._warn(f"the feature cache {self.path} cannot be read any more ({exc}); features are computed anew")
        return False

    def _rebuild(self) -> None:
        self._rebuilt = True
        self.close()
        try:
            with files.lock(self.path.parent, wait=BUSY_SECONDS):
                if files.identity(self.path) == self._identity:  # else another process has set it aside already
                    self._set_aside("is damaged")
        except (FinetuneError, OSError) as exc:
            self._read_only(exc)
        else:
            self._open()

    def _read_only(self, exc: Exception) -> None:
        """Read what can be read of a file in a folder that cannot be written."""
        self.close()
        self._writable = False
        reason = exc.problem if isinstance(exc, FinetuneError) else str(exc)
        with contextlib.suppress(*FAULTS, NotOursError):
            self._connection = sqlite_file.connect_immutable(self.path)
        use = "it is only read" if self._connection is not None else "features are not kept for other runs"
        self._warn(f"the feature cache {self.path} cannot be written ({reason}); {use}")

    def _set_aside(self, reason: str) -> None:
        """Rename the file and its companions; the caller holds the lock."""
        self.close()
        number = 1
        while (target := self.path.with_name(f"{NAME}.damaged-{number}")).exists():
            number += 1
        # The write-ahead log goes first: next to a new file it would be played into that.
        for old, new in reversed(list(zip(companions(self.path), companions(target), strict=True))):
            if old.exists():
                old.replace(new)
        self._warn(f"the feature cache {self.path} {reason}; it was set aside as {target.name} and is built anew")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class CacheInfo:
    """What `info` tells: `rows` features in `size` bytes, files set aside as damaged with `aside_size` bytes.

    `problem` is empty, or says why the rows cannot be counted.
    """

    path: Path
    rows: int
    size: int
    aside: tuple[Path, ...]
    aside_size: int
    problem: str = ""


def info(folder: Path) -> CacheInfo:
    """Look at the store in `folder` without changing it."""
    path = folder / NAME
    aside = _aside(folder)
    size = sum(map(_size, companions(path)))  # before SQLite makes an empty log to look into the file
    rows, problem = 0, ""
    if path.exists():
        try:
            with contextlib.closing(sqlite_file.connect_reader(path)) as connection:
                rows = connection.execute("SELECT count(*) FROM features").fetchone()[0]
        except (*FAULTS, NotOursError, OSError) as exc:
            problem = f"{path} {exc}" if isinstance(exc, NotOursError) else f"{path} cannot be read: {exc}"
    return CacheInfo(path, rows, size, aside, sum(map(_size, aside)), problem)


def clear(folder: Path, more: Sequence[Path] = ()) -> int:
    """Remove the store, what was set aside, and `more` files of the folder; returns the bytes freed.

    A run that uses them keeps what it opened.

    Raises `StorageError` when the folder cannot be written, `RunError` when another process blocks it.
    """
    return _remove([*companions(folder / NAME), *_aside(folder), *more], folder)


def prune(folder: Path, max_bytes: int) -> int:
    """Make the store at most `max_bytes` large, oldest features first, and return the bytes freed.

    What was set aside goes in any case. Raises `StorageError` or `RunError` as `clear` does.
    """
    path = folder / NAME
    freed = _remove(_aside(folder), folder)
    before = sum(map(_size, companions(path)))
    if before <= max_bytes:
        return freed
    try:
        with contextlib.closing(sqlite_file.connect(path)) as connection:
            _shrink(connection, max_bytes)
    except (*FAULTS, NotOursError) as exc:
        # Deleting rows takes some space of its own before it gives any back.
        remedy = "free a few MB first, or remove it with: finetune cache clear"
        raise StorageError(f"{path} cannot be pruned: {exc}", remedy) from exc
    return freed + before - sum(map(_size, companions(path)))


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


def _aside(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob(f"{NAME}.damaged-*")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove(paths: Sequence[Path], folder: Path) -> int:
    freed = 0
    if not any(path.exists() for path in paths):
        return freed
    with files.lock(folder, wait=BUSY_SECONDS):
        for path in reversed(paths):
            size = _size(path)
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise files.storage_error(exc, path) from exc
            freed += size
    return freed
