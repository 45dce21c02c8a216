"""What all exported forms have in common; `registry.py` lists them."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import DataError
from finetune_cli.exports.card import Card
from finetune_cli.exports.triton import Tensor
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs.run import Run
from finetune_cli.text import listed, shown

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Quantize = Literal["none", "float16", "int8"]


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported: `calibration` yields training photos ``uint8 (size, size, 3)`` for quantizing."""

    run: Run
    calibration: Callable[[], Iterator[Pixels]]

    @property
    def card(self) -> Card:
        """The classes and image settings of the run."""
        return Card(self.run.classes, self.run.image_settings)

    def describe(self) -> str:
        """The run, its classes and its backbone in one line, for the fields in which formats describe a model."""
        run, size = self.run, self.run.image_settings.size
        return shown(f"{run.name}: {listed(run.classes, 8)}; {run.manifest.backbone.name}, {size} pixels")

    def calibration_photos(self) -> list[Pixels]:
        """All of `calibration`. Raises `DataError` when there is none."""
        photos = list(self.calibration())
        if not photos:
            raise DataError(
                "int8 needs training photos of the run, and none was found", "name their folder: --data ROOT"
            )
        return photos

    @cached_property
    def model(self) -> Any:
        """The run's Keras model: pixels ``float32 (N, size, size, 3)`` 0..255 -> probabilities ``(N, C)``."""
        from finetune_cli.untrusted.keras_archive import load_keras_file

        return load_keras_file(self.run.file("model.keras"))


@dataclass(frozen=True, slots=True)
class Signature:
    """One way into a model. `takes`: pixels ``uint8 (n, size, size, 3)``, or a list of n encoded files.

    `any_size`: pixels may be ``(n, h, w, 3)``, too.
    """

    name: str
    takes: Literal["pixels", "bytes"]
    answer: Callable[[Any], Floats]
    any_size: bool = False


class Opened(Protocol):
    """An exported model, loaded in its own runtime; also a `Predictor`."""

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in the order of the outputs."""
        ...

    @property
    def settings(self) -> ImageSettings:
        """How photos are decoded."""
        ...

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``; may be called from several threads."""
        ...

    def signatures(self) -> tuple[Signature, ...]:
        """The ways into the model, each of which is compared with the run."""
        ...


@runtime_checkable
class Served(Protocol):
    """An exported model that Triton Inference Server runs."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Its input and its output, as they are in the file."""
        ...


class Form(Protocol):
    """An exported format; its class takes the options in the registry as keyword arguments."""

    name: ClassVar[str]

    @property
    def exact(self) -> bool:
        """Whether probabilities must equal those of the run; quantized forms are judged by their top answer."""
        ...

    @property
    def options(self) -> dict[str, str]:
        """The options that it was made with, for the manifest."""
        ...

    def write(self, source: Source, folder: Path) -> None:
        """Write the model's files into `folder`."""
        ...

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:
        """Load what `write` wrote; `path`: the main file, or the folder if there is none.

        workers: how many cores work. latency: all of them on one photo, where the runtime leaves the choice; otherwise
        each works on the photos of another thread.

        Raises `WeightsError` when it is damaged or was not made by an export.
        """
        ...


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what converters and their C++ parts print away from the terminal, and Python's warnings, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    with Path(os.devnull).open("wb") as sink, warnings.catch_warnings(), contextlib.ExitStack() as streams:
        warnings.simplefilter("ignore")
        for number in (1, 2):
            with contextlib.suppress(OSError):  # no such stream at all
                streams.callback(_restore, number, os.dup(number))
                os.dup2(sink.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _restore(number: int, copy: int) -> None:
    os.dup2(copy, number)
    os.close(copy)
