"""What a photo's bytes tell without decoding (SHA-256, width, height), and a memory of it from run to run.

Reading a hundred thousand photos to hash them takes minutes; the memory makes the second run start at once. It is a
small SQLite file with a row for each path, valid as long as the file's size and times are what they were. It is never
needed: whatever is wrong with it, the photos are read again.
"""

import contextlib
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from finetune_cli import files
from finetune_cli.errors import FinetuneError, StorageError
from finetune_cli.text import shown

NAME = "digests.sqlite"
# Another number for another layout: a file with a different one is set aside and begun anew.
_LAYOUT = 1
_APPLICATION = 0x46544D44  # "FTMD"
_TABLE = "CREATE TABLE IF NOT EXISTS photos (path BLOB PRIMARY KEY, facts BLOB NOT NULL, crc INTEGER NOT NULL)"
_FACTS = struct.Struct("<qqq32sII")  # size, mtime and ctime in nanoseconds, digest, width, height
_BUSY_SECONDS = 10.0
_ROWS_A_WRITE = 1000
# Some file systems keep times to two seconds only: a file written that recently may change again unnoticed.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Facts:
    """`digest` is the SHA-256 of the file's bytes in hexadecimal; width and height are those of the header."""

    digest: str
    width: int
    height: int


def companions(path: Path) -> tuple[Path, Path, Path]:
    """The memory's file, its journal, and where a damaged one is set aside."""
    return path, Path(f"{path}-journal"), Path(f"{path}.damaged")


class DigestMemory:
    """Remembers the `Facts` of good photos in the file `path`; `None` remembers nothing.

    Bad photos are not remembered: they are few, and a repaired one, or a newer Pillow, should count at once. A damaged
    or foreign file is set aside and begun anew; a file that cannot be used at all is done without. `warnings` says so.
    For one thread; several processes may share a file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._waiting: list[tuple[bytes, bytes, int]] = []
        if path is not None:
            self._attempt(self._open)

    def __enter__(self) -> Self:
        """The memory itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is waiting, and close the file."""
        self._attempt(self._write)
        self._close()

    def get(self, photos: Sequence[tuple[Path, os.stat_result]]) -> list[Facts | None]:
        """What is remembered of each file (at most 1000) whose size and times are still those of its status."""
        rows: list[tuple[object, ...]] = []
        if self._connection is not None:
            keys = [_key(path) for path, _status in photos]
            query = f"SELECT path, facts, crc FROM photos WHERE path IN ({', '.join('?' * len(keys))})"  # noqa: S608

            def read() -> None:
                self._open()
                rows.extend(self._execute(query, tuple(keys)))

            self._attempt(read)
        found = {
            key: _FACTS.unpack(facts)
            for key, facts, crc in rows
            if isinstance(key, bytes) and isinstance(facts, bytes) and len(facts) == _FACTS.size
            if crc == _crc(key, facts)
        }
        answers: list[Facts | None] = []
        for path, status in photos:
            row = found.get(_key(path), ())
            valid = row[:3] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            answers.append(Facts(row[3].hex(), row[4], row[5]) if valid else None)
        return answers

    def put(self, path: Path, status: os.stat_result, facts: Facts) -> None:
        """Remember `facts` of the file at `path`, whose `status` was taken before it was read."""
        newest = max(status.st_mtime_ns, status.st_ctime_ns)
        if self._connection is None or time.time_ns() - newest < _SETTLED_NS:
            return
        key = _key(path)
        times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        packed = _FACTS.pack(*times, bytes.fromhex(facts.digest), facts.width, facts.height)
        self._waiting.append((key, packed, _crc(key, packed)))
        if len(self._waiting) >= _ROWS_A_WRITE:
            self._attempt(self._write)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do `action`, twice if the file was damaged, or set aside or disturbed by another process; or give up."""
        try:
            try:
                action()
            except sqlite3.DatabaseError as exc:
                damaged = _is_damage(exc)
                if not (damaged or self._moved() or _code(exc) == sqlite3.SQLITE_IOERR):
                    raise
                self._close()
                if damaged:
                    self._set_aside()
                action()
        except (FinetuneError, OSError, sqlite3.Error) as exc:
            self._give_up(exc)

    def _open(self) -> None:
        if self._connection is not None:
            return
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # SQLite goes by names: who has opened a file that is renamed before the first look at it would play the
            # journal of the new file into the old one. Where the folder may not be written, nothing is renamed.
            with contextlib.suppress(StorageError):
                stack.enter_context(files.lock(self.path.parent, wait=_BUSY_SECONDS))
            self._connect(self.path)

    def _connect(self, path: Path) -> None:
        # Taken first: were the file replaced in between, the new one must not pass for the one that is opened here.
        identity = files.identity(path)
        self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        self._identity = identity or files.identity(path)
        # All that tells whose file it is must be read in one transaction: another process may be beginning it.
        self._execute("BEGIN")
        begun = self._is_begun()
        self._execute("COMMIT")
        if begun:
            return
        self._execute("BEGIN IMMEDIATE")
        self._execute(_TABLE)
        self._execute(f"PRAGMA application_id = {_APPLICATION}")
        self._execute(f"PRAGMA user_version = {_LAYOUT}")
        self._execute("COMMIT")

    def _is_begun(self) -> bool:
        """Whether the file has our table, rather than nothing; raises `_ForeignError` for anything else."""
        marks = tuple(self._execute(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
        if marks == (_APPLICATION, _LAYOUT):
            return True
        if any(marks) or self._execute("SELECT 1 FROM sqlite_master LIMIT 1"):
            raise _ForeignError
        return False

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        return self._connection.execute(statement, values).fetchall() if self._connection is not None else []

    def _write(self) -> None:
        if not self._waiting:
            return
        self._open()
        assert self._connection is not None
        self._execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT OR REPLACE INTO photos VALUES (?, ?, ?)", self._waiting)
        self._execute("COMMIT")
        self._waiting = []

    def _moved(self) -> bool:
        """Whether another process has set the file aside since it was opened."""
        return self.path is not None and files.identity(self.path) != self._identity

    def _set_aside(self) -> None:
        """Rename the closed file, unless another process has done so; the next use opens a new one."""
        assert self.path is not None
        path, journal, aside = companions(self.path)
        with files.lock(path.parent, wait=_BUSY_SECONDS):
            if self._moved():
                return
            # What belongs to the old file would be played back into the new one, so it goes first.
            journal.unlink(missing_ok=True)
            path.replace(aside)
        self.warnings.append(f"the memory of photo digests was damaged: set aside as {aside}, and begun anew")

    def _give_up(self, exc: Exception) -> None:
        self._close()
        self._waiting = []
        self.warnings.append(f"the memory of photo digests {self.path} is not used: {shown(exc)}")

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None


class _ForeignError(sqlite3.DatabaseError):
    """A database, but not one of ours."""


def _is_damage(exc: sqlite3.DatabaseError) -> bool:
    return _code(exc) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB} or isinstance(exc, _ForeignError)


def _code(exc: sqlite3.DatabaseError) -> int:
    """SQLite's primary code of an error."""
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _key(path: Path) -> bytes:
    return os.fsencode(path.absolute())


def _crc(key: bytes, facts: bytes) -> int:
    return zlib.crc32(facts, zlib.crc32(key))
