"""`manifest.json` of an export: what it is, where it comes from, and the SHA-256 of every file. Written last.

Format versions: 1 is the first. For version 2: raise `FORMAT`, keep reading the old one in `ExportManifest.from_json`.
A key that is only added needs no new format: unknown keys are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.errors import WeightsError
from finetune_cli.exports.card import EXPORT_IT
from finetune_cli.exports.forms import Form
from finetune_cli.exports.registry import FORMS
from finetune_cli.fields import FieldError, Fields
from finetune_cli.runs.run import Run

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class ExportManifest:
    """The content of `manifest.json`.

    options: what the form was made with. run, model_sha256: the name of the exported run and the SHA-256 of its
    model. versions: of the packages that made it, None where one was not installed. files: name -> SHA-256.
    """

    form: str
    options: Mapping[str, str]
    created: str
    run: str
    model_sha256: str
    versions: Mapping[str, str | None]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The whole of the file."""
        return {
            "format": FORMAT,
            "form": self.form,
            "options": dict(self.options),
            "created": self.created,
            "run": {"name": self.run, "model_sha256": self.model_sha256},
            "versions": dict(self.versions),
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, document: object) -> "ExportManifest":
        """The manifest in `document`. Raises `FieldError` that names the key which is wrong."""
        fields = Fields(document)
        if (found := fields.integer("format")) != FORMAT:
            raise FieldError(f"its format is {found}, this version reads {FORMAT}")
        run = fields.object("run")
        return cls(
            form=fields.choice("form", FORMS),
            options=fields.mapping("options", Fields.text),
            created=fields.text("created"),
            run=run.text("name"),
            model_sha256=run.sha256("model_sha256"),
            versions=fields.mapping("versions", lambda versions, name: versions.optional(name, versions.text)),
            files=fields.listed_files("files"),
        )


def write(folder: Path, form: Form, run: Run) -> None:
    """Describe everything that is in `folder` now."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    packages = ("finetune-cli", "numpy", *FORMS[form.name].made_with(form.options).versions)
    manifest = ExportManifest(
        form=form.name,
        options=form.options,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run.name,
        model_sha256=run.manifest.files["model.keras"],
        versions={name: _version(name) for name in packages},
        files={path.relative_to(folder).as_posix(): files.sha256_own(path, folder) for path in listed},
    )
    files.write_json(folder / FILE, manifest.to_json())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read(folder: Path) -> ExportManifest:
    """The manifest in `folder`, its files unchecked. Raises `WeightsError` when it is missing or damaged."""
    path = folder / FILE
    try:
        return ExportManifest.from_json(json.loads(files.read_own(path)))
    except FileNotFoundError as exc:
        raise WeightsError(f"{folder} was not made by finetune export: it has no {FILE}", EXPORT_IT) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise WeightsError(f"{path} is damaged: {exc}", "export again") from exc


def verify(folder: Path) -> ExportManifest:
    """The manifest in `folder` after the hash of every file was checked. Raises `WeightsError` that names the file."""
    manifest = read(folder)
    if extra := sorted(_present(folder) - set(manifest.files) - {FILE}):
        raise WeightsError(f"{folder / extra[0]} is not listed in {FILE}", "export again into a new folder")
    for name, expected in manifest.files.items():
        try:
            actual = files.sha256_own(folder / name, folder)
        except OSError as exc:
            raise WeightsError(f"{folder / name} cannot be read: {exc.strerror}", "export again") from exc
        if actual != expected:
            raise WeightsError(f"{folder / name} is damaged: its SHA-256 is not the one in {FILE}", "export again")
    return manifest


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export and nothing besides, so that it may be replaced by another one."""
    try:
        listed = set(read(folder).files) | {FILE}
    except WeightsError:
        return False
    return _present(folder) <= listed


def _present(folder: Path) -> set[str]:
    """What is in `folder`, without the compiled copies that Python makes of `photo.py`."""
    inside = [path for path in folder.rglob("*") if path.parent != folder / "__pycache__"]
    return {path.relative_to(folder).as_posix() for path in inside if path.is_symlink() or not path.is_dir()}
