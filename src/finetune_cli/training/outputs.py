"""What a run consists of besides its manifest: the model in two forms, and tables.

Before the run is finished, both forms must give the probabilities that its metrics are based on. `save_with_proof`
makes them of a converted backbone, and Keras loads its form in another process; `save_models` saves a model of this
process, whose backbone was tuned.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files, signals
from finetune_cli.errors import GateError
from finetune_cli.head import finished
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference.runtimes import OpenVinoRuntime, read_ir, save_ir
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics.scores import Evaluation
from finetune_cli.photos.scan import Sample
from finetune_cli.runs.manifest import Parity, Unknown
from finetune_cli.tables import write_csv
from finetune_cli.training.converted import Converted
from finetune_cli.training.keras_process import KerasProcess

if TYPE_CHECKING:
    import openvino

PARITY_PHOTOS = 16
PARITY_LIMIT = 1e-4
MODELS = ("model.keras", "inference/model.xml", "inference/model.bin")

Proof = Callable[[], Parity | None]


@dataclass(frozen=True, eq=False)
class Parts:
    """What `save_with_proof` makes the model of."""

    backbone: Converted
    head: Head
    temperature: float


def save_with_proof(
    folder: Path, parts: Parts, photos: NDArray[np.uint8], expected: NDArray[np.float32], keras: KerasProcess
) -> Proof:
    """Write `model.keras` and `inference/`, and return what waits for the proof that both answer as `expected`.

    `photos`, `expected` and what the proof returns and raises: see `save_models`. The files are loaded again, one by
    OpenVINO, the other by Keras in its own process, which takes a while. Raises `StorageError` when a file cannot be
    written.
    """
    backbone, head = parts.backbone, parts.head
    size = 4 * (backbone.parameters + head.kernel.size + head.bias.size)
    with files.atomic_path(folder / "model.keras", size) as path:
        finished.write_keras(backbone.template, path, head, parts.temperature)
    if len(photos):
        keras.request("probabilities", {"model": str(folder.absolute() / "model.keras")}, photos)
    model = finished.openvino_model(backbone.openvino_model(), head, parts.temperature)
    _save_inference(model, folder / "inference", size)
    if not len(photos):
        return lambda: None
    from_openvino = _openvino_answers(folder / "inference", photos)
    return lambda: _compared(from_openvino, keras.answer(), expected)


@signals.deferred()
def save_models(
    folder: Path,
    model: Any,
    graph: "openvino.Model",
    photos: NDArray[np.uint8],
    expected: NDArray[np.float32],
) -> Parity | None:
    """Write `model.keras` and `inference/`, load both again and compare their probabilities with `expected`.

    `model`, for Keras, and `graph`, for OpenVINO, are the same. `photos`: ``uint8 (n, H, W, 3)``; `expected`:
    ``float32 (n, C)``, the probabilities that the run's metrics are based on. Returns the largest differences, None
    without photos. Raises `GateError` when one exceeds `PARITY_LIMIT`, `StorageError` when a file cannot be written.
    """
    keras = import_keras()
    size = 4 * model.count_params()
    with files.atomic_path(folder / "model.keras", size) as path:
        model.save(path)
    signals.check()
    _save_inference(graph, folder / "inference", size)
    signals.check()
    if not len(photos):
        return None
    loaded = keras.models.load_model(folder / "model.keras", safe_mode=True, compile=False)
    from_keras = np.asarray(loaded(photos.astype(np.float32), training=False))
    return _compared(_openvino_answers(folder / "inference", photos), from_keras, expected)


def _save_inference(model: "openvino.Model", folder: Path, size: int) -> None:
    """Write an OpenVINO model, of `size` bytes of weights, as the folder `folder`. Raises `StorageError`."""
    if os.path.lexists(folder):  # of a killed training
        files.remove_folder(folder)
    with files.atomic_folder(folder, size) as temporary:
        save_ir(model, temporary / "model.xml", folder, size)


def _openvino_answers(folder: Path, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    runtime = OpenVinoRuntime(read_ir(folder / "model.xml"), "float32", workers=1)
    return np.concatenate([runtime.infer(photo[None]) for photo in photos])


def _compared(
    from_openvino: NDArray[np.float32], from_keras: NDArray[Any] | None, expected: NDArray[np.float32]
) -> Parity:
    """The largest differences. Raises `GateError` when one exceeds `PARITY_LIMIT`."""
    parity = Parity(
        photos=len(expected),
        openvino_against_keras=_apart(from_openvino, from_keras),
        openvino_against_measured=_apart(from_openvino, expected),
    )
    worst = max(parity.openvino_against_keras, parity.openvino_against_measured, _apart(from_keras, expected))
    if not worst <= PARITY_LIMIT:
        raise GateError(
            f"the saved model disagrees with the trained one: probabilities differ by {worst:.2g}, "
            f"the limit is {PARITY_LIMIT:g}",
            "please report this with environment.json from the run directory",
        )
    return parity


def _apart(one: NDArray[Any] | None, other: NDArray[Any] | None) -> float:
    """The largest difference of two arrays; infinite when their shapes differ or one is not finite."""
    if one is None or other is None or one.shape != other.shape:
        return math.inf
    apart = float(np.abs(one - other).max())
    return apart if math.isfinite(apart) else math.inf


class ScoredSplit(NamedTuple):
    """A split, its photos, their predicted probabilities ``float32 (n, C)``, and the metrics."""

    split: str
    samples: Sequence[Sample]
    probabilities: NDArray[np.float32]
    evaluation: Evaluation


def write_metrics(
    folder: Path,
    parts: Sequence[ScoredSplit],
    fine_tuning: Mapping[str, Any] | None = None,
    unknown: Unknown | None = None,
) -> list[str]:
    """Write metrics.json into `folder`; returns its name.

    `fine_tuning`: what was tried and kept; `unknown`: how photos of none of the classes are refused; None for a
    training without.
    """
    metrics: dict[str, Any] = {part.split: part.evaluation.to_json() for part in parts}
    if fine_tuning is not None:
        metrics["fine_tuning"] = fine_tuning
    if unknown is not None:
        metrics["unknown"] = unknown.to_json()
    files.write_json(folder / "metrics.json", metrics)
    return ["metrics.json"]


def write_tables(folder: Path, classes: Sequence[str], parts: Sequence[ScoredSplit]) -> list[str]:
    """Write per_class.csv and predictions.csv into `folder`; returns their names."""
    write_csv(
        folder / "per_class.csv",
        ("split", "class", "precision", "recall", "f1", "support"),
        (
            (split, row.name, *(_number(x) for x in (row.precision, row.recall, row.f1)), row.support)
            for split, _samples, _probabilities, evaluation in parts
            for row in evaluation.per_class
        ),
    )
    write_csv(
        folder / "predictions.csv",
        ("split", "path", "true", "predicted", *classes),
        (
            (split, sample.name, classes[sample.label], classes[int(row.argmax())], *(_number(x) for x in row))
            for split, samples, probabilities, _evaluation in parts
            for sample, row in zip(samples, probabilities, strict=True)
        ),
    )
    return ["per_class.csv", "predictions.csv"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{float(value):.6g}"
