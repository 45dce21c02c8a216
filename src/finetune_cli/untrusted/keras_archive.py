"""Opens a `.keras` file that may come from a stranger.

Keras's own safe mode refuses code in a file; it does not stop a file from asking for a petabyte of weights. So the
archive and the description of the model are checked first, the weights are counted without being allocated, and only
then is the model built. Needs keras >= 3.15.1 (see `pyproject.toml`).
"""

import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import files, signals
from finetune_cli.errors import WeightsError
from finetune_cli.keras_setup import import_keras
from finetune_cli.text import message_lines

_MEMBERS = {"config.json", "metadata.json", "model.weights.h5"}
_MAX_CONFIG_BYTES = 64 << 20
_MAX_EXPANSION = 100  # Keras stores without compression; ordinary weights shrink by a few per cent
# What a description may take objects from. Everything else of Keras (`keras.utils`, `keras.saving`, ...) is
# functions that read, write or download.
_MODULES = (
    "keras.activations",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.models",
    "keras.regularizers",
    "keras.src.activations",
    "keras.src.applications",
    "keras.src.initializers",
    "keras.src.layers",
    "keras.src.models",
    "keras.src.ops",
)
# Stock classes that run code, wrap other frameworks, or read files.
_REFUSED = {
    "FlaxLayer",
    "IntegerLookup",
    "JaxLayer",
    "Lambda",
    "StringLookup",
    "TFSMLayer",
    "TextVectorization",
    "TorchModuleWrapper",
    "__lambda__",
}
_REMEDY = "only a model of stock Keras layers can be used, saved with Keras 3 as one .keras file"


@signals.deferred()
def load_keras_file(path: Path) -> Any:
    """The `keras.Model` in the file `path`, with its weights; nothing in the file is run.

    Raises `WeightsError`, with the reason, for anything but a regular, complete and harmless `.keras` file whose
    weights are all finite.
    """
    description, stored = _read_description(path)
    for found in _objects(description):
        _refuse_foreign(found, path)
    keras = import_keras()
    wanted = _count_weights(keras, description, path)
    if wanted > stored:
        # A file holds every number of its model in at least one byte.
        raise WeightsError(f"{path} describes a model of {wanted:,} weights but holds at most {stored:,}", _REMEDY)
    try:
        model = keras.models.load_model(path, safe_mode=True, compile=False)
    except Exception as exc:
        raise _unreadable(path, exc) from exc
    for weight in model.weights:
        values = keras.ops.convert_to_numpy(weight)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise WeightsError(
                f"{path}: the weights {weight.path} are not finite (NaN or infinity)", "train the model again"
            )
    return model


def _read_description(path: Path) -> tuple[Any, int]:
    """The parsed config.json, and the size of the weights in bytes."""
    if path.suffix != ".keras":
        raise WeightsError(f"{path} is not a .keras file", _REMEDY)
    try:
        with files.open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) != len(_MEMBERS) or {member.filename for member in members} != _MEMBERS:
                raise WeightsError(f"{path} does not hold exactly {', '.join(sorted(_MEMBERS))}", _REMEDY)
            for member in members:
                if member.file_size > _MAX_EXPANSION * member.compress_size + 4096:
                    raise WeightsError(f"{path}: {member.filename} unpacks to {member.file_size:,} bytes", _REMEDY)
            if archive.getinfo("config.json").file_size > _MAX_CONFIG_BYTES:
                raise WeightsError(f"{path}: config.json is larger than any model's", _REMEDY)
            return json.loads(archive.read("config.json")), archive.getinfo("model.weights.h5").file_size
    except FileNotFoundError as exc:
        raise WeightsError(f"no file {path}", "check model.backbone") from exc
    except (OSError, RecursionError, RuntimeError, NotImplementedError, ValueError, zipfile.BadZipFile) as exc:
        raise _unreadable(path, exc) from exc


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All serialized objects of a description, at any depth (a stack, so that depth cannot exhaust Python's own)."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if "class_name" in item:
                yield item
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _refuse_foreign(found: dict[str, Any], path: Path) -> None:
    name, module, registered = (found.get(key) for key in ("class_name", "module", "registered_name"))
    if name in _REFUSED:
        raise WeightsError(f"{path} contains a {name}, which may run code or read files; it is refused", _REMEDY)
    allowed = module in {None, "builtins", "keras"} or any(
        module == prefix or str(module).startswith(prefix + ".") for prefix in _MODULES
    )
    if not allowed or (isinstance(registered, str) and ">" in registered):
        raise WeightsError(f"{path} needs {registered or name} from {module}, which is not a stock layer", _REMEDY)


def _count_weights(keras: Any, description: Any, path: Path) -> int:
    """The number of weights of the described model, counted without allocating any of them.

    In a `StatelessScope` Keras defers the creation of variables until somebody leaves such a scope in the same
    thread. In a thread of its own nobody does, and the deferred variables go with it.
    """
    outcome: list[int | Exception] = []

    def count() -> None:
        try:
            with keras.StatelessScope(initialize_variables=False):
                model = keras.saving.deserialize_keras_object(description, safe_mode=True)
            outcome.append(sum(int(np.prod(weight.shape, dtype=object)) for weight in model.weights))
        except Exception as exc:  # noqa: BLE001 - Keras can raise any exception; it is translated below
            outcome.append(exc)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise _unreadable(path, outcome[0]) from outcome[0]
    return outcome[0]


def _unreadable(path: Path, exc: Exception) -> WeightsError:
    return WeightsError(f"{path} cannot be read as a .keras model: {message_lines(exc)[0][:300]}", _REMEDY)
