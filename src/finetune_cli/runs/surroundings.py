"""Everything outside the config that can change a number: recorded as environment.json, compared later.

Two runs with equal configs, photos and surroundings have equal weights; `differences` says why they may not.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from finetune_cli import files
from finetune_cli.config import Config
from finetune_cli.errors import RunError
from finetune_cli.parallel import cores

FILE = "environment.json"
_REMEDY = "restore the run from a copy, or train again"
_PACKAGES = (
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
# What TensorFlow, oneDNN, OpenBLAS and CUDA read, and what changes their arithmetic.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)


class Difference(NamedTuple):
    """One fact that is not what it was; values are short texts, empty where there was none."""

    what: str
    before: str
    now: str


def environment(config: Config, device: str, precision: str, workers: int) -> dict[str, Any]:
    """Packages, Python, system, processor, GPU, seed, threads and commit, as plain JSON values."""
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
        "device": device,
        "gpus": _gpus() if device == "gpu" else [],
        "feature_precision": precision,
        "seed": config.training.seed,
        "threads": workers,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "git_commit": _git_commit(),
    }


def write_environment(folder: Path, config: Config, device: str, precision: str, workers: int) -> None:
    """Write environment.json into `folder`."""
    files.write_json(folder / FILE, environment(config, device, precision, workers))


def read_environment(path: Path) -> dict[str, Any]:
    """What `write_environment` wrote. Raises `RunError` when it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no facts", _REMEDY)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two environments, in the order of their keys."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        Difference(key, old.get(key, ""), new.get(key, ""))
        for key in dict.fromkeys((*old, *new))
        if old.get(key, "") != new.get(key, "")
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", " ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)


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


def _gpus() -> list[str]:
    """The names of the GPUs that TensorFlow sees; it is loaded already where there are any."""
    import tensorflow as tf

    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return [str(detail.get("device_name", "unknown")) for detail in details]


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
