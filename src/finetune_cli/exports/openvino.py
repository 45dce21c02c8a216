"""The form `openvino`: OpenVINO's IR, an ``.xml`` file and the ``.bin`` file beside it.

``image float32 (N, size, size, 3)`` RGB 0..255 in, or ``uint8 (N, H, W, 3)``, any H and W, with pixels `any-size`;
``probabilities float32 (N, C)`` out, N from 1 to `triton.MOST_PHOTOS`; the layout, NHWC, is declared. `float16` halves
the weights, which are calculated with in float32; `int8` quantizes weights and activations with NNCF
(https://docs.openvino.ai/nncf), OpenVINO's own quantizer. The card is in the model's `rt_info`.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from finetune_cli import __version__
from finetune_cli.errors import FinetuneError, RunError, StorageError, WeightsError
from finetune_cli.exports import any_size
from finetune_cli.exports.card import EXPORT_IT, KEY, Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Quantize, Signature, Source, quiet
from finetune_cli.exports.triton import MOST_PHOTOS, Tensor
from finetune_cli.inference.predictor import read_model
from finetune_cli.inference.runtimes import OpenVinoRuntime, import_openvino, read_ir
from finetune_cli.text import first_line, shown
from finetune_cli.untrusted import openvino_ir

if TYPE_CHECKING:
    import openvino


class OpenVino:
    """Writes and opens ``model.xml``."""

    name: ClassVar[str] = "openvino"

    def __init__(self, quantize: Quantize = "none", pixels: any_size.Input = "fixed") -> None:
        self.quantize, self.pixels = quantize, pixels
        self.exact = quantize == "none"
        self.options: dict[str, str] = {"quantize": quantize, "pixels": pixels}

    def write(self, source: Source, folder: Path) -> None:
        """Write the run's own OpenVINO model with names for its ends and the card inside."""
        ov = import_openvino()
        model = read_model(source.run)
        if self.quantize == "int8":
            model = _quantized(model, source.calibration_photos())
        if self.pixels == "any-size":
            model = any_size.before_openvino(model, source.card.settings)
        image = model.get_parameters()[0]
        image.set_friendly_name("image")
        image.set_layout(ov.Layout("NHWC"))
        image.set_partial_shape(ov.PartialShape([ov.Dimension(1, MOST_PHOTOS), *list(image.partial_shape)[1:]]))
        model.validate_nodes_and_infer_types()
        model.inputs[0].get_tensor().set_names({"image"})
        model.outputs[0].get_tensor().set_names({"probabilities"})
        model.set_friendly_name(shown(source.run.name))
        model.set_rt_info(source.card.text(), KEY)
        model.set_rt_info(f"finetune-cli {__version__}", "producer")
        model.set_rt_info(source.describe(), "description")
        try:
            ov.save_model(model, folder / "model.xml", compress_to_fp16=self.quantize == "float16")
        except RuntimeError as exc:
            problem = f"OpenVINO cannot write the model: {openvino_ir.reason(exc)}"
            raise StorageError(problem, "free some space and run the same command again") from exc

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:
        """The model in the file `path`. Raises `WeightsError` when OpenVINO cannot load it."""
        return OpenedOpenVino(path, workers, latency)


def _quantized(model: "openvino.Model", photos: list[Pixels]) -> "openvino.Model":
    """`model` in int8, with the ranges of activations that `photos` show."""
    try:
        with quiet():
            import nncf

            nncf.set_log_level(logging.ERROR)
            # Measured on scenes and hymenoptera, the mean difference of a probability: 0.025 and 0.008 with NNCF's
            # defaults; 0.017 and 0.008 with the exact correction of biases, which takes twice as long; 0.016 and 0.006
            # when ranges are also the extremes of all photos, instead of the mean over them.
            extremes = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
            quantized: openvino.Model = nncf.quantize(
                model,
                nncf.Dataset(photos, lambda photo: photo[np.newaxis].astype(np.float32)),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(photos),
                fast_bias_correction=False,
                advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=extremes),
            )
    except Exception as exc:  # its errors have no common base
        raise FinetuneError(f"NNCF cannot quantize this model: {first_line(exc)}", "choose another --quantize") from exc
    return quantized


class OpenedOpenVino:
    """An OpenVINO model on the CPU, in float32 even where the CPU would prefer bfloat16."""

    def __init__(self, path: Path, workers: int, latency: bool = False) -> None:
        try:
            model = read_ir(path, any_size.without_resizing)
        except RunError as exc:
            raise WeightsError(exc.problem, "export again") from exc
        if not model.has_rt_info(KEY):
            raise WeightsError(f"{path} names no classes: it was not made by finetune export", EXPORT_IT)
        card = Card.parse(model.get_rt_info(KEY).astype(str), path)
        self.classes, self.settings = card.classes, card.settings
        model.reshape([-1, *list(model.input(0).partial_shape)[1:]])  # any number of photos, as in the other forms
        self._runtime = OpenVinoRuntime(model, "float32", workers, latency)
        self._path, self._workers = path, workers

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        return self._runtime.infer(photos)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Its input and its output, as they are in the file; only for files that were written here."""
        model = self._whole()
        return _tensor(model.input(0)), _tensor(model.output(0))

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input, with all that is behind it; only for files that were written here."""
        model = self._whole()
        if model.input(0).element_type.get_type_name() != "u8":
            return (Signature("image", "pixels", self.probabilities),)
        model.reshape([-1, *list(model.input(0).partial_shape)[1:]])
        whole = OpenVinoRuntime(model, "float32", self._workers)
        return (Signature("image", "pixels", whole.infer, any_size=True),)

    def _whole(self) -> "openvino.Model":
        return import_openvino().Core().read_model(self._path)


def _tensor(end: "openvino.Output") -> Tensor:
    lengths = [length.get_length() if length.is_static else -1 for length in list(end.partial_shape)[1:]]
    return Tensor(min(end.get_names(), default=""), np.dtype(end.element_type.to_dtype()).name, tuple(lengths))
