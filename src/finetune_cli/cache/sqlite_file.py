"""An SQLite file of ours: opened, recognised, created, locked, and set aside when it is damaged or foreign.

Both caches (features, and digests of photos) are such files: one table of rows that can be computed again. A cache must
never cost a run: whatever happens to its file, reading gives fewer rows and writing stops, with a warning.

    application_id, user_version   the mark and the format of a `Kind`: recognises another program's file
    one table, nothing else        a trigger, a view or another column means that somebody changed the file

SQLite in WAL mode with 4 KB pages: readers and a writer do not wait for each other, a kill loses at most the rows that
were being written, and reads through system calls (never a memory map) make a truncated file an error, not a crash.

A new format: raise `Kind.format`. A file of another format is set aside like a damaged one, because rows are computed
again rather than converted.
"""

import contextlib
import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli import files, safe_open
from finetune_cli.errors import FinetuneError

PAGE = 4096
BUSY_SECONDS = 60.0
_KEYS_A_QUERY = 1000
_DAMAGE = {
    sqlite3.SQLITE_ERROR,  # a changed schema format, or no such table
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
}
# The second one comes where SQLite's own message quotes bytes of a damaged file.
FAULTS = (sqlite3.Error, UnicodeDecodeError)


@dataclass(frozen=True)
class Kind:
    """Identifies a kind of file; `title` is its name in messages, such as "the feature cache".

    table: the CREATE TABLE statement, which must be the whole schema of the file.
    """

    name: str
    title: str
    application: int
    format: int
    table: str


class NotOursError(Exception):
    """The file is damaged, or not one of ours; the text says why, and continues a sentence that names the file."""


def is_damage(exc: Exception) -> bool:
    """Whether `exc`, one of `FAULTS`, blames the content of the file, and not the disk, a lock or a permission."""
    if isinstance(exc, UnicodeDecodeError):
        return True
    # Input and output errors are distinguished by SQLite's extended code, all others by the primary one.
    code = getattr(exc, "sqlite_errorcode", 0)
    return (code if code & 0xFF == sqlite3.SQLITE_IOERR else code & 0xFF) in _DAMAGE


