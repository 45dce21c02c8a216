"""An exported model as something that answers for photos: `finetune predict --model PATH`."""

from pathlib import Path

from finetune_cli.errors import WeightsError
from finetune_cli.exports import forms, manifest, place
from finetune_cli.exports.forms import Opened

# The class names of these are in a file beside them, so the manifest must vouch that they belong together.
_NOT_ALONE = {"savedmodel", "keras"}


def open_model(path: Path, workers: int) -> Opened:
    """The model at `path`: a folder that `finetune export` wrote, or the model's file in it.

    Its files are checked against the manifest beside them. Without one, an ONNX, LiteRT or OpenVINO file is taken if
    the class names are inside it. Raises `WeightsError` for anything else, `MissingExtra` when its runtime is missing.
    """
    if path.is_dir():
        return _open_folder(_version(path), workers)
    if not path.is_file():
        raise WeightsError(f"there is no model {path}", "name a folder that finetune export wrote, or the file in it")
    form = forms.form_class(_by_suffix(path))
    if (path.parent / manifest.FILE).exists() and path.name in manifest.read(path.parent)["files"]:
        return _open_folder(path.parent, workers)
    if form.name in _NOT_ALONE:
        raise WeightsError(
            f"{path} does not say what its classes are called: {manifest.FILE} and classes.json belong beside it",
            "copy the whole folder that finetune export wrote",
        )
    return form.open(path, workers)


def _open_folder(folder: Path, workers: int) -> Opened:
    form = forms.form_class(manifest.verify(folder)["form"])
    return form.open(folder / form.main if form.main else folder, workers)


def _version(folder: Path) -> Path:
    """The newest version in a folder of versions, as TensorFlow Serving chooses it; else the folder itself."""
    if (folder / manifest.FILE).exists():
        return folder
    versions = [path for path in folder.iterdir() if place.is_version(path)]
    if versions:
        return max(versions, key=lambda path: int(path.name))
    exports = sorted(path.parent.name for path in folder.glob(f"*/{manifest.FILE}"))
    exports += sorted({path.parent.parent.name for path in folder.glob(f"*/[0-9]*/{manifest.FILE}")})
    if exports:
        raise WeightsError(f"{folder} holds several models", f"name one of them: {', '.join(exports)}")
    return folder


def _by_suffix(path: Path) -> str:
    if path.name == "saved_model.pb":
        raise WeightsError(f"{path} is a part of a SavedModel", f"name its folder: {path.parent}")
    try:
        return forms.SUFFIXES[path.suffix.lower()]
    except KeyError as exc:
        known = ", ".join(forms.SUFFIXES)
        raise WeightsError(f"{path} is no exported model", f"known are {known}, and SavedModel folders") from exc
