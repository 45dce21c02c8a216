"""SIGINT and SIGTERM: the first one unwinds the program, so that what is whole is saved; a second one ends it at once.

The first raises `Interrupted` in the main thread. Code of others sometimes swallows it (a callback from C++, a bare
`except`), so it is also remembered, and `check`, which is called wherever progress is told, raises it again.
"""

import os
import signal
from types import FrameType

from finetune_cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # a process has one set of signals


def catch() -> None:
    """Handle SIGINT and SIGTERM from now on; to be called in the main thread."""
    _received.clear()
    for number in _SIGNALS:
        signal.signal(number, _first)


def check() -> None:
    """Raise `Interrupted` if a signal has come."""
    if _received:
        raise Interrupted(_received[0])


def _first(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    for each in _SIGNALS:
        signal.signal(each, _second)
    check()


def _second(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