def is_busy(exc: Exception) -> bool:
    """Whether another process held the file for longer than `BUSY_SECONDS`."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


class SqliteFile:
    """The file of a `kind` in `folder`; safe to use from several threads, and by several processes.

    Opening never fails: a file that cannot be opened or written works without what it lacks, and `warnings` says so.
    A damaged or foreign file is renamed, and a new one is started. `writable` False: the caller knows, and has
    reported, that nothing can be written in `folder`; the file is only read.
    """

    def __init__(self, folder: Path, kind: Kind, writable: bool = True) -> None:
        self.kind = kind
        self.path = folder / kind.name
        self.warnings: list[str] = []
        self.writable = writable
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._rebuilt = False
        if writable:
            self._open()
        else:
            self._open_read_only()

    def close(self) -> None:
        """Close the file; `warnings` stays readable."""
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(*FAULTS):
                    self._connection.close()
            self._connection = None

    def select(self, query: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
        """The rows of `query`, which ends in ``IN``, for any number of `keys`; after a fault, fewer."""
        rows: list[tuple[Any, ...]] = []
        with self._lock:
            for start in range(0, len(keys), _KEYS_A_QUERY):
                some = keys[start : start + _KEYS_A_QUERY]
                try:
                    if self._connection is not None:
                        rows += self._connection.execute(f"{query} ({','.join('?' * len(some))})", some)
                except FAULTS as exc:
                    self._failed(exc, 0)
        return rows

    def write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Execute `statement` for each of `rows`, in one transaction.

        When the disk is full or another fault stops the writing, a warning says so and nothing is written from then on.
        """
        size = sum(len(value) for row in rows for value in row if isinstance(value, bytes))
        with self._lock:
            for _attempt in range(2):
                if not rows or not self.writable or self._connection is None:
                    return
                try:
                    _execute(self._connection, statement, rows)
                except FAULTS as exc:
                    if self._failed(exc, size):
                        continue
                return

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
            self._only_read(exc)

    def _connect(self) -> None:
        self._connection = connect(self.path, self.kind)
        self._identity = _identity_of(self.path)

    def _failed(self, exc: Exception, size: int) -> bool:
        """Continue after a fault, without writing or with a new file; returns whether to retry with a new file.

        `size`: how many bytes were to be written, 0 for a fault in reading.
        """
        gone = _identity_of(self.path) != self._identity  # another process has set it aside, or cleared the cache
        if (is_damage(exc) or gone) and self.writable and not self._rebuilt:
            self._rebuild()
            return self.writable
        name = f"{self.kind.title} {self.path}"
        if is_busy(exc):
            self._warn(f"{name} was locked for {BUSY_SECONDS:.0f} s; some rows were not stored")
        elif size:
            self.writable = False
            self._warn(
                f"{name} cannot be written ({exc}; at least {files.human_bytes(size)} more are needed), so nothing new "
                "is stored for other runs; free some space, or set runtime.cache_dir to another disk"
            )
        else:
            self.writable = False
            self.close()
            self._warn(f"{name} can no longer be read ({exc}); its content is computed again")
        return False

    def _rebuild(self) -> None:
        self._rebuilt = True
        self.close()
        try:
            with files.lock(self.path.parent, wait=BUSY_SECONDS):
                if _identity_of(self.path) == self._identity:  # else another process has already set it aside
                    self._set_aside("is damaged")
        except (FinetuneError, OSError) as exc:
            self._only_read(exc)
        else:
            self._open()

    def _only_read(self, exc: Exception) -> None:
        """Read what can be read of a file that cannot be written, because of `exc`."""
        self._open_read_only()
        reason = exc.problem if isinstance(exc, FinetuneError) else str(exc)
        use = "it is only read" if self._connection is not None else "nothing new is stored for other runs"
        self._warn(f"{self.kind.title} {self.path} cannot be written ({reason}); {use}")

    def _open_read_only(self) -> None:
        self.close()
        self.writable = False
        with contextlib.suppress(OSError, *FAULTS, NotOursError):
            self._connection = connect_immutable(self.path, self.kind)

    def _set_aside(self, reason: str) -> None:
        """Rename the file and its companions; the caller holds the lock of the folder."""
        self.close()
        number = 1
        while os.path.lexists(target := self.path.with_name(f"{self.kind.name}.damaged-{number}")):
            number += 1
        # The logs go first: next to a new file they would be played into that.
        for old, new in reversed(list(zip(companions(self.path), companions(target), strict=True))):
            if os.path.lexists(old):
                old.replace(new)
        self._warn(
            f"{self.kind.title} {self.path} {reason}; it was set aside as {target.name}, and a new one is started"
        )

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def connect(path: Path, kind: Kind) -> sqlite3.Connection:
    """Open the file at `path` for reading and writing; create it if there is nothing.

    The caller holds the lock of the folder: SQLite goes by names, so who has opened a file that is renamed before the
    first look at it would play the log of the new file into the old one.

    Raises `NotOursError`, or `sqlite3.Error` or `OSError` for a fault that is not the file's.
    """
    _check_files(path)
    # SQLite itself would make it through a link that was put there a moment ago.
    with contextlib.suppress(OSError):  # of a folder that cannot be written: SQLite says so
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    connection = _open(path, "mode=rw", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with _judged():
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            if _is_empty(connection):
                connection.execute(f"PRAGMA page_size = {PAGE}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA application_id = {kind.application}")
                connection.execute(f"PRAGMA user_version = {kind.format}")
                connection.execute(kind.table)
                connection.execute("COMMIT")
            _check_identity(connection, kind)
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            # The log is not fsynced at every commit: a power cut may lose the newest rows, and damages none.
            connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path, kind: Kind) -> sqlite3.Connection:
    """Open the file at `path` for reading only, leaving nothing behind. Raises as `connect` does."""
    log = companions(path)[2]
    if not log.exists() or not log.stat().st_size:
        return connect_immutable(path, kind)  # SQLite would make an empty log and leave it there
    _check_files(path)
    return _checked(_open(path, "mode=ro", timeout=BUSY_SECONDS), kind)


def connect_immutable(path: Path, kind: Kind) -> sqlite3.Connection:
    """Open the file at `path` without any lock or companion file. Raises as `connect` does.

    A process on another machine may write at the same time: the rows that this tears fail their CRC.
    """
    _check_files(path)
    return _checked(_open(path, "mode=ro&immutable=1", isolation_level=None, check_same_thread=False), kind)


