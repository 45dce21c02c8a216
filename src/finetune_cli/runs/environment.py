"""Everything outside the config that can change a number: recorded as environment.json, compared later.

Two runs with equal configs, photos and environments have equal weights; `differences` says why they may not.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from finetune_cli import files
from finetune_cli.config.schema import Config
from finetune_cli.errors import RunError
from finetune_cli.fields import Fields
from finetune_cli.parallel import cores
from finetune_cli.runs import formats

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
    "pillow-heif",
    "opencv-python-headless",
    "h5py",
)
# What NumPy, TensorFlow, oneDNN, OpenBLAS and CUDA read, and what changes their arithmetic.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "TF_CUDNN_DETERMINISTIC",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "XLA_FLAGS",
)
_CPU_FACTS = Path("/proc/cpuinfo")
_DRIVER_FACTS = Path("/proc/driver/nvidia/version")


class Difference(NamedTuple):
    """A fact that has changed; values are short texts, empty where there was none."""

    what: str
    before: str
    now: str


@dataclass(frozen=True, slots=True)
class Environment:
    """The content of environment.json.

    facts: packages, Python, system, processor, GPU, seed, threads and commit, as plain JSON values. resumed_with: what
    differed where a killed run was resumed, as "name: value"; the file has the key only if something did.
    """

    facts: Mapping[str, Any]
    resumed_with: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The whole of the file."""
        resumed = {"resumed_with": list(self.resumed_with)} if self.resumed_with else {}
        return {"format": formats.FORMAT, **self.facts, **resumed}

    @classmethod
    def from_json(cls, document: object) -> "Environment":
        """The environment in `document`. Raises `FieldError` that names the key which is wrong."""
        fields = formats.upgrade(FILE, Fields(document))
        resumed = fields.names("resumed_with", 1) if "resumed_with" in fields.document else ()
        facts = {key: value for key, value in fields.document.items() if key not in ("format", "resumed_with")}
        return cls(facts, resumed)


def current(config: Config, device: str, precision: str, workers: int) -> Environment:
    """The environment of this process, for a training that uses `workers` threads."""
    return Environment(
        {
            "packages": packages(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": cores(),
            "device": device,
            "gpu": _gpu() if device == "gpu" else None,
            "feature_precision": precision,
            "seed": config.training.seed,
            "threads": workers,
            "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "git_commit": _git_commit(),
        }
    )


def write_environment(folder: Path, config: Config, device: str, precision: str, workers: int) -> None:
    """Write environment.json into `folder`."""
    files.write_json(folder / FILE, current(config, device, precision, workers).to_json())


def read_environment(path: Path) -> Environment:
    """What `write_environment` wrote. Raises `RunError` when it is damaged."""
    try:
        return Environment.from_json(json.loads(files.read_own(path)))
    except OSError as exc:
        raise RunError(f"{path} cannot be read: {exc.strerror}", _REMEDY) from exc
    except (ValueError, RecursionError) as exc:
        raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between the facts of two environments, or between two configs, in the order of their keys."""
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


def packages() -> dict[str, str]:
    """Name -> version of what is installed of this package's dependencies, of theirs, and of NVIDIA's libraries.

    Those for another system do not count, even if they are found: Ray brings some of its own.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    nvidia = [found.name for found in metadata.distributions() if (found.name or "").startswith("nvidia-")]
    versions: dict[str, str] = {}
    wanted = [*_PACKAGES, *nvidia]
    while wanted:
        name = re.sub("[-_.]+", "-", wanted.pop()).lower()
        if name in versions:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError, InvalidRequirement):
            found = metadata.distribution(name)
            versions[name] = found.version
            requirements = map(Requirement, found.requires or ())
            wanted += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    first = [name for name in _PACKAGES if name in versions]
    return {name: versions[name] for name in dict.fromkeys((*first, *sorted(versions)))}


def _cpu() -> dict[str, Any]:
    """Its name, and which of its instructions matter; only Linux lists the latter in a file."""
    facts: dict[str, Any] = {"machine": platform.machine(), "model": platform.processor(), "flags": []}
    with contextlib.suppress(OSError):
        for line in _CPU_FACTS.read_text("utf-8", "replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                facts["model"] = value
            elif key == "Features":  # of an ARM processor
                facts["flags"] = sorted(value.split())
                break
            elif key == "flags":
                wanted = ("amx", "avx", "fma", "sse4")
                facts["flags"] = sorted(flag for flag in value.split() if flag.startswith(wanted))
                break
    return facts


def _gpu() -> dict[str, Any]:
    """The GPUs that TensorFlow sees, and their driver. TensorFlow is loaded already where there is a GPU."""
    import tensorflow as tf

    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    devices = [(device.get("device_name", "unknown"), device.get("compute_capability", ())) for device in details]
    build, driver = tf.sysconfig.get_build_info(), None
    with contextlib.suppress(OSError):
        match = re.search(r"\d+\.\d[\d.]*", _DRIVER_FACTS.read_text("utf-8", "replace"))
        driver = match and match[0]
    return {
        "devices": [" ".join((name, ".".join(map(str, capability)))).strip() for name, capability in devices],
        "driver": driver,
        "cuda": build.get("cuda_version"),
        "cudnn": build.get("cudnn_version"),
    }


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
