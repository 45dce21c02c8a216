"""Files and folders that are either whole or absent, and the lock that keeps two processes apart.

Nothing here knows what the files mean. A write goes to a temporary name in the same folder (so the rename never
crosses a file system), is flushed and fsynced, renamed over the target with ``os.replace``, and the folder is fsynced,
so that a kill or a power cut leaves the old content or the new one and never a mixture. A kill may leave a temporary
name behind; `remove_leftovers` and `remove_abandoned` clear those away.

There are two kinds of files. Files of our own are in a run, an export or the cache: `root` names that folder (by
default the one that the file is in), and nothing below it may be a link. `root` itself and what is above it may be
links. A file that is a link is refused in reading and replaced in writing; a folder that is a link is refused in both
(`safe_open.py`). A user's files (`open_regular`, `atomic_output`) may be links anywhere. Neither kind is read unless
it is a regular file. A hard link cannot be distinguished from the file itself, so it is read; it is never written
through, because every write makes a new file (`cache/sqlite_file.py` does the same for databases).

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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from finetune_cli import safe_open
from finetune_cli.errors import RunError, StorageError

_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# What some network and FUSE file systems answer to the fsync of a folder, or to opening one for it.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
_LEFTOVER = re.compile(r"\..*-[0-9a-f]{8}\.tmp(\.[^.]*)?")
_LOCK = ".lock"
_HOLDER = ".lock-holder"
_HOLDER_BYTES = 500
_ABANDONED_SECONDS = 60.0


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
    check = "" if isinstance(exc, safe_open.IrregularError) else "check that path and its disk, "
    return StorageError(f"cannot write {path}: {reason}", f"{check}then run the command again")


def _another_file(exc: OSError, path: Path) -> str:
    """The file that `exc` is about, unless that is `path` or a temporary one in it, beside it or above it."""
    if not isinstance(exc.filename, str):
        return ""
    if exc.filename == Path(exc.filename).name or exc.filename.startswith("/proc/self/fd/"):
        return ""  # relative to a folder that is held open
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
    with safe_open.open_folder(folder) as opened:
        _fsync(opened)


def fsync_file(path: Path) -> None:
    """Flush what another library wrote to `path` to the disk."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
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
def atomic_path(path: Path, needed: int | None = None, root: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path with the name of `path`, a file of our own; it replaces `path` on success, else vanishes.

    For writers that want a file name of their own (Keras, Pillow). A link is replaced, not followed; nothing below
    `root` may lead through one. `needed`: the bytes that will be written, for the message. Raises `StorageError` for a
    full or read-only disk.
    """
    with _building(path, needed, root) as building:
        building.refuse_folder(path)
        handle = building.workshop.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            building.check_owner(handle)
        finally:
            os.close(handle)
        yield building.workshop.visible() / path.name
        handle = building.workshop.open(path.name, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a file that a user names: a link stays a link, and the file behind it is replaced.

    What is not a regular file (`/dev/null`, a pipe) is never replaced: `path` itself is yielded. What is written to
    `/dev/stdout` goes where the shell has redirected it, after what is already there. Raises `StorageError`.
    """
    with _translated(path):
        if _is_special(path):
            yield path
            return
        descriptor = _descriptor(path)
        if descriptor is not None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder, path.name)
                with os.fdopen(os.dup(descriptor), "wb") as stream:
                    stream.write(Path(folder, path.name).read_bytes())
            return
        with atomic_path(Path(os.path.realpath(path))) as temporary:
            yield temporary


