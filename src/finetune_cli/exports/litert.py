"""The form `litert`: one ``.tflite`` file for phones and embedded devices, with `labels.txt` beside it and inside it.

``image float32 (1, size, size, 3)`` RGB 0..255 in, ``probabilities float32 (1, C)`` out, in every variant: `none`
keeps float32 weights, `float16` halves the file, `int8` quantizes weights and activations with ranges seen on training
photos of the run. The metadata name the labels (`litert_metadata.py`), which are in a zip archive at the end of the
file, so that ``unzip model.tflite`` shows them.
"""

import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from finetune_cli import files
from finetune_cli.errors import FinetuneError, MissingExtra, WeightsError
from finetune_cli.exports import card as cards
from finetune_cli.exports.card import EXPORT_IT, Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Quantize, Signature, Source, quiet
from finetune_cli.exports.litert_metadata import LABELS, card_text, with_metadata
from finetune_cli.exports.tf_graph import with_constants
from finetune_cli.text import first_line, shown


class LiteRt:
    """Writes and opens ``model.tflite``."""

    name: ClassVar[str] = "litert"

    def __init__(self, quantize: Quantize = "none") -> None:
        self.quantize = quantize
        self.exact = quantize == "none"
        self.options: dict[str, str] = {"quantize": quantize}

    def write(self, source: Source, folder: Path) -> None:
        """Convert the run's model. Raises `FinetuneError` when the converter lacks an operation."""
        photos = source.calibration_photos() if self.quantize == "int8" else []
        model = source.model
        try:
            with quiet():
                converted = self._convert(model, source.card, photos)
        except Exception as exc:  # the converter raises dozens of unrelated types
            raise FinetuneError(
                f"the model cannot be converted to LiteRT: {first_line(exc)}", "choose another --format"
            ) from exc
        labels = "".join(f"{shown(name)}\n" for name in source.card.classes)
        path = folder / "model.tflite"
        path.write_bytes(with_metadata(converted, source.card.text(), source.run.name))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_member(LABELS), labels)
        (folder / LABELS).write_text(labels, "utf-8", newline="\n")

    def _convert(self, model: Any, card: Card, photos: list[Pixels]) -> bytes:
        import tensorflow as tf

        function = with_constants(model, card.settings.size, photos=1).get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
        if self.quantize != "none":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if self.quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if self.quantize == "int8":
            converter.representative_dataset = lambda: _one_by_one(photos)
        converted: bytes = converter.convert()
        return converted

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:  # noqa: ARG004 - it answers one photo at a time
        """The model in the file `path`. Raises `WeightsError` when LiteRT cannot load it."""
        return OpenedLiteRt(path, workers)


def _one_by_one(photos: list[Pixels]) -> Iterator[list[Floats]]:
    for photo in photos:
        yield [photo[None].astype(np.float32)]


def _member(name: str) -> zipfile.ZipInfo:
    """An entry of a zip archive without the time of day, so that equal models give equal files."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


class OpenedLiteRt:
    """A ``.tflite`` model in the LiteRT interpreter, which runs one photo at a time."""

    def __init__(self, path: Path, workers: int) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as exc:
            raise MissingExtra("the format litert", "litert") from exc
        card = _read_card(path)
        self.classes, self.settings = card.classes, card.settings
        try:
            with quiet():
                self._interpreter = Interpreter(model_path=os.fspath(path), num_threads=workers)
                self._interpreter.allocate_tensors()
                self._run = self._interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as exc:
            raise WeightsError(f"{path} cannot be loaded as a LiteRT model: {first_line(exc)}", "export again") from exc
        self._one_at_a_time = threading.Lock()

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        with self._one_at_a_time:
            rows = [self._run(image=photo[None].astype(np.float32))["probabilities"] for photo in photos]
        return np.concatenate(rows)

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input."""
        return (Signature("image", "pixels", self.probabilities),)


def _read_card(path: Path) -> Card:
    try:
        data = files.read_regular(path)
        text = card_text(data)
        if text is None:  # of an export that kept its card beside the labels
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                text = archive.read(cards.FILE).decode("utf-8")
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as exc:
        raise WeightsError(
            f"{path} names no classes: it is damaged, or was not made by finetune export", EXPORT_IT
        ) from exc
    return Card.parse(text, path)
