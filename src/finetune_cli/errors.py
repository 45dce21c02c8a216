"""Every error that the tool raises on purpose, with the exit code that the command line ends with.

    FinetuneError              1   anything that failed although the input was fine
    +-- UsageError             2   a wrong option or argument
    |   +-- ConfigError        2   a wrong key or value in the YAML file
    +-- DataError              3   something about the photos
    |   +-- BadImage           3   one photo that cannot be decoded
    |   +-- BadPhotos          3   photos that cannot be used, but could be skipped
    |   +-- ChangedPhoto       3   a photo that is not the one that was indexed
    +-- GateError              4   a quality or parity limit was missed
    +-- WeightsError           1   a weight or model file that is missing, foreign or damaged
    +-- RunError               1   a run directory that is missing, unfinished, locked or damaged
    +-- CheckpointError        1   a checkpoint that is damaged or belongs to other data
    +-- StorageError           1   disk full, no permission, a file system fault
    +-- MissingExtra           1   an optional package that is not installed
    Interrupted          130/143   a signal; everything complete is saved

An error has one line for the problem and one for the remedy. Third-party exceptions are translated
where they enter the package, with ``raise ... from exc``.
"""

from typing import Any


class FinetuneError(Exception):
    """Base class: `problem` is what is wrong, `remedy` what to do."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        """Problem and remedy, a line each."""
        return f"{self.problem}\n{self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled: `Exception` would call the class with `args`, which are not what a constructor takes."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[FinetuneError], args: tuple[Any, ...], state: dict[str, Any]) -> FinetuneError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class UsageError(FinetuneError):
    """A wrong option or argument."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more wrong keys or values in a configuration; `problem` lists all of them."""


class DataError(FinetuneError):
    """Something about the photos or their labels."""

    exit_code = 3


class BadImage(DataError):
    """One photo that cannot be used; `reason` is one line without the path."""

    def __init__(self, path: object, reason: str, remedy: str = "repair or remove it") -> None:
        super().__init__(f"{path}: {reason}", remedy)
        self.path = path
        self.reason = reason


class BadPhotos(DataError):
    """Photos that cannot be used, few enough to be left out with ``data.on_bad_image: skip``."""


class ChangedPhoto(DataError):
    """The bytes of a photo are not those that were indexed."""

    def __init__(self, path: object, remedy: str = "run the same command again") -> None:
        super().__init__(f"{path} changed while the command was running", remedy)
        self.path = path


class GateError(FinetuneError):
    """A quality or parity limit was missed."""

    exit_code = 4


class WeightsError(FinetuneError):
    """A weight or model file that is missing, of another model, or damaged."""


class RunError(FinetuneError):
    """A run directory that is missing, unfinished, locked or damaged."""


class CheckpointError(FinetuneError):
    """A checkpoint that is damaged or belongs to other data."""


class StorageError(FinetuneError):
    """Disk full, no permission, or another fault of the file system."""


class MissingExtra(FinetuneError):
    """An optional package that a feature needs is not installed."""

    def __init__(self, features: str, *extras: str) -> None:
        wanted = f"'finetune-cli[{','.join(extras)}]'" if extras else "--force-reinstall finetune-cli"
        super().__init__(f"packages are not installed that are needed for {features}", f"pip install {wanted}")


class Interrupted(KeyboardInterrupt):
    """The user (SIGINT) or the system (SIGTERM) asked the tool to stop.

    Not an `Exception`, so that no handler of errors catches it.
    """

    def __init__(self, signal_number: int, remedy: str = "run the same command again") -> None:
        super().__init__("interrupted")
        self.problem = "interrupted"
        self.remedy = remedy
        self.exit_code = 128 + signal_number