@contextlib.contextmanager
def atomic_folder(path: Path, needed: int | None = None, root: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder; on success all in it is made durable and it becomes `path`.

    `path` must not exist, and nothing below `root` may lead to it through a link. On failure the temporary folder
    vanishes. Raises `StorageError`.
    """
    with _building(path, needed, root) as building:
        building.workshop.mkdir(path.name)
        with building.workshop.folder(path.name) as folder:
            if folder.handle is not None:
                building.check_owner(folder.handle)
        yield building.workshop.visible() / path.name
        _fsync_tree(building.workshop.visible() / path.name)
        if building.parent.status(path.name) is not None:
            raise FileExistsError(errno.EEXIST, "it exists already", str(path))


@dataclass(frozen=True)
class _Building:
    """`parent`: the folder that the new file or folder is for; `workshop`: the private one that it is made in."""

    parent: safe_open.OpenFolder
    workshop: safe_open.OpenFolder

    def refuse_folder(self, path: Path) -> None:
        """Raise `IsADirectoryError` if `path` is a folder, which a file never replaces."""
        status = self.parent.status(path.name)
        if status is not None and stat.S_ISDIR(status.st_mode) and not safe_open.is_link(status):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))

    def check_owner(self, handle: int) -> None:
        """Raise `PermissionError` if the workshop is not of the user who made what is open as `handle` in it.

        Then another user has replaced the folder, and could put links into it.
        """
        if self.workshop.handle is None:
            return
        if os.fstat(handle).st_uid != os.fstat(self.workshop.handle).st_uid:
            raise PermissionError(errno.EPERM, "another user has replaced a temporary folder", str(self.workshop.path))


@contextlib.contextmanager
def _building(path: Path, needed: int | None, root: Path | None) -> Iterator[_Building]:
    """Make a private folder beside `path`, and move what was made in it under the same name to `path` on success.

    Libraries write by names, and follow links: so they write to a folder that nobody else can write to.
    """
    with _translated(path, needed):
        make_folder(path.parent if root is None else root)
        temporary = _temporary_name(path)
        with safe_open.open_folder(path.parent, root, make=True) as parent:
            try:
                parent.mkdir(temporary, 0o700)
                with parent.folder(temporary) as workshop:
                    yield _Building(parent, workshop)
                    _retried(lambda: parent.take(workshop, path.name))
                _fsync(parent)
            finally:
                parent.remove(temporary)


def holds_something(path: Path) -> bool:
    """Whether an `atomic_output` to `path` would replace something: not a device, a pipe or `/dev/stdout`."""
    try:
        return path.exists() and not _is_special(path) and _descriptor(path) is None
    except IsADirectoryError:
        return True


def remove_folder(path: Path, root: Path | None = None) -> None:
    """Remove a folder that `atomic_folder` made: at once, so that a kill cannot leave half of it under its name.

    A link of that name is removed, and what it leads to is left alone. Raises `StorageError`.
    """
    with _translated(path), safe_open.open_folder(path.parent, root) as parent:
        going = _temporary_name(path)
        _retried(lambda: parent.rename(path.name, going))
        _fsync(parent)
        parent.remove(going)


def remove_leftovers(folder: Path, root: Path | None = None) -> None:
    """Remove what killed writers left under temporary names in `folder`; call it under the lock of that folder."""
    with contextlib.suppress(OSError), safe_open.open_folder(folder, root) as parent:
        for path in parent.visible().iterdir():
            if _LEFTOVER.fullmatch(path.name):
                parent.remove(path.name)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in `folder`, where others may be at work: of those that `lock` what they build.

    That is: folders with a temporary name and a lock that nobody holds, which belong to this user and in which nothing
    has changed for a minute. (The lock is not held in the moments after the folder is made, and before it is renamed.)
    """
    with contextlib.suppress(OSError), safe_open.open_folder(folder) as parent:
        for found in parent.visible().iterdir():
            if _LEFTOVER.fullmatch(found.name) and _is_own_and_old(found) and os.path.lexists(found / _LOCK):
                with contextlib.suppress(RunError, StorageError), lock(found):
                    parent.remove(found.name)


def _is_own_and_old(folder: Path) -> bool:
    status = folder.lstat()
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return own and stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > _ABANDONED_SECONDS


def write_bytes(path: Path, data: bytes, root: Path | None = None) -> None:
    """Write `data` to `path`, a file of our own, atomically and durably. Raises `StorageError`."""
    with _building(path, len(data), root) as building:
        building.refuse_folder(path)
        handle = building.workshop.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str, root: Path | None = None) -> None:
    """Write `text` to `path` as UTF-8 with ``\\n`` line ends, atomically and durably. Raises `StorageError`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"), root)


def write_json(path: Path, value: Any, root: Path | None = None) -> None:
    """Write `value` as `json_text` gives it. Raises `StorageError`."""
    write_text(path, json_text(value), root)


def json_text(value: Any) -> str:
    """`value` as indented ASCII (NaN is refused, because other readers refuse it)."""
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def open_regular(path: Path) -> BufferedReader:
    """Open a user's file for reading; links are followed.

    Raises `OSError`, at once, for a pipe, a device, a socket or a folder: its `strerror` says which.
    """
    return safe_open.open_regular(path)


def open_own(path: Path, root: Path | None = None) -> BufferedReader:
    """Open a file of our own for reading.

    Raises `OSError`, at once, for a link, below `root` too, and for anything but a regular file: its `strerror` says
    which.
    """
    with safe_open.open_folder(path.parent, root) as folder:
        return folder.open_regular(path.name)


def read_regular(path: Path) -> bytes:
    """The content of a user's file. Raises `OSError` as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_own(path: Path, root: Path | None = None) -> bytes:
    """The content of a file of our own. Raises `OSError` as `open_own` does."""
    with open_own(path, root) as file:
        return file.read()


