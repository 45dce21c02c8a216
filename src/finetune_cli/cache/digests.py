"""Facts about a photo that need no decoding (SHA-256, width, height), and a cache of them between runs.

Reading a hundred thousand photos to hash them takes minutes; the digest cache makes the second run start at once. It is
a small SQLite file with a row for each path, valid as long as the file's device, inode, size and times are what they
were, and used only on file systems that keep ctime (`mounts.py`). It is optional: whenever something is wrong with it,
the photos are read again. `sqlite_file.py` opens and recovers the file.
"""

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune_cli.cache import sqlite_file
from finetune_cli.cache.mounts import ChangeTimes
from finetune_cli.cache.sqlite_file import SqliteFile

KIND = sqlite_file.Kind(
    "digests.sqlite",
    "the digest cache",
    0x46544D44,  # "FTMD"
    2,
    "CREATE TABLE photos (path BLOB PRIMARY KEY, facts BLOB NOT NULL, crc INTEGER NOT NULL)",
)
_FACTS = struct.Struct("<QQqqq32sII")  # device, inode, size, mtime and ctime in nanoseconds, digest, width, height
_VERSION = struct.Struct("<QQqqq")  # of an object in a store, in place of the first five
_Identity = tuple[int, int, int, int, int]
_ROWS_A_WRITE = 1000
# Some file systems keep times to two seconds only: a file written that recently may change again unnoticed.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Facts:
    """`digest` is the SHA-256 of the file's bytes in hexadecimal; width and height are those of the header."""

    digest: str
    width: int
    height: int


class DigestCache:
    """Stores the `Facts` of good photos in `folder`; with `None`, nothing is stored.

    Bad photos are not stored: they are few, and a repaired photo, or a newer Pillow, should count at once. If the file
    cannot be used at all, `warnings` reports it, and there is no cache. For one thread; several processes may share a
    file. `writable` False: the caller knows that nothing can be written in `folder`. `fresh`: the rows were found to be
    wrong, so those of the requested photos are dropped.
    """

    def __init__(self, folder: Path | None, writable: bool = True, fresh: bool = False) -> None:
        self._file = None if folder is None else SqliteFile(folder, KIND, writable)
        self._fresh = fresh
        self._change_times = ChangeTimes()
        self._waiting: list[tuple[bytes, bytes, int]] = []

    def __enter__(self) -> Self:
        """The cache itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is waiting, and close the file."""
        self._write()
        if self._file is not None:
            self._file.close()

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the file."""
        return [] if self._file is None else self._file.warnings

    def get(self, photos: Sequence[tuple[Path, os.stat_result]]) -> list[Facts | None]:
        """The facts of each file whose status is unchanged, on a file system with a trusted ctime; else `None`."""
        if self._file is None:
            return [None] * len(photos)
        keys = [_key(path) for path, _status in photos]
        found = self._rows(keys)
        answers: list[Facts | None] = []
        for key, (path, status) in zip(keys, photos, strict=True):
            row = found.get(key, ())
            valid = row[:5] == _identity(status) and self._change_times.trusted(path, status.st_dev)
            answers.append(Facts(row[5].hex(), row[6], row[7]) if valid else None)
        return answers

    def put(self, path: Path, status: os.stat_result, facts: Facts) -> None:
        """Store `facts` of the file at `path`, whose `status` was taken before it was read."""
        newest = max(status.st_mtime_ns, status.st_ctime_ns)
        if self._file is None or time.time_ns() - newest < _SETTLED_NS:
            return
        if not self._change_times.trusted(path, status.st_dev):
            return
        self._store(_key(path), _identity(status), facts)

    def objects(self, addresses: Sequence[str]) -> list["Recorded | None"]:
        """What is recorded of objects in a store; it counts only for the version that it was recorded of."""
        if self._file is None or not addresses:
            return [None] * len(addresses)
        keys = [address.encode("utf-8", "surrogateescape") for address in addresses]
        found = self._rows(keys)
        return [Recorded(row[:5], Facts(row[5].hex(), *row[6:])) if (row := found.get(key)) else None for key in keys]

    def put_object(self, address: str, version: str, facts: Facts) -> None:
        """Store `facts` of the object at `address`, which were read of this version."""
        if self._file is not None:
            self._store(address.encode("utf-8", "surrogateescape"), _identity_of_version(version), facts)

    def _store(self, key: bytes, identity: "_Identity", facts: Facts) -> None:
        packed = _FACTS.pack(*identity, bytes.fromhex(facts.digest), facts.width, facts.height)
        self._waiting.append((key, packed, _crc(key, packed)))
        if len(self._waiting) >= _ROWS_A_WRITE:
            self._write()

    def _rows(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """The undamaged rows of these keys, unpacked; those that are known to be wrong are dropped."""
        assert self._file is not None
        if self._fresh:
            self._file.write("DELETE FROM photos WHERE path = ?", [(key,) for key in keys])
            return {}
        return {
            key: _FACTS.unpack(facts)
            for key, facts, crc in self._file.select("SELECT path, facts, crc FROM photos WHERE path IN", keys)
            if isinstance(key, bytes) and isinstance(facts, bytes) and len(facts) == _FACTS.size
            if crc == _crc(key, facts)
        }

    def _write(self) -> None:
        if self._file is not None and self._waiting:
            self._file.write("INSERT OR REPLACE INTO photos VALUES (?, ?, ?)", self._waiting)
        self._waiting = []


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the cache knows of an object in a store: `facts` of the version that `identity` stands for."""

    identity: _Identity
    facts: Facts

    def is_of(self, version: str | None) -> bool:
        """Whether this was recorded of `version`."""
        return version is not None and self.identity == _identity_of_version(version)


def _identity_of_version(version: str) -> _Identity:
    return _VERSION.unpack(hashlib.sha512(version.encode()).digest()[: _VERSION.size])


def _identity(status: os.stat_result) -> _Identity:
    """Values that change when the file with this `status` is written or replaced by another file."""
    word = (1 << 64) - 1  # Windows has inodes of 128 bits
    return status.st_dev & word, status.st_ino & word, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(path: Path) -> bytes:
    return os.fsencode(path.absolute())


def _crc(key: bytes, facts: bytes) -> int:
    return zlib.crc32(facts, zlib.crc32(key))
