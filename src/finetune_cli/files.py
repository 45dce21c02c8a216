"""Files and folders that are either whole or absent, and the lock that keeps two processes apart.

Nothing here knows what the files mean. A write goes to a temporary name in the same folder (so the rename never
crosses a file system), is flushed and fsynced, renamed over the target with ``os.replace``, and the folder is fsynced,
so that a kill or a power cut leaves the old content or the new one and never a mixture. A kill may leave a temporary
name behind; `remove_leftovers` clears those away.

Tried on Linux. On Windows folders cannot be fsynced, and a rename is tried again while a virus scanner holds the
file; on macOS ``fsync`` does not empty the drive's own cache, so there a power cut can lose the newest file.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_cli.errors import RunError, StorageError

_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# What some network and FUSE file systems answer to the fsync of a folder, or to opening one for it.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
_LEFTOVER = re.compile(r"\..*-[0-9a-f]{8}\.tmp(\.[^.]*)?")
_LOCK = ".lock"
_HOLDER = ".lock-holder"


def human_bytes(count: int) -> str:
    """`count` bytes as people write them, in decimal units: ``0 bytes``, ``3.4 MB``."""
    value, units = float(count), iter(("kB", "MB", "GB", "TB"))
    if count < 1000:
        return f"{count} bytes"
    for unit in units:
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def storage_error(exc: OSError, path: Path, needed: int | None = None) -> StorageError:
    """Translate an `OSError` met while writing `path`; `needed`: how many bytes were to be written, if known."""
    wanted = f" ({human_bytes(needed)} are needed)" if needed else ""
    again = "free some space and run the same command again"
    if exc.errno == errno.ENOSPC:
        return StorageError(f"no space left to write {path}{wanted}", again)
    if exc.errno == errno.EDQUOT:
        return StorageError(f"the disk quota does not let {path} be written{wanted}", again)
    if exc.errno == errno.EFBIG:
        return StorageError(f"{path} would be larger than the system allows{wanted}", "see the limit with: ulimit -f")
    if exc.errno in _NOT_ALLOWED and not _another_file(exc, path):
        return StorageError(f"no permission to write {path}", "give yourself permission to write there")
    if exc.errno in {errno.EXDEV, errno.EBUSY}:
        return StorageError(f"cannot replace {path}: it is mounted by itself", "mount the folder that it is in instead")
    reason = f"{exc.strerror or exc}{_another_file(exc, path)}"
    return StorageError(f"cannot write {path}: {reason}", "check that path and its disk, then run the command again")


def _another_file(exc: OSError, path: Path) -> str:
    """The file that `exc` is about, unless that is `path` or a temporary one in it, beside it or above it."""
    if not isinstance(exc.filename, str):
        return ""
    path, other = path.absolute(), Path(exc.filename).absolute()
    return "" if other.parent in (path, *path.parents) else f": {other}"


@contextlib.contextmanager
def _translated(path: Path, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise storage_error(exc, path, needed) from exc


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (nothing happens where the system cannot do that)."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as exc:
        if exc.errno not in _NO_FOLDER_FSYNC:
            raise


def fsync_file(path: Path) -> None:
    """Flush what another library wrote to `path` to the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create `folder`, with `mode` but for the umask, and its parents durably; it may exist. Raises `StorageError`."""
    with _translated(folder):
        missing = []
        existing = folder
        while not existing.exists():
            missing.append(existing)
            existing = existing.parent
        for new in reversed(missing):
            new.mkdir(mode if new == folder else 0o777, exist_ok=True)
            fsync_folder(new.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file has that name", str(folder))


@contextlib.contextmanager
def atomic_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; it replaces `path` on success and vanishes on failure.

    For writers that want a file name of their own (Keras, Pillow). A link is followed, so that it stays a link. What
    is not a regular file (`/dev/null`, a pipe) is never replaced: `path` itself is yielded. `needed`: the bytes that
    will be written, for the message. Raises `StorageError` for a full or read-only disk.
    """
    with _translated(path, needed):
        if _is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        make_folder(target.parent)
        temporary = _temporary(target)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield temporary
            fsync_file(temporary)
            _replace(temporary, target)
            fsync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success all in it is made durable and it becomes `path`.

    `path` must not exist. On failure the temporary folder vanishes. Raises `StorageError`.
    """
    with _translated(path, needed):
        make_folder(path.parent)
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            _fsync_tree(temporary)
            if path.exists():
                raise FileExistsError(errno.EEXIST, "it exists already", str(path))
            _replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that `atomic_folder` made: at once, so that a kill cannot leave half of it under its name.

    Raises `StorageError`.
    """
    with _translated(path):
        going = _temporary(path)
        _replace(path, going)
        fsync_folder(path.parent)
        shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left under temporary names in `folder`; call it under the lock of that folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not _LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably. Raises `StorageError`."""
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with ``\\n`` line ends, atomically and durably. Raises `StorageError`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text` gives it. Raises `StorageError`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented ASCII (NaN is refused, because other readers refuse it)."""
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(path: Path) -> tuple[int, int] | None:
    """What tells the file at `path` from another one put in its place: device and inode; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def free_space_check(folder: Path, needed_bytes: int) -> None:
    """Raise `StorageError` unless the disk of `folder`, which need not exist yet, has room for `needed_bytes`."""
    with _translated(folder):
        free = shutil.disk_usage(_nearest(folder)).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder} needs {human_bytes(needed_bytes)} of disk space, and {human_bytes(free)} are free",
            f"free {human_bytes(needed_bytes - free)} there",
        )


def check_writable(folder: Path) -> None:
    """Raise `StorageError` unless files can be made in `folder`, or in its nearest parent if it does not exist yet.

    A file is made and removed, because permission bits alone do not tell (root, access lists, read-only mounts).
    """
    with _translated(folder):
        probe = _temporary(_nearest(folder) / "probe")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        probe.unlink()


@contextlib.contextmanager
def lock(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the kernel's lock on `folder`, which must exist, while the block runs; waits up to `wait` seconds for it.

    The kernel frees it when the holder ends in whatever way, so a killed process blocks nobody. Raises `RunError`
    that names the holder's process, `StorageError` when the folder cannot be written.
    """
    import filelock

    handle = filelock.FileLock(folder / _LOCK, timeout=wait)
    with _translated(folder):
        if not folder.is_dir():  # filelock would create it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        try:
            handle.acquire()
        except filelock.Timeout as exc:
            raise RunError(f"{folder} is in use by {_holder(folder)}", "wait until it ends, or stop it") from exc
    # On Windows nobody else can read a locked file, so the holder is told in a second one.
    try:
        with contextlib.suppress(OSError):
            (folder / _HOLDER).write_text(f"{os.getpid()} {socket.gethostname()}\n", "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _HOLDER).unlink()
        handle.release()


def _holder(folder: Path) -> str:
    try:
        process, host = (folder / _HOLDER).read_text("utf-8", "replace").split(maxsplit=1)
    except (OSError, ValueError):
        return "another process"
    where = "" if host.strip() == socket.gethostname() else f" on {host.strip()}"
    return f"process {process}{where}"


def _nearest(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


def _temporary(path: Path) -> Path:
    """A new name beside `path`, short enough for every file system, that keeps the suffix writers go by."""
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    return path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.tmp{suffix}")


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    return not stat.S_ISREG(mode)


def _replace(source: Path, target: Path) -> None:
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ():
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(seconds)  # a virus scanner or an indexer may hold a new file for a moment
        else:
            return
    source.replace(target)


def _fsync_tree(folder: Path) -> None:
    for parent, _folders, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))