def sha256(path: Path) -> str:
    """SHA-256 of the bytes of a user's file, in hexadecimal. Raises `OSError` as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_own(path: Path, root: Path | None = None) -> str:
    """SHA-256 of the bytes of a file of our own, in hexadecimal. Raises `OSError` as `open_own` does."""
    with open_own(path, root) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, digest: str | None) -> bool:
    """Whether a user's file has this MD5 or SHA-256 in hexadecimal; `None`: it is not known, and any file will do.

    Raises `OSError` as `open_regular` does.
    """
    if digest is None:
        return True
    with open_regular(path) as file:
        return hashlib.file_digest(file, "md5" if len(digest) == 32 else "sha256").hexdigest() == digest


def free_space_check(folder: Path, needed_bytes: int) -> None:
    """Raise `StorageError` unless the disk of `folder`, which need not exist yet, has room for `needed_bytes`."""
    with _translated(folder):
        free = shutil.disk_usage(_nearest(folder)).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder} needs {human_bytes(needed_bytes)} of disk space, and {human_bytes(free)} are free",
            f"free {human_bytes(needed_bytes - free)} there",
        )


def check_writable(folder: Path, root: Path | None = None) -> None:
    """Raise `StorageError` unless files can be made in `folder`, or in its nearest parent if it does not exist yet.

    A file is made and removed, because permission bits alone do not decide it (root, access lists, read-only mounts).
    root: the run that `folder` is in, if it is in one; a link on the way is refused.
    """
    with _translated(folder):
        nearest, root = _nearest(folder), None if root is None else root.absolute()
        with safe_open.open_folder(
            nearest, root if root is not None and nearest.is_relative_to(root) else None
        ) as parent:
            probe = _temporary_name(Path("probe"))
            os.close(parent.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            parent.unlink(probe)


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
        _check_lock(folder / _LOCK)
        try:
            handle.acquire()
        except filelock.Timeout as exc:
            raise RunError(f"{folder} is in use by {_holder(folder)}", "wait until it ends, or stop it") from exc
    # On Windows nobody else can read a locked file, so a second file names the holder.
    try:
        with contextlib.suppress(OSError):
            _write_holder(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _HOLDER).unlink()
        handle.release()


def _check_lock(path: Path) -> None:
    """Remove a lock file that is a link; raise `IrregularError` for anything else that is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if safe_open.is_link(status):
            path.unlink()  # filelock opens with O_NOFOLLOW, so nobody holds the lock through it
        elif not stat.S_ISREG(status.st_mode):
            raise safe_open.IrregularError(errno.EINVAL, f"{path} is not a regular file; remove it", path)


def _write_holder(folder: Path) -> None:
    """Name this process as the holder, in a new file: what has that name may be a link, or have a second name."""
    (folder / _HOLDER).unlink(missing_ok=True)
    handle = os.open(folder / _HOLDER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # which follows no link
    try:
        os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
    finally:
        os.close(handle)


def _holder(folder: Path) -> str:
    try:
        with open_own(folder / _HOLDER) as file:
            process, host = file.read(_HOLDER_BYTES).decode("utf-8", "replace").split(maxsplit=1)
    except (OSError, ValueError):
        return "another process"
    where = "" if host.strip() == socket.gethostname() else f" on {host.strip()}"
    return f"process {process}{where}"


def _nearest(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


def _temporary_name(path: Path) -> str:
    """A new name that says what it is for, short enough for every file system."""
    return f".{path.stem[:40]}-{secrets.token_hex(4)}.tmp"


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    return not stat.S_ISREG(mode)


def _descriptor(path: Path) -> int | None:
    """N if `path` is a name of this process's open file N, as `/dev/stdout` is of 1."""
    for _ in range(8):
        if match := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path)):
            return int(match[1])
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _retried(rename: Callable[[], None]) -> None:
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ():
        try:
            rename()
        except PermissionError:
            time.sleep(seconds)  # a virus scanner or an indexer may hold a new file for a moment
        else:
            return
    rename()


def _fsync(folder: safe_open.OpenFolder) -> None:
    try:
        folder.fsync()
    except OSError as exc:
        if exc.errno not in _NO_FOLDER_FSYNC:
            raise


def _fsync_tree(folder: Path) -> None:
    for parent, _folders, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))
