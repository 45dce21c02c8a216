"""The form `keras`: the run's own ``.keras`` file, byte for byte, with `classes.json` beside it.

It holds stock layers alone, so ``keras.models.load_model(path, safe_mode=True)`` loads it without this package:
``image float32 (N, size, size, 3)`` RGB 0..255 in, probabilities ``(N, C)`` out. (In runs of earlier versions the input
is called `pixels`; the file is the run's own, so its name stays.)
"""

import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np

from finetune_cli.exports.card import Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature, Source


class KerasFile:
    """Writes and opens ``model.keras``."""

    name: ClassVar[str] = "keras"
    exact = True
    options: ClassVar[dict[str, str]] = {}

    def write(self, source: Source, folder: Path) -> None:
        """Copy the run's model into `folder`."""
        shutil.copyfile(source.run.file("model.keras"), folder / "model.keras")

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:  # noqa: ARG004 - TensorFlow shares out its work by itself
        """The model in the file `path`. Raises `WeightsError` when Keras cannot load it."""
        return OpenedKeras(path)


class OpenedKeras:
    """A Keras model on TensorFlow."""

    def __init__(self, path: Path) -> None:
        from finetune_cli.untrusted.keras_archive import load_keras_file

        card = Card.read(path.parent)
        self.classes, self.settings = card.classes, card.settings
        model = load_keras_file(path)
        import tensorflow as tf

        # As `Model.predict` runs it: a compiled graph, many times faster than single operations.
        self._run = tf.function(
            lambda photos: model(photos, training=False),
            input_signature=[tf.TensorSpec(model.input_shape, tf.float32)],
            autograph=False,
        )

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        return np.asarray(self._run(photos.astype(np.float32)))

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input."""
        return (Signature("image", "pixels", self.probabilities),)
