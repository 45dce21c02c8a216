"""The form `onnx`: one file for ONNX Runtime and everything else that reads ONNX.

``image float32 (N, size, size, 3)`` RGB 0..255 in, or ``(N, 3, size, size)`` with layout `nchw`, or ``uint8 (N, H, W,
3)``, any H and W, with pixels `any-size`; ``probabilities float32 (N, C)`` out, N free. The card is in the file's
metadata. In every variant of `quantize` the ends are the same: `float16` halves the weights, which are calculated with
in float32; `int8` quantizes weights and activations with ONNX Runtime's own quantizer, in the format that puts a pair
of QuantizeLinear and DequantizeLinear around every operation
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from finetune_cli import __version__
from finetune_cli.errors import FinetuneError, MissingExtra, UsageError, WeightsError
from finetune_cli.exports import any_size, page
from finetune_cli.exports.card import EXPORT_IT, KEY, Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Quantize, Signature, Source, quiet
from finetune_cli.exports.tf_graph import with_constants
from finetune_cli.exports.triton import Tensor
from finetune_cli.text import first_line, shown

# The newest set of operators that tf2onnx writes for these models without experimental ones; ONNX Runtime >= 1.12.
_OPSET = 17
_ERRORS_ONLY = 3
_LEAST_HALVED = 64  # numbers; a shorter constant gains less than its cast costs

Layout = Literal["nhwc", "nchw"]


class Onnx:
    """Writes and opens ``model.onnx``."""

    name: ClassVar[str] = "onnx"

    def __init__(
        self,
        quantize: Quantize = "none",
        layout: Layout = "nhwc",
        pixels: any_size.Input = "fixed",
        page: Literal["no page", "page"] = "no page",
    ) -> None:
        if (pixels, page) == ("any-size", "page"):
            raise UsageError("the page resizes photos by itself", "leave out --page or --pixels any-size")
        if layout == "nchw" and (pixels, page) != ("fixed", "no page"):
            option = "--page" if page == "page" else "--pixels any-size"
            raise UsageError(f"{option} takes photos with channels last", f"leave out {option} or --layout nchw")
        self.quantize, self.layout, self.pixels, self.page = quantize, layout, pixels, page
        self.exact = quantize == "none"
        self.options: dict[str, str] = {"quantize": quantize, "layout": layout, "pixels": pixels, "page": page}

    def write(self, source: Source, folder: Path) -> None:
        """Convert the run's model. Raises `FinetuneError` when tf2onnx lacks an operation.

        Raises `WeightsError` when the library for the page cannot be downloaded.
        """
        photos = source.calibration_photos() if self.quantize == "int8" else []
        model, card = source.model, source.card
        with quiet():
            import onnx
            import tf2onnx

            try:
                function = with_constants(model, card.settings.size, photos=None)
                converted, _ = tf2onnx.convert.from_function(
                    function,
                    function.input_signature,
                    opset=_OPSET,
                    inputs_as_nchw=["image:0"] if self.layout == "nchw" else None,
                )
                _rename_by_position(converted.graph)
                if self.quantize == "float16":
                    _halve_weights(converted.graph)
                if self.quantize == "int8":
                    converted = _quantized(converted, (self._given(photo[None]) for photo in photos))
                if self.pixels == "any-size":
                    any_size.before_onnx(converted, card.settings, _OPSET)
                    _rename_by_position(converted.graph)  # again: tf2onnx named the operations in front
                converted.producer_name, converted.producer_version = "finetune-cli", __version__
                converted.graph.name, converted.doc_string = shown(source.run.name), source.describe()
                onnx.helper.set_model_props(converted, {KEY: card.text()})
                onnx.checker.check_model(converted)
            except Exception as exc:  # the converters raise dozens of unrelated types
                raise FinetuneError(
                    f"the model cannot be converted to ONNX: {first_line(exc)}", "choose another --format"
                ) from exc
        model_file = converted.SerializeToString()
        (folder / "model.onnx").write_bytes(model_file)
        if self.page == "page":
            page.write(folder, model_file, card, source.run.name)

    def _given(self, photos: Pixels) -> Floats:
        """`photos` ``uint8 (n, size, size, 3)`` as the model's input wants them."""
        floats = photos.astype(np.float32)
        return floats.transpose(0, 3, 1, 2) if self.layout == "nchw" else floats

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:  # noqa: ARG004 - it shares out its work by itself
        """The model in the file `path`. Raises `WeightsError` when ONNX Runtime cannot load it."""
        return OpenedOnnx(path, workers)


def _halve_weights(graph: Any) -> None:
    """Store weights as float16, each followed by a cast to float32, which runtimes do once when they load the model."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for constant in graph.initializer:
        values = numpy_helper.to_array(constant)
        if values.dtype != np.float32 or values.size < _LEAST_HALVED or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = constant.name
        constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [constant.name], [name], f"Cast_{name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _quantized(model: Any, inputs: Iterator[Floats]) -> Any:
    """`model` in int8 with the ranges of activations that `inputs` show. Returns another `onnx.ModelProto`.

    Weights get a scale for each output channel: with one for a whole convolution, a depthwise one loses its small
    channels, and on scenes 81 instead of 99 % of the answers stayed the same.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Floats] | None:
            given = next(inputs, None)
            return None if given is None else {"image": given}

    with tempfile.TemporaryDirectory() as name:
        plain, fused, quantized = (os.fspath(Path(name, f"{step}.onnx")) for step in ("plain", "fused", "quantized"))
        onnx.save(model, plain)
        quant_pre_process(plain, fused, skip_symbolic_shape=True)  # fuses normalization into convolutions
        quantize_static(
            fused,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantized)


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

    def __init__(self, path: Path, workers: int) -> None:
        try:
            import onnxruntime
        except ImportError as exc:
            raise MissingExtra("the format onnx", "onnx") from exc
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = workers
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
        # No photo is 3 pixels high.
        self._channels_first = any(end.name == "image" and end.shape[1:2] == [3] for end in self._session.get_inputs())

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        image = photos.transpose(0, 3, 1, 2) if self._channels_first else photos
        image = image if self._any_size else image.astype(np.float32)
        (answer,) = self._session.run(["probabilities"], {"image": image})
        return np.asarray(answer, np.float32)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Its input and its output, as they are in the file."""
        (image,), (answer,) = self._session.get_inputs(), self._session.get_outputs()
        return _tensor(image), _tensor(answer)

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input."""
        return (Signature("image", "pixels", self.probabilities, self._any_size),)


def _tensor(end: Any) -> Tensor:
    lengths = [length if isinstance(length, int) else -1 for length in end.shape[1:]]
    return Tensor(
        end.name, {"tensor(float)": "float32", "tensor(uint8)": "uint8"}.get(end.type, end.type), tuple(lengths)
    )
