"""`manifest.json` of an export: what it is, where it comes from, and the SHA-256 of every file. Written last.

Format versions: 1 is the first. For version 2: raise `FORMAT`, keep reading the old one in `read`.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_cli import files
from finetune_cli.errors import WeightsError
from finetune_cli.exports.card import EXPORT_IT
from finetune_cli.exports.forms import Form
from finetune_cli.exports.registry import FORMS
from finetune_cli.runs.run import Run

FORMAT = 1
FILE = "manifest.json"


def write(folder: Path, form: Form, run: Run) -> None:
    """Describe everything that is in `folder` now."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    packages = ("finetune-cli", "numpy", *FORMS[form.name].versions)
    files.write_json(
        folder / FILE,
        {
            "format": FORMAT,
            "form": form.name,
            "options": form.options,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": {"name": run.name, "model_sha256": run.manifest["files"]["model.keras"]},
            "versions": {name: _version(name) for name in packages},
            "files": {path.relative_to(folder).as_posix(): files.sha256(path) for path in listed},
        },
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, its files unchecked. Raises `WeightsError` when it is missing or damaged."""
    path = folder / FILE
    try:
        manifest = json.loads(path.read_text("utf-8"))
        _check(manifest)
    except FileNotFoundError as exc:
        raise WeightsError(f"{folder} was not made by finetune export: it has no {FILE}", EXPORT_IT) from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise WeightsError(f"{path} is damaged: {exc}", "export again") from exc
    return dict(manifest)


def _check(manifest: Mapping[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
    if manifest["form"] not in FORMS:
        raise ValueError(f"unknown form {manifest['form']!r}")
    for name, digest in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or ":" in name or not isinstance(digest, str):
            raise ValueError(f"it lists {name!r}")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest in `folder` after the hash of every file was checked. Raises `WeightsError` that names the file."""
    manifest = read(folder)
    if extra := sorted(_present(folder) - set(manifest["files"]) - {FILE}):
        raise WeightsError(f"{folder / extra[0]} is not listed in {FILE}", "export again into a new folder")
    for name, expected in manifest["files"].items():
        try:
            actual = files.sha256(folder / name)
        except OSError as exc:
            raise WeightsError(f"{folder / name} cannot be read: {exc.strerror}", "export again") from exc
        if actual != expected:
            raise WeightsError(f"{folder / name} is damaged: its SHA-256 is not the one in {FILE}", "export again")
    return manifest


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export and nothing besides, so that it may be replaced by another one."""
    try:
        listed = set(read(folder)["files"]) | {FILE}
    except WeightsError:
        return False
    return _present(folder) <= listed


def _present(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
