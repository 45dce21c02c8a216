"""What a run consists of besides its manifest: the model in two forms, tables, and the record of the surroundings.

`save_models` proves before the run is finished that both forms answer as the features said that they would.
"""

import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.config import Config
from finetune_cli.errors import GateError
from finetune_cli.metrics import Evaluation
from finetune_cli.model.keras_setup import import_keras
from finetune_cli.model.runtimes import OpenVinoRuntime, convert, import_openvino, read_ir
from finetune_cli.photos.dataset import Sample
from finetune_cli.tables import write_csv

PARITY_PHOTOS = 16
PARITY_LIMIT = 1e-4
PACKAGES = (
    "finetune-cli",
    "tensorflow",
    "keras",
    "openvino",
    "numpy",
    "scipy",
    "pillow",
    "opencv-python-headless",
    "h5py",
)


def save_models(
    folder: Path,
    model: Any,
    photos: NDArray[np.uint8],
    expected: NDArray[np.float32],
) -> dict[str, float]:
    """Write `model.keras` and `inference/` and compare what was written, loaded anew, with `expected`.

    `photos`: ``uint8 (n, H, W, 3)``; `expected`: ``float32 (n, C)``, the probabilities that the run's numbers are made
    of. Returns the largest differences. Raises `GateError` when one exceeds `PARITY_LIMIT`.
    """
    keras, ov = import_keras(), import_openvino()
    with files.atomic_path(folder / "model.keras") as path:
        model.save(path)
    (folder / "inference").mkdir(exist_ok=True)
    xml = folder / "inference" / "model.xml"
    ov.save_model(convert(model), xml, compress_to_fp16=False)
    files.fsync_file(xml)
    files.fsync_file(xml.with_suffix(".bin"))
    files.fsync_folder(xml.parent)
    if not len(photos):
        return {}
    loaded = keras.models.load_model(folder / "model.keras", safe_mode=True, compile=False)
    from_keras = np.asarray(loaded(photos.astype(np.float32), training=False))
    runtime = OpenVinoRuntime(read_ir(xml), "float32", workers=1)
    from_openvino = np.concatenate([runtime.infer(photo[None]) for photo in photos])
    parity = {
        "photos": len(photos),
        "openvino_against_keras": float(np.abs(from_openvino - from_keras).max()),
        "openvino_against_measured": float(np.abs(from_openvino - expected).max()),
    }
    worst = max(parity["openvino_against_keras"], parity["openvino_against_measured"])
    if not worst <= PARITY_LIMIT:
        raise GateError(
            f"the saved model disagrees with what was measured: probabilities differ by {worst:.2g}, "
            f"the limit is {PARITY_LIMIT:g}",
            "please report this with environment.json from the run directory",
        )
    return parity


class Judged(NamedTuple):
    """One split of photos, what the model says of them (``float32 (n, C)``), and how good that is."""

    split: str
    samples: Sequence[Sample]
    probabilities: NDArray[np.float32]
    evaluation: Evaluation


def write_tables(
    folder: Path,
    classes: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Sample], NDArray[np.float32], Evaluation]],
) -> list[str]:
    """Write metrics.json, per_class.csv and predictions.csv into `folder`; returns their names."""
    files.write_json(folder / "metrics.json", {split: evaluation.to_json() for split, _s, _p, evaluation in parts})
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


def write_environment(path: Path, config: Config, device: str, precision: str, workers: int) -> None:
    """Write environment.json: everything outside the config that can change a number."""
    files.write_json(path, environment(config, device, precision, workers))


def environment(config: Config, device: str, precision: str, workers: int) -> dict[str, Any]:
    """Packages, Python, system, processor, seed and threads, as plain JSON values."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "device": device,
        "feature_precision": precision,
        "seed": config.training.seed,
        "threads": workers,
        "git_commit": _git_commit(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine(), "model": platform.processor(), "flags": []}
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                facts["model"] = value.strip()
            elif key.strip() == "flags":
                facts["flags"] = sorted(
                    flag for flag in value.split() if flag.startswith(("avx", "amx", "fma", "sse4"))
                )
                break
    return facts


def _git_commit() -> str | None:
    """The commit of the repository that the current folder is in, if any: people version their configs."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