def companions(path: Path) -> tuple[Path, Path, Path, Path]:
    """The file, its shared index, its write-ahead log, and the journal of a file that is not in WAL mode."""
    return path, Path(f"{path}-shm"), Path(f"{path}-wal"), Path(f"{path}-journal")


def aside(folder: Path, kind: Kind) -> tuple[Path, ...]:
    """What was set aside in `folder`."""
    return tuple(sorted(folder.glob(f"{kind.name}.damaged*")))


def size(paths: Sequence[Path]) -> int:
    """Bytes that those of `paths` that exist take on the disk."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def remove(paths: Sequence[Path], folder: Path) -> int:
    """Remove those of `paths` that exist, under the lock of `folder`; returns the bytes freed.

    Raises `StorageError` when the folder cannot be written, `RunError` when another process blocks it.
    """
    freed = 0
    if not any(map(os.path.lexists, paths)):
        return freed
    with files.lock(folder, wait=BUSY_SECONDS):
        for path in reversed(paths):
            bytes_here = size([path])
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise files.storage_error(exc, path) from exc
            freed += bytes_here
    return freed


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Device and inode, which change when another file replaces the one at `path`; `None` if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _execute(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(statement, rows)
        connection.execute("COMMIT")
    except BaseException:  # an interrupt, too, must not leave the transaction open
        if connection.in_transaction:
            with contextlib.suppress(*FAULTS):
                connection.execute("ROLLBACK")
        raise


def _open(path: Path, query: str, **options: Any) -> sqlite3.Connection:
    """As `sqlite3.connect`, with the parameters `query` of a URI, and only if it opens the file of that name.

    SQLite goes by names and follows links, but it resolves them when it opens a database, and can be asked which file
    it has opened. Nothing was read or written until then. Raises `NotOursError` and `sqlite3.Error`.
    """
    try:
        connection: sqlite3.Connection = sqlite3.connect(f"{path.absolute().as_uri()}?{query}", uri=True, **options)
    except sqlite3.OperationalError:
        _check_files(path)  # it may have been replaced by a link to nothing
        raise
    try:
        if _is_elsewhere(connection, path):
            raise NotOursError("is a symbolic link")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_elsewhere(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether SQLite has opened another file than that of the name `path`: it was replaced by a link meanwhile."""
    if os.name == "nt":
        return False
    connection.text_factory = bytes  # a path need not be UTF-8
    opened = connection.execute("PRAGMA database_list").fetchone()[2]
    connection.text_factory = str
    # The second is how a SQLite without readlink(2) spells it.
    names = (os.path.join(os.path.realpath(path.parent), path.name), os.path.abspath(path))  # noqa: PTH100, PTH118
    return opened not in [os.fsencode(name) for name in names]


def _check_files(path: Path) -> None:
    """Raise `NotOursError` for a file or log that somebody else can choose or that leads out of the folder.

    That is a file of another user, a link, a second name (a hard link) of another file, a pipe. Raises `OSError` for a
    folder, which is never moved away.
    """
    for part in companions(path):
        try:
            status = part.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(part))
        which = "" if part == path else f"has a companion, {part.name}, that "
        if safe_open.is_link(status):
            raise NotOursError(f"{which}is a symbolic link")
        if not stat.S_ISREG(status.st_mode):
            raise NotOursError(f"{which}is not a regular file")
        if status.st_nlink > 1:
            raise NotOursError(f"{which}has a second name (a hard link)")
        if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
            raise NotOursError(f"{which}belongs to another user")


def _checked(connection: sqlite3.Connection, kind: Kind) -> sqlite3.Connection:
    try:
        with _judged():
            connection.execute("PRAGMA trusted_schema = OFF")
            _check_identity(connection, kind)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    try:
        yield
    except FAULTS as exc:
        if is_damage(exc):
            raise NotOursError("is damaged") from exc
        raise


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return not tables and connection.execute("PRAGMA application_id").fetchone()[0] == 0


def _check_identity(connection: sqlite3.Connection, kind: Kind) -> None:
    """Raise `NotOursError` unless the file has our mark, our format and our table, and no trigger or view besides."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != kind.application:
        raise NotOursError("was made by another program")
    if connection.execute("PRAGMA user_version").fetchone()[0] != kind.format:
        raise NotOursError("was made by another version of finetune-cli")
    connection.text_factory = bytes  # text in a damaged file need not be decodable
    if connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall() != [(kind.table.encode(),)]:
        raise NotOursError("is damaged")
