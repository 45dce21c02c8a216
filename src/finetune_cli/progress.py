"""How progress is reported: commands call an `Observer`, and only the console knows what a terminal is.

Work that can be counted takes one callable, `advance`, and calls it with the number of units that were done since the
last call. Work that learns its total on the way gives it as the second argument.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Advance(Protocol):
    """Reports that a stage has advanced."""

    def __call__(self, n: int, total: int | None = None, /) -> None:
        """`n` more units are done, out of `total` if that has become known."""
        ...


def ignore_progress(_n: int, _total: int | None = None, /) -> None:
    """An `Advance` that reports to nobody."""


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `seconds[stage]`."""
    started = time.monotonic()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 3)


class Observer(Protocol):
    """What a long-running command reports to its caller."""

    def stage(self, name: str, total: int | None, unit: str = "photos") -> AbstractContextManager[Advance]:
        """Open a stage of `total` units (`None`: unknown); the yielded callable advances it."""
        ...

    def note(self, text: str) -> None:
        """Report a fact that the user should know."""
        ...

    def epoch(self, number: int, total: int, text: str) -> None:
        """Report epoch `number` of at most `total`; if there are many, some may be left out."""
        ...

    def warn(self, text: str) -> None:
        """Report a possible problem."""
        ...


class Silent:
    """An `Observer` that stores notes and warnings and shows nothing; for tests and for use as a library."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str = "photos") -> Iterator[Advance]:  # noqa: ARG002
        """A stage whose progress is not shown."""
        yield ignore_progress

    def note(self, text: str) -> None:
        """Store the note."""
        self.notes.append(text)

    def epoch(self, number: int, total: int, text: str) -> None:  # noqa: ARG002
        """Store it as a note."""
        self.note(text)

    def warn(self, text: str) -> None:
        """Store the warning."""
        self.warnings.append(text)
