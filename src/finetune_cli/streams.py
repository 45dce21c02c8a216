"""The three standard streams of the process, which may be closed, full, or of an encoding that lacks letters."""

import contextlib
import errno
import io
import os
import sys
import warnings
from typing import Any

from finetune_cli.errors import FinetuneError, StorageError

# Errors when a stream cannot be written; files of this package hardly ever raise them without a name.
_UNWRITABLE = {errno.ENOSPC, errno.EBADF, errno.EIO, errno.EDQUOT, errno.EFBIG}


class _Forgiving(io.FileIO):
    """Drops what cannot be written: a message that nobody can read must not end hours of work."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Make the streams safe to use; to be called once, before anything else opens a file.

    A closed descriptor would be given to the next file that is opened, and then receive what is meant for the stream.
    So the missing ones are opened: standard input is empty, a message to standard error is lost, and a result for
    standard output is an error.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
    buffer = io.BufferedWriter(_Forgiving(2, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if any(action == "error" for action, *_rest in warnings.filters):
        # PYTHONWARNINGS=error is meant for the code of whoever set it; here it would stop Keras on its own warnings.
        warnings.simplefilter("default")


def translated(exc: OSError) -> FinetuneError | None:
    """The error to show for an `OSError` that nothing else has translated; `None` if the cause is unknown.

    After a failed write to standard output its rest is dropped, so that Python does not fail on it once more at exit.
    """
    try:
        sys.stdout.flush()
        failed = exc.filename is None and exc.errno in _UNWRITABLE
    except OSError:
        failed = True
    if failed:
        drop_output()
        reason = "it is closed" if exc.errno == errno.EBADF else exc.strerror
        return StorageError(f"cannot write to standard output: {reason}", "send it to a file or a disk that has room")
    if exc.filename is None:
        return None
    return FinetuneError(f"cannot open {exc.filename}: {exc.strerror}", "check that path and its permissions")


def drop_output() -> None:
    """Discard everything that is still written to standard output."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
