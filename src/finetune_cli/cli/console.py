"""The only module that writes to the terminal: Rich on a real one, plain lines without control codes elsewhere.

Results go to stdout, everything about the work (progress, notes, warnings, errors) to stderr. Names of files and
classes may contain anything; `text.shown` makes control characters visible instead of sending them.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from finetune_cli import signals
from finetune_cli.errors import FinetuneError, Interrupted
from finetune_cli.progress import Advance
from finetune_cli.text import shown

_PLAIN_SECONDS = 10.0


class Console:
    """Implements `Observer` for a person."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.quiet = quiet
        # A file or a pipe has no width, so nothing is wrapped there.
        width = None if sys.stdout.isatty() else 10_000
        # Rich leaves bold and dim under NO_COLOR (https://no-color.org); a bar consists of control codes.
        self.plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        colours: Literal["auto"] | None = None if self.plain else "auto"
        self.out = RichConsole(color_system=colours, highlight=False, emoji=False, soft_wrap=True, width=width)
        self.err = RichConsole(stderr=True, color_system=colours, highlight=False, emoji=False, soft_wrap=True)

    def results_to_stderr(self) -> None:
        """Send results to stderr like everything else: stdout is for what a script reads."""
        self.out = self.err

    def print(self, text: str = "") -> None:
        """A line of the result, as it is."""
        self.out.print("\n".join(map(shown, text.split("\n"))), markup=False)

    def title(self, text: str) -> None:
        """A line of the result that stands out."""
        self.out.print(shown(text), markup=False, style="bold")

    def note(self, text: str) -> None:
        """A fact about the work."""
        signals.check()
        if not self.quiet:
            for line in text.splitlines():
                self.err.print(shown(line), markup=False, style="dim" if self.err.is_terminal else "")

    def epoch(self, number: int, total: int, text: str) -> None:
        """A note; in a log only of epochs 1 to 10, 20, ..., 100, 200, ..., and the last, so that it stays short."""
        if self.err.is_terminal or number == total or not int(str(number)[1:] or 0):
            self.note(text)
        else:
            signals.check()

    def warn(self, text: str) -> None:
        """Something that may be wrong."""
        self._labelled("warning", "yellow", text)

    def error(self, error: FinetuneError | Interrupted) -> None:
        """What is wrong and what to do."""
        self._labelled("error", "bold red", error.problem)
        self._labelled("try", "bold", error.remedy)

    def _labelled(self, label: str, style: str, text: str) -> None:
        from rich.text import Text

        first, *rest = text.splitlines() or [""]
        self.err.print(Text.assemble((f"{label}: ", style), shown(first)))
        for line in rest:
            self.err.print(Text(shown(line)))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> None:
        """A table of results; `right`: the columns that are aligned to the right, which are never wrapped.

        In a narrow terminal, texts are wrapped between words; where that is not enough, each row becomes a few lines.
        """
        from rich.box import SIMPLE_HEAD
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        names = [shown(name) for name in header]
        cells = [[shown(cell) for cell in row] for row in rows]
        columns = list(zip(*cells, strict=True)) or [()] * len(names)
        widest = [max(1, *map(cell_len, (name, *column))) for name, column in zip(names, columns, strict=True)]
        least = [
            max(map(cell_len, (*name.split(), *(column if i in right else " ".join(column).split()), "")))
            for i, (name, column) in enumerate(zip(names, columns, strict=True))
        ]
        boxed = self.out.is_terminal and sum(widest) + 3 * len(names) <= self.out.width
        room = self.out.width if boxed else self.out.width - 2 * (len(names) - 1)
        if sum(least) > room:
            self._records(names, cells)
            return
        widths = widest.copy()
        while sum(widths) > room:  # narrow the column with the most room to spare
            spare = [width - needed for width, needed in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
        table = Table(box=SIMPLE_HEAD if boxed else None, padding=(0, 1) if boxed else (0, 2, 0, 0), pad_edge=False)
        for i, (name, width) in enumerate(zip(names, widths, strict=True)):
            table.add_column(Text(name), justify="right" if i in right else "left", width=width, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self.out.print(table)

    def _records(self, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The rows of a table as blocks of lines: the first cell, and below it the others with their column names."""
        for row in rows:
            first, *others = zip(names, row, strict=True)
            self.print(": ".join(filter(None, first)))
            for name, cell in others:
                if cell:
                    self.print(f"  {name}: {cell}" if name else f"  {cell}")

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str = "photos") -> Iterator[Advance]:
        """Progress of one stage with rate and time left; without a terminal, a line every ten seconds."""
        signals.check()
        if self.quiet:
            yield lambda _n, _total=None, /: signals.check()  # noqa: PLW0108 - it must accept the arguments of a meter
        elif self.err.is_terminal and not self.plain:
            with self._bar(name, total, unit) as advance:
                yield advance
        else:
            with self._plain(name, total, unit) as advance:
                yield advance

    @contextlib.contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Any) -> Text:
                speed = task.finished_speed or task.speed
                known = speed and task.elapsed > 1  # photos found in the cache distort the rate at first
                return Text(_rate(speed, f" {unit}") if known else "", style="dim")

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as progress:
            task = progress.add_task(shown(name), total=total)
            started = time.monotonic()

            def advance(n: int, total: int | None = None, /) -> None:
                signals.check()
                progress.update(task, advance=n, total=total)

            yield advance
        done = int(progress.tasks[0].completed)
        self._finished(name, done, unit, time.monotonic() - started)

    @contextlib.contextmanager
    def _plain(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        started = reported = time.monotonic()
        done = 0

        def advance(n: int, known: int | None = None, /) -> None:
            nonlocal done, reported, total
            signals.check()
            done, total = done + n, known or total
            now = time.monotonic()
            if now - reported >= _PLAIN_SECONDS:
                reported = now
                rate = done / (now - started)
                left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
                of = f"/{total}" if total else ""
                speed = f", {_rate(rate)}" if _rate(rate) else ""
                self.note(f"{name}: {done}{of} {unit}{speed}{left}")

        yield advance
        self._finished(name, done, unit, time.monotonic() - started)

    def _finished(self, name: str, done: int, unit: str, seconds: float) -> None:
        rate = _rate(done / seconds) if seconds > 0.1 else ""
        self.note(f"{name}: {f'{done} {unit} in ' if done else ''}{seconds:.1f} s{f' ({rate})' if rate else ''}")


def _rate(per_second: float, unit: str = "") -> str:
    """`per_second` with at least two digits; empty where that would be 0.0."""
    digits = 0 if per_second >= 9.5 else 1
    return f"{per_second:.{digits}f}{unit}/s" if per_second >= 0.05 else ""
