"""Where exports go: built beside the target under a temporary name, and moved there whole or not at all.

A folder that is not empty is replaced only with `force`, and only if it holds an export and nothing else. On Linux the
two are exchanged in one step (``renameat2``); elsewhere there is a moment between two renames in which a kill leaves
the old export whole under its temporary name.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import StorageError, UsageError
from finetune_cli.exports import manifest, triton
from finetune_cli.exports.registry import FORMS
from finetune_cli.text import shown

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_ABANDONED_SECONDS = 3600.0


def inner_paths(output: Path, names: Sequence[str], version: int | None) -> dict[str, Path]:
    """Form -> its folder below `output`: the folder itself for one form, else one named after each.

    Below that comes the folder of the `version`; for forms that servers only read from there, by default the next free
    one.
    """
    inner = {name: Path() if len(names) == 1 else Path(name) for name in names}
    for name, base in inner.items():
        if version is not None or FORMS[name].numbered:
            inner[name] = base / str(version or _next_version(output / base))
    return inner


def _next_version(folder: Path) -> int:
    try:
        return max((int(path.name) for path in folder.iterdir() if is_version(path)), default=0) + 1
    except OSError:
        return 1


def is_version(path: Path) -> bool:
    """Whether a server would take `path` for a version of a model."""
    return re.fullmatch("[0-9]+", path.name) is not None and path.is_dir()


def check(target: Path, force: bool) -> None:
    """Raise `UsageError` when an export may not go to the folder `target`."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file", "name a new folder with --output")
    if is_empty(target):
        return
    if not force:
        raise UsageError(f"{target} is not empty", "choose another --output, or replace the export there with --force")
    if inside := sorted(path for path in target.iterdir() if path.is_dir() and manifest.is_export(path)):
        raise UsageError(
            f"{target} holds several exports, each in a folder of its own", f"name one, such as {inside[0]}"
        )
    if not manifest.is_export(target):
        raise UsageError(
            f"{target} holds files that are not an export; they are not replaced", "choose another --output"
        )


def check_beside(output: Path, force: bool) -> None:
    """Raise `UsageError` when forms or versions may not be added to the folder `output`, because of what it holds."""
    if (output / manifest.FILE).exists():
        raise UsageError(f"{output} is not empty: it holds an export of its own", "choose another --output")
    known = {triton.CONFIG, triton.LABELS}
    others = (path for path in output.iterdir() if not path.name.startswith(".") and path.name not in known)
    foreign = sorted(path.name for path in others if not (is_version(path) or (path.is_dir() and path.name in FORMS)))
    if foreign and not force:
        raise UsageError(
            f"{output} is not empty: it holds {shown(foreign[0])}, which is neither a form nor a version of a model",
            "choose another --output, or add to what is there with --force",
        )


def refuse_links(output: Path, target: Path) -> None:
    """Raise `UsageError` when `target`, or a folder on the way to it from `output`, is a link; `output` may be one."""
    for path in (target, *target.parents):
        if path == output:
            break
        if path.is_symlink():
            raise UsageError(
                f"{path} is a symbolic link, which is not followed inside a folder of exports",
                "remove it, or replace it by a copy of its target",
            )


def check_replaceable(target: Path) -> None:
    """Raise `StorageError` unless a folder that was built beside `target` can take its place."""
    target = Path(os.path.realpath(target))
    if target.is_mount():
        raise StorageError(f"cannot replace {target}: it is mounted by itself", "name a folder in it with --output")
    files.check_writable(target.parent)


def is_empty(folder: Path) -> bool:
    """Whether `folder` does not exist or has nothing in it."""
    try:
        return next(folder.iterdir(), None) is None
    except FileNotFoundError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def placed(target: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes its place, on failure nothing has happened.

    Raises `UsageError` when `target` may not be replaced, `StorageError` for a full or read-only disk.
    """
    check(target, force)
    target = Path(os.path.realpath(target))
    created = [folder for folder in target.parents if not folder.exists()]
    _remove_abandoned(target)
    ready = target.with_name(f".{target.name[:40]}-{secrets.token_hex(4)}.tmp")
    done = False
    try:
        with files.atomic_folder(ready) as temporary:
            try:
                yield temporary
            except OSError as exc:
                raise files.storage_error(exc, target) from exc
        check(target, force)
        _move(ready, target)
        done = True
    except OSError as exc:
        raise files.storage_error(exc, target) from exc
    finally:
        shutil.rmtree(ready, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in () if done else created:
                folder.rmdir()


def _remove_abandoned(target: Path) -> None:
    """Remove what killed exports to `target` left beside it, an hour or more ago."""
    # The folder that `placed` names, and the one that `files.atomic_folder` makes for it, cut to 40 characters;
    # earlier versions put a second .tmp behind that.
    digits, name = "-[0-9a-f]{8}", target.name
    ready = rf"\.{re.escape(name[:40])}{digits}\.tmp"
    building = rf"\.\.{re.escape(name[:30])}.{{0,19}}{digits}\.tmp(?:\.tmp)?"
    pattern = re.compile(f"{ready}|{building}")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _move(new: Path, target: Path) -> None:
    if is_empty(target):
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        new.rename(target)
    elif not _exchange(new, target):
        aside = target.with_name(f".{target.name[:40]}-{secrets.token_hex(4)}.tmp")
        target.rename(aside)
        try:
            new.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    files.fsync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot do that."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(second))
