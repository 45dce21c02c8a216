"""How progress travels up: commands report to an `Observer`, and only the console knows what a terminal is.

Progress is reported as the number of units that were finished since the last report: through an `Advance`, or through
a `Meter` where the total becomes known on the way.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]


class Meter(Protocol):
    """Advances a stage; an `Advance` that can also report the total."""

    def __call__(self, n: int, total: int | None = None, /) -> None:
        """`n` more units are done, of `total` if that has become known."""
        ...


def ignore(_n: int, _total: int | None = None, /) -> None:
    """A `Meter` that nobody watches."""


def in_megabytes(advance: Meter) -> Meter:
    """A `Meter` of bytes for a stage that is shown in whole megabytes."""
    done = 0

    def advance_bytes(n: int, total: int | None = None, /) -> None:
        nonlocal done
        before, done = done, done + n
        advance(done // 10**6 - before // 10**6, None if total is None else total // 10**6)

    return advance_bytes


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `seconds[stage]`."""
    started = time.monotonic()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 3)


class Observer(Protocol):
    """What a long-running command reports to its caller."""

    def stage(self, name: str, total: int | None, unit: str = "photos") -> AbstractContextManager[Meter]:
        """Open a stage of `total` units (`None`: unknown); the yielded callable advances it by n."""
        ...

    def note(self, text: str) -> None:
        """Report a fact that the user should know."""
        ...

    def epoch(self, number: int, total: int, text: str) -> None:
        """Report epoch `number` of at most `total`; of many, some may be left out."""
        ...

    def warn(self, text: str) -> None:
        """Report something that may be wrong."""
        ...


class Silent:
    """An `Observer` that keeps notes and warnings and shows nothing; for tests and for use as a library."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str = "photos") -> Iterator[Meter]:  # noqa: ARG002
        """A stage that nobody watches."""
        yield ignore

    def note(self, text: str) -> None:
        """Keep the note."""
        self.notes.append(text)

    def epoch(self, number: int, total: int, text: str) -> None:  # noqa: ARG002
        """Keep it as a note."""
        self.note(text)

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.warnings.append(text)
