"""Files that are either whole or absent: atomic durable writes, digests, names that are safe to show.

Nothing here knows what the files mean. A write goes to a temporary name in the same folder, is flushed and fsynced,
renamed over the target with ``os.replace``, and the folder is fsynced, so that a kill or a power cut leaves the old
content or the new one and never a mixture.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_cli.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def storage_error(exc: OSError, path: Path) -> StorageError:
    """Translate an `OSError` met while writing `path`."""
    if exc.errno in _FULL:
        return StorageError(f"no space left to write {path}", "free some space and run the same command again")
    if exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StorageError(f"no permission to write {path}", "choose a folder that you can write to")
    return StorageError(f"cannot write {path}: {exc.strerror or exc}")


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush what another library wrote to `path` to the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix; on success it replaces `path`, on failure it vanishes.

    For writers that want a file name of their own (Keras, OpenVINO, Pillow). Raises `StorageError` for a full or
    read-only disk.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".tmp{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as exc:
        raise storage_error(exc, path) from exc
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably. Raises `StorageError`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with ``\\n`` line ends, atomically and durably. Raises `StorageError`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (NaN is refused, because other readers refuse it). Raises `StorageError`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
