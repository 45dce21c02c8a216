"""A task for tests of engines, whose items are numbers or instructions to misbehave; importable by workers."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_cli.errors import ChangedPhoto, DataError

FILES = {"factor": b"3"}


@dataclass(frozen=True)
class Times:
    """Task, recipe and work at once: multiplies a number with the one in the file.

    An item may be ("kill", path): SIGKILL, unless the file exists, which is made first; ("always", name): SIGKILL;
    ("refuse", name), ("changed", path): errors of ours; ("bug", name): any other; ("sleep", seconds).
    here: what the probe gives in the process that asks. there: in others.
    """

    factor: int = 3
    here: str = "same"
    there: str = "same"
    tolerated: tuple[str, ...] = ()
    remote: bool = False

    def work(self, files: Mapping[str, bytes] | None = None) -> "Times":
        return self if files is None else Times(int(files["factor"]), self.here, self.there, remote=True)

    def recipe(self) -> "Times":
        return self

    def files(self) -> Mapping[str, bytes]:
        return FILES

    def names(self, item) -> list[str]:
        return [str(item)]

    def probe(self) -> Mapping[str, str]:
        return {"step": self.there if self.remote else self.here}

    def __call__(self, item):
        if isinstance(item, int):
            return self.factor * item
        what, argument = item
        if what == "sleep":
            time.sleep(argument)
            return argument
        if what == "kill" and Path(argument).exists():
            return os.getpid()
        if what == "kill":
            Path(argument).touch()
        if what == "refuse":
            raise DataError(f"refused {argument}", "try another")
        if what == "changed":
            raise ChangedPhoto(Path(argument))
        if what == "bug":
            raise ValueError(f"a bug with {argument}")
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def until_noted(observer, text):
    """Items that take 50 ms each, until a note says `text`: how soon a worker is ready depends on the machine."""
    end = time.monotonic() + 120
    while text not in observer.notes and time.monotonic() < end:
        yield ("sleep", 0.05)
