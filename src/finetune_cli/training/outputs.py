"""What a run consists of besides its manifest: the model in two forms, and tables.

Before the run is finished, `save_models` checks that both forms give the probabilities that its metrics are based on.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files, signals
from finetune_cli.errors import GateError, StorageError
from finetune_cli.inference.runtimes import OpenVinoRuntime, convert, import_openvino, read_ir
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics.scores import Evaluation
from finetune_cli.photos.scan import Sample
from finetune_cli.runs.manifest import Parity
from finetune_cli.tables import write_csv

PARITY_PHOTOS = 16
PARITY_LIMIT = 1e-4


@signals.deferred()
def save_models(
    folder: Path,
    model: Any,
    photos: NDArray[np.uint8],
    expected: NDArray[np.float32],
) -> Parity | None:
    """Write `model.keras` and `inference/`, load both again and compare their probabilities with `expected`.

    `photos`: ``uint8 (n, H, W, 3)``; `expected`: ``float32 (n, C)``, the probabilities that the run's metrics are
    based on. Returns the largest differences, None without photos. Raises `GateError` when one exceeds `PARITY_LIMIT`,
    `StorageError` when a file cannot be written.
    """
    keras = import_keras()
    size = 4 * model.count_params()
    with files.atomic_path(folder / "model.keras", size) as path:
        model.save(path)
    signals.check()
    _save_ir(convert(model), folder / "inference", size)
    signals.check()
    if not len(photos):
        return None
    loaded = keras.models.load_model(folder / "model.keras", safe_mode=True, compile=False)
    from_keras = np.asarray(loaded(photos.astype(np.float32), training=False))
    runtime = OpenVinoRuntime(read_ir(folder / "inference" / "model.xml"), "float32", workers=1)
    from_openvino = np.concatenate([runtime.infer(photo[None]) for photo in photos])
    parity = Parity(
        photos=len(photos),
        openvino_against_keras=float(np.abs(from_openvino - from_keras).max()),
        openvino_against_measured=float(np.abs(from_openvino - expected).max()),
    )
    worst = max(parity.openvino_against_keras, parity.openvino_against_measured)
    if not worst <= PARITY_LIMIT:
        raise GateError(
            f"the saved model disagrees with the trained one: probabilities differ by {worst:.2g}, "
            f"the limit is {PARITY_LIMIT:g}",
            "please report this with environment.json from the run directory",
        )
    return parity


def _save_ir(model: Any, folder: Path, size: int) -> None:
    """Write an OpenVINO model, of `size` bytes of weights, as the folder `folder`. Raises `StorageError`."""
    if os.path.lexists(folder):  # of a killed training
        files.remove_folder(folder)
    try:
        with files.atomic_folder(folder, size) as temporary:
            import_openvino().save_model(model, temporary / "model.xml", compress_to_fp16=False)
    except RuntimeError as exc:  # of a C++ stream, which does not say why
        files.free_space_check(folder.parent, size)
        raise StorageError(
            f"{folder} cannot be written ({files.human_bytes(size)} are needed)", "see the limit with: ulimit -f"
        ) from exc


class Judged(NamedTuple):
    """A split, its photos, their predicted probabilities ``float32 (n, C)``, and the metrics."""

    split: str
    samples: Sequence[Sample]
    probabilities: NDArray[np.float32]
    evaluation: Evaluation


def write_tables(
    folder: Path,
    classes: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Sample], NDArray[np.float32], Evaluation]],
    fine_tuning: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write metrics.json, per_class.csv and predictions.csv into `folder`; returns their names.

    `fine_tuning`: what was tried and kept, for metrics.json; None for a training without that stage.
    """
    metrics: dict[str, Any] = {split: evaluation.to_json() for split, _s, _p, evaluation in parts}
    files.write_json(
        folder / "metrics.json", metrics | ({"fine_tuning": fine_tuning} if fine_tuning is not None else {})
    )
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
    return ["metrics.json", "per_class.csv", "predictions.csv"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{float(value):.6g}"
