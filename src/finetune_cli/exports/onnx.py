"""The form `onnx`: one file for ONNX Runtime and everything else that reads ONNX.

``image float32 (N, size, size, 3)`` RGB 0..255 in, ``probabilities float32 (N, C)`` out, N free; with `any-size`, image
is ``uint8 (N, H, W, 3)``, any H and W. The card is in the file's metadata.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from finetune_cli.errors import FinetuneError, MissingExtra, UsageError, WeightsError
from finetune_cli.exports import any_size, page
from finetune_cli.exports.card import EXPORT_IT, KEY, Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature, Source, quiet
from finetune_cli.exports.tf_graph import with_constants
from finetune_cli.text import first_line

# The newest set of operators that tf2onnx writes for these models without experimental ones; ONNX Runtime >= 1.12.
_OPSET = 17
_ERRORS_ONLY = 3


class Onnx:
    """Writes and opens ``model.onnx``."""

    name: ClassVar[str] = "onnx"
    exact = True

    def __init__(self, pixels: any_size.Input = "fixed", page: Literal["no page", "page"] = "no page") -> None:
        if (pixels, page) == ("any-size", "page"):
            raise UsageError("the page resizes photos by itself", "leave out --page or --pixels any-size")
        self.pixels, self.page = pixels, page
        self.options: dict[str, str] = {"pixels": pixels, "page": page}

    def write(self, source: Source, folder: Path) -> None:
        """Convert the run's model. Raises `FinetuneError` when tf2onnx lacks an operation.

        Raises `WeightsError` when the library for the page cannot be downloaded.
        """
        model, card = source.model, source.card
        with quiet():
            import onnx
            import tf2onnx

            try:
                function = with_constants(model, card.settings.size, photos=None)
                converted, _ = tf2onnx.convert.from_function(function, function.input_signature, opset=_OPSET)
                if self.pixels == "any-size":
                    any_size.before_onnx(converted, card.settings, _OPSET)
                _rename_by_position(converted.graph)
                onnx.helper.set_model_props(converted, {KEY: card.text()})
                onnx.checker.check_model(converted)
            except Exception as exc:  # the converter raises dozens of unrelated types
                raise FinetuneError(
                    f"tf2onnx cannot convert this model: {first_line(exc)}", "choose another --format"
                ) from exc
        model_file = converted.SerializeToString()
        (folder / "model.onnx").write_bytes(model_file)
        if self.page == "page":
            page.write(folder, model_file, card, source.run.name)

    @staticmethod
    def open(path: Path, workers: int) -> Opened:  # noqa: ARG004 - ONNX Runtime shares out its work by itself
        """The model in the file `path`. Raises `WeightsError` when ONNX Runtime cannot load it."""
        return OpenedOnnx(path)


def _rename_by_position(graph: Any) -> None:
    """Name nodes, tensors and constants by their positions, so that equal models give equal files.

    tf2onnx counts through the life of a process, and orders constants by the hashes of their names.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return  # graphs inside nodes see the names outside; none of Keras's classifiers has one
    graph.doc_string = ""
    del graph.value_info[:]  # shapes that ONNX infers again
    ends = (*graph.input, *graph.output)
    for value in ends:
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    names = {value.name: value.name for value in ends}
    constants = {constant.name: constant for constant in graph.initializer}
    used = [name for node in graph.node for name in node.input if name in constants]
    names |= {name: f"constant_{i}" for i, name in enumerate(dict.fromkeys(used))}
    for i, node in enumerate(graph.node):
        node.name, node.doc_string = f"{node.op_type}_{i}", ""
        names |= {name: f"{node.name}_{j}" for j, name in enumerate(node.output) if name and name not in names}
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] if name else "" for name in node.output]
    ordered = [constants[name] for name in dict.fromkeys(used)]
    for constant in ordered:
        constant.name = names[constant.name]
    del graph.initializer[:]
    graph.initializer.extend(ordered)


class OpenedOnnx:
    """An ONNX model in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as exc:
            raise MissingExtra("the format onnx", "onnx") from exc
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, ["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's errors have no common base
            raise WeightsError(f"{path} cannot be loaded as an ONNX model: {first_line(exc)}", "export again") from exc
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise WeightsError(f"{path} names no classes: it was not made by finetune export", EXPORT_IT)
        card = Card.parse(text, path)
        self.classes, self.settings = card.classes, card.settings
        self._any_size = self._session.get_inputs()[0].type == "tensor(uint8)"

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        image = photos if self._any_size else photos.astype(np.float32)
        (answer,) = self._session.run(["probabilities"], {"image": image})
        return np.asarray(answer, np.float32)

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input."""
        return (Signature("image", "pixels", self.probabilities, self._any_size),)
