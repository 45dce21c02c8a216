"""SIGINT and SIGTERM: the first one unwinds the program and saves what is complete; a second one ends it at once.

The first raises `Interrupted` in the main thread, wherever that is, except in blocks under `deferred`. Libraries
sometimes swallow it (a callback from C++, a destructor, a bare `except`), so it is also stored, and `check`, which is
called wherever progress is reported, raises it again.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from finetune_cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # a process has one set of signals
_deferrals = 0


def catch() -> None:
    """Handle SIGINT and SIGTERM from now on; to be called in the main thread."""
    _received.clear()
    sys.unraisablehook = _unraisable
    for number in _SIGNALS:
        signal.signal(number, _first)


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Print nothing about a signal that came in a destructor: it is stored."""
    if lost.exc_type is not Interrupted:
        sys.__unraisablehook__(lost)


def check() -> None:
    """Raise `Interrupted` if a signal has come."""
    if _received:
        raise Interrupted(_received[0])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only store a signal until the block calls `check` or ends.

    For blocks that run TensorFlow in the main thread, which is not exception-safe: of 350 that were
    raised while Keras trained, one ended in a segmentation fault and some in unrelated errors.
    """
    global _deferrals  # noqa: PLW0603 - as `_received`
    if threading.current_thread() is not threading.main_thread():  # signals never come to the others
        yield
        return
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if not _deferrals:
            check()


def _first(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    for caught in _SIGNALS:
        signal.signal(caught, _second)
    if not _deferrals:
        check()
    else:
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping as soon as that is safe; a second signal stops at once\n")


def _second(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
