"""How progress travels up: commands report to an `Observer`, and only the console knows what a terminal is."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]


class Meter(Protocol):
    """Moves a stage on; an `Advance` that can also learn the total."""

    def __call__(self, n: int, total: int | None = None, /) -> None:
        """`n` units more are done, of `total` if that has become known."""
        ...


class Observer(Protocol):
    """What a long-running command tells whoever started it."""

    def stage(self, name: str, total: int | None, unit: str = "photos") -> AbstractContextManager[Meter]:
        """Open a stage of `total` units (`None`: unknown); the yielded callable advances it by n."""
        ...

    def note(self, text: str) -> None:
        """Tell a fact that the person should know."""
        ...

    def epoch(self, number: int, total: int, text: str) -> None:
        """Tell of epoch `number` of at most `total`; of many, some may be left out."""
        ...

    def warn(self, text: str) -> None:
        """Tell something that may be wrong."""
        ...


class Silent:
    """An `Observer` that keeps notes and warnings and shows nothing; for tests and for use as a library."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str = "photos") -> Iterator[Meter]:  # noqa: ARG002
        """A stage that nobody watches."""
        yield lambda _n, _total=None, /: None

    def note(self, text: str) -> None:
        """Keep the note."""
        self.notes.append(text)

    def epoch(self, number: int, total: int, text: str) -> None:  # noqa: ARG002
        """Keep it as a note."""
        self.note(text)

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.warnings.append(text)
