"""Opens files and folders without following links, and holds a folder open while something is done in it.

A run, an export or the cache may come from a stranger, or be in a folder that somebody else can write to. A link inside
it would turn a write to `metrics.json` into a write to any file of the user who runs the command. So our own folders
are opened one below the other with ``O_NOFOLLOW``, relative to the descriptor of the parent folder (``openat``), and
stay open while they are used: a link that replaces a folder in the meantime changes nothing.

Windows has no such calls: there, names are checked before they are used, and a short time is left in between.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

_BY_DESCRIPTOR = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# Without O_NONBLOCK, opening a pipe waits for a process at its other end; without O_NOCTTY, an opened terminal can
# become the controlling terminal of this process.
_CAREFUL = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# O_PATH needs no permission to list the folder.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class IrregularError(OSError):
    """A link, a folder, a pipe or a device where a regular file must be; `strerror` says which, in a line."""

    def __init__(self, code: int, reason: str, path: Path) -> None:
        super().__init__(code, reason, str(path))

    def __str__(self) -> str:
        """The reason alone: the caller names the file."""
        return str(self.strerror)


def open_regular(path: Path) -> BufferedReader:
    """Open a user's file for reading; links are followed.

    Raises `IrregularError`, at once, for a pipe, a device, a socket or a folder, and `OSError`.
    """
    _require_regular(path.stat(), path)  # before it is opened, because opening a device can do something
    return _checked_file(os.open(path, os.O_RDONLY | _CAREFUL), path)


def is_link(status: os.stat_result) -> bool:
    """Whether a status that was taken without following links is that of a link or, on Windows, of a junction."""
    reparse_point = getattr(status, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
    return stat.S_ISLNK(status.st_mode) or reparse_point


class OpenFolder:
    """The folder `path`, held open; the methods take the name of a file or folder in it.

    `handle`: its descriptor; `None` where the system opens files by path only.
    """

    def __init__(self, path: Path, handle: int | None) -> None:
        self.path = path
        self.handle = handle

    def status(self, name: str) -> os.stat_result | None:
        """The status of the file, folder or link of that name (links are not followed); `None` if there is none."""
        try:
            return os.stat(self._at(name), dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """A descriptor of a file, never through a link. Raises `IrregularError` for a link, and `OSError`."""
        if self.handle is None:
            self.refuse_link(name)
        try:
            return os.open(self._at(name), flags | _NOFOLLOW | _CAREFUL, mode, dir_fd=self.handle)
        except OSError:
            self.refuse_link(name)
            raise

    def open_regular(self, name: str) -> BufferedReader:
        """Open a regular file for reading. Raises `IrregularError` for anything else, and `OSError`."""
        status = self.status(name)
        if status is not None and not is_link(status):
            _require_regular(status, self.path / name)
        return _checked_file(self.open(name, os.O_RDONLY), self.path / name)

    @contextlib.contextmanager
    def folder(self, name: str, make: bool = False) -> Iterator["OpenFolder"]:
        """Hold the folder of that name open; `make`: create it, durably, if it does not exist.

        Raises `IrregularError` for a link.
        """
        if make:
            with contextlib.suppress(FileExistsError):
                self.mkdir(name)
                self.fsync()
        if self.handle is None:
            self.refuse_link(name)
            if not (self.path / name).is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path / name))
            yield OpenFolder(self.path / name, None)
            return
        try:
            handle = os.open(name, _FOLDER | _NOFOLLOW, dir_fd=self.handle)
        except OSError as exc:
            self.refuse_link(name)
            raise type(exc)(exc.errno, exc.strerror, str(self.path / name)) from exc
        with _closing(handle):
            yield OpenFolder(self.path / name, handle)

    def mkdir(self, name: str, mode: int = 0o777) -> None:
        """Create a folder."""
        os.mkdir(self._at(name), mode, dir_fd=self.handle)

    def take(self, other: "OpenFolder", name: str) -> None:
        """Move `name` here from the folder `other`; a file or link of that name is replaced, not followed."""
        os.replace(other._at(name), self._at(name), src_dir_fd=other.handle, dst_dir_fd=self.handle)

    def rename(self, old: str, new: str) -> None:
        """Give a file or a folder another name."""
        os.replace(self._at(old), self._at(new), src_dir_fd=self.handle, dst_dir_fd=self.handle)

    def unlink(self, name: str) -> None:
        """Remove a file or a link."""
        os.unlink(self._at(name), dir_fd=self.handle)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with all that is in it, as far as that is possible."""
        import shutil

        status = self.status(name)
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode) and not is_link(status):
            # Where the system supports it, rmtree works by descriptors and follows no link.
            shutil.rmtree(self._at(name), ignore_errors=True, dir_fd=self.handle)
        else:
            with contextlib.suppress(OSError):
                self.unlink(name)

    def fsync(self) -> None:
        """Make renames in the folder durable. Raises `OSError` where the system cannot do that."""
        if os.name == "nt":
            return
        handle = os.open("." if self.handle is not None else self.path, os.O_RDONLY, dir_fd=self.handle)
        with _closing(handle):
            os.fsync(handle)

    def visible(self) -> Path:
        """A path of this folder for libraries that take paths; on Linux it stays valid whatever happens to `path`."""
        if self.handle is not None:
            through_descriptor = Path(f"/proc/self/fd/{self.handle}")
            with contextlib.suppress(OSError):
                if os.path.samestat(through_descriptor.stat(), os.fstat(self.handle)):
                    return through_descriptor
        return self.path

    def refuse_link(self, name: str) -> None:
        """Raise `IrregularError` if `name` is a link."""
        status = self.status(name)
        if status is not None and is_link(status):
            raise IrregularError(
                errno.ELOOP,
                f"{self.path / name} is a symbolic link, which is not followed here; remove it, or replace it "
                "with its target",
                self.path / name,
            )

    def _at(self, name: str) -> str:
        return name if self.handle is not None else str(self.path / name)


@contextlib.contextmanager
def open_folder(folder: Path, root: Path | None = None, make: bool = False) -> Iterator[OpenFolder]:
    """Hold `folder` open, reached from `root` without following a link; `root` and the folders above it may be links.

    root: `folder` itself by default. make: create missing folders below `root`. Raises `IrregularError`
    for a link below `root`, and `OSError`.
    """
    root = folder if root is None else root
    names = folder.relative_to(root).parts
    if ".." in names:
        raise ValueError(f"{folder} leads out of {root}")
    with contextlib.ExitStack() as stack:
        handle = os.open(root, _FOLDER) if _BY_DESCRIPTOR else None
        if handle is not None:
            stack.enter_context(_closing(handle))
        opened = OpenFolder(root, handle)
        for name in names:
            opened = stack.enter_context(opened.folder(name, make))
        yield opened


@contextlib.contextmanager
def _closing(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


def _checked_file(handle: int, path: Path) -> BufferedReader:
    try:
        _require_regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_regular(status: Any, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for test, text in _KINDS if test(status.st_mode)), "something else")
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise IrregularError(code, f"it is {kind}, not a regular file", path)
