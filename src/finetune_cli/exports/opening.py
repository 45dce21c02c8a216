"""Opens an exported model as a `Predictor`: `finetune predict --model PATH`."""

import os
from pathlib import Path

from finetune_cli.errors import WeightsError
from finetune_cli.exports import manifest, place, registry
from finetune_cli.exports.forms import Opened
from finetune_cli.exports.registry import FORMS, Entry


def open_model(path: Path, workers: int) -> Opened:
    """The model at `path`: a folder that `finetune export` wrote, or the model's file in it.

    Its files are checked against the manifest beside them. Without one, an ONNX, LiteRT or OpenVINO file is taken if
    the class names are inside it. Raises `WeightsError` for anything else, `MissingExtra` when its runtime is missing.
    """
    if path.is_dir():
        return _open_folder(_version(path), workers)
    if not path.is_file():
        raise WeightsError(f"there is no model {path}", "name a folder that finetune export wrote, or the file in it")
    entry = _by_suffix(path)
    if os.path.lexists(path.parent / manifest.FILE) and path.name in manifest.read(path.parent).files:
        return _open_folder(path.parent, workers)
    if not entry.knows_classes:  # they are in a file beside it, and the manifest must say that the two belong together
        raise WeightsError(
            f"{path} does not contain its class names: {manifest.FILE} and classes.json must be beside it",
            "copy the whole folder that finetune export wrote",
        )
    return entry.load().open(path, workers)


def _open_folder(folder: Path, workers: int) -> Opened:
    entry = FORMS[manifest.verify(folder).form]
    return entry.load().open(folder / entry.main if entry.main else folder, workers)


def _version(folder: Path) -> Path:
    """The newest version in a folder of versions, as TensorFlow Serving chooses it; else the folder itself."""
    if os.path.lexists(folder / manifest.FILE):
        return folder
    versions = [path for path in folder.iterdir() if place.is_version(path)]
    if versions:
        newest = max(versions, key=lambda path: int(path.name))
        place.refuse_links(folder, newest)
        return newest
    exports = sorted(path.parent.name for path in folder.glob(f"*/{manifest.FILE}"))
    exports += sorted({path.parent.parent.name for path in folder.glob(f"*/[0-9]*/{manifest.FILE}")})
    if exports:
        raise WeightsError(f"{folder} holds several models", f"name one of them: {', '.join(exports)}")
    return folder


def _by_suffix(path: Path) -> Entry:
    if path.name == "saved_model.pb":
        raise WeightsError(f"{path} is a part of a SavedModel", f"name its folder: {path.parent}")
    entry = registry.by_suffix(path)
    if entry is None:
        known = ", ".join(registry.suffixes())
        raise WeightsError(f"{path} is not an exported model", f"known are {known}, and SavedModel folders")
    return entry
