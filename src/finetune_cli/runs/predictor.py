"""A finished run as something that answers for photos; neither TensorFlow nor Keras is imported."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_cli.photos.images import ImageSettings
from finetune_cli.runs.run import Run

PHOTOS_A_CALL = 4


class Predictor(Protocol):
    """Anything that answers for photos: a run, or one of its exports."""

    classes: Sequence[str]
    settings: ImageSettings

    def probabilities(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` RGB -> ``float32 (n, C)``; may be called from several threads."""
        ...


class RunPredictor:
    """A finished run, through its OpenVINO form, in float32 on the CPU.

    `latency`: all cores work on one photo; otherwise photos are shared out among `workers` threads.
    """

    def __init__(self, run: Run, workers: int, latency: bool = False) -> None:
        from finetune_cli.model.runtimes import OpenVinoRuntime, read_ir

        run.file("inference/model.bin")
        model = read_ir(run.file("inference/model.xml"))
        self.classes = run.classes
        self.settings = run.image_settings
        self._runtime = OpenVinoRuntime(model, "float32", workers, latency)

    def probabilities(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` RGB -> ``float32 (n, C)``."""
        return self._runtime.infer(photos)
