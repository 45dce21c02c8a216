"""The form `openvino`: OpenVINO's IR, an ``.xml`` file and the ``.bin`` file beside it.

``image float32 (N, size, size, 3)`` RGB 0..255 in, ``probabilities float32 (N, C)`` out, N free; with `any-size`, image
is ``uint8 (N, H, W, 3)``, any H and W. `float16` halves the weights; they are calculated with in float32. The card is
in the model's `rt_info`.
"""

from pathlib import Path
from typing import ClassVar, Literal

from finetune_cli.errors import RunError, StorageError, WeightsError
from finetune_cli.exports import any_size
from finetune_cli.exports.card import EXPORT_IT, KEY, Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature, Source
from finetune_cli.inference.predictor import read_model
from finetune_cli.inference.runtimes import OpenVinoRuntime, import_openvino, read_ir
from finetune_cli.untrusted import openvino_ir

Precision = Literal["float32", "float16"]


class OpenVino:
    """Writes and opens ``model.xml``."""

    name: ClassVar[str] = "openvino"

    def __init__(self, precision: Precision = "float32", pixels: any_size.Input = "fixed") -> None:
        self.precision = precision
        self.pixels = pixels
        self.exact = precision == "float32"
        self.options: dict[str, str] = {"precision": precision, "pixels": pixels}

    def write(self, source: Source, folder: Path) -> None:
        """Write the run's own OpenVINO model with names for its ends and the card inside."""
        ov = import_openvino()
        model = read_model(source.run)
        if self.pixels == "any-size":
            model = any_size.before_openvino(model, source.card.settings)
        model.inputs[0].get_tensor().set_names({"image"})
        model.outputs[0].get_tensor().set_names({"probabilities"})
        model.set_rt_info(source.card.text(), KEY)
        try:
            ov.save_model(model, folder / "model.xml", compress_to_fp16=self.precision == "float16")
        except RuntimeError as exc:
            problem = f"OpenVINO cannot write the model: {openvino_ir.reason(exc)}"
            raise StorageError(problem, "free some space and run the same command again") from exc

    @staticmethod
    def open(path: Path, workers: int) -> Opened:
        """The model in the file `path`. Raises `WeightsError` when OpenVINO cannot load it."""
        return OpenedOpenVino(path, workers)


class OpenedOpenVino:
    """An OpenVINO model on the CPU, in float32 even where the CPU would prefer bfloat16."""

    def __init__(self, path: Path, workers: int) -> None:
        try:
            model = read_ir(path, any_size.without_resizing)
        except RunError as exc:
            raise WeightsError(exc.problem, "export again") from exc
        if not model.has_rt_info(KEY):
            raise WeightsError(f"{path} names no classes: it was not made by finetune export", EXPORT_IT)
        card = Card.parse(model.get_rt_info(KEY).astype(str), path)
        self.classes, self.settings = card.classes, card.settings
        self._runtime = OpenVinoRuntime(model, "float32", workers)
        self._path, self._workers = path, workers

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, size, size, 3)`` RGB -> ``float32 (n, C)``."""
        return self._runtime.infer(photos)

    def signatures(self) -> tuple[Signature, ...]:
        """The model's only input, with all that is behind it; only for files that were written here."""
        model = import_openvino().Core().read_model(self._path)
        if model.input(0).element_type.get_type_name() != "u8":
            return (Signature("image", "pixels", self.probabilities),)
        whole = OpenVinoRuntime(model, "float32", self._workers)
        return (Signature("image", "pixels", whole.infer, any_size=True),)
