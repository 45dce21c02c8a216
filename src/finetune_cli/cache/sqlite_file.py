"""The file of the feature store: how it is opened, begun, recognised, and told from a damaged or foreign one.

    features(id, key, crc, value)   id grows, so the lowest is the oldest; value is little-endian float32
    application_id 0x46744673       so that the file of another program is known as such
    user_version   FORMAT           the format below

SQLite in WAL mode with 4 KB pages: readers and a writer do not wait for each other, a kill loses at most the rows that
were being written, and reads through system calls (never a memory map) make a truncated file an error, not a crash.

Format versions: 1 is the first. For version 2: raise `FORMAT`; a file of another version is set aside like a damaged
one, because features are computed again rather than converted.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

FORMAT = 1
NAME = "features.sqlite"
PAGE = 4096
BUSY_SECONDS = 60.0
_APPLICATION = 0x46744673
_TABLE = (
    "CREATE TABLE features "
    "(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, crc INTEGER NOT NULL, value BLOB NOT NULL)"
)
_DAMAGE = {
    sqlite3.SQLITE_ERROR,  # a changed schema format, or no such table
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
}


class NotOursError(Exception):
    """The file is damaged, of another program or of another version; the text says which."""


# The second one comes where SQLite's own message quotes bytes of a damaged file.
FAULTS = (sqlite3.Error, UnicodeDecodeError)


def is_damage(exc: Exception) -> bool:
    """Whether `exc`, one of `FAULTS`, blames the content of the file, and not the disk, a lock or a permission."""
    if isinstance(exc, UnicodeDecodeError):
        return True
    # Faults of input and output are told apart by SQLite's extended code, all others by the primary one.
    code = getattr(exc, "sqlite_errorcode", 0)
    return (code if code & 0xFF == sqlite3.SQLITE_IOERR else code & 0xFF) in _DAMAGE


def is_busy(exc: Exception) -> bool:
    """Whether another process held the file for longer than `BUSY_SECONDS`."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def connect(path: Path) -> sqlite3.Connection:
    """Open the store at `path` for reading and writing; create it if there is nothing.

    Raises `NotOursError`, or `sqlite3.Error` for a fault that is not the file's.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with _judged():
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            if _is_empty(connection):
                connection.execute(f"PRAGMA page_size = {PAGE}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                connection.execute(_TABLE)
                connection.execute("COMMIT")
            _check_identity(connection)
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            # The log is not fsynced at every commit: a power cut may lose the newest rows, and damages none.
            connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open the store at `path` for reading only, leaving nothing behind. Raises as `connect` does."""
    log = companions(path)[2]
    if not log.exists() or not log.stat().st_size:
        return connect_immutable(path)  # SQLite would make an empty log and leave it there
    return _checked(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS))


def connect_immutable(path: Path) -> sqlite3.Connection:
    """Open the store at `path` without any lock or companion file. Raises as `connect` does.

    A process on another machine may write at the same time: the rows that this tears fail their CRC.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    return _checked(sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False))


def _checked(connection: sqlite3.Connection) -> sqlite3.Connection:
    try:
        with _judged():
            connection.execute("PRAGMA trusted_schema = OFF")
            _check_identity(connection)
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


def _check_identity(connection: sqlite3.Connection) -> None:
    """Raise `NotOursError` unless the file has our mark, our format and our table, and no trigger or view besides."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise NotOursError("was made by another program")
    if connection.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
        raise NotOursError("was made by another version of finetune-cli")
    connection.text_factory = bytes  # text in a damaged file need not be decodable
    if connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall() != [(_TABLE.encode(),)]:
        raise NotOursError("is damaged")


def companions(path: Path) -> tuple[Path, Path, Path]:
    """The file, its shared index and its write-ahead log."""
    return path, Path(f"{path}-shm"), Path(f"{path}-wal")
