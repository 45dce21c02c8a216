"""`checkpoints/start.json`: what a training started from, which a resumed one must find again."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.errors import RunError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.runs import formats
from finetune_cli.runs.formats import NewerFormat
from finetune_cli.runs.manifest import check_seal, seal

FILE = "checkpoints/start.json"
_FILE_1 = "checkpoints/begun.json"  # its name in format 1
_REMEDY = "restore it from a copy, or train a new run"


@dataclass(frozen=True, slots=True)
class Start:
    """The content of `start.json`; the newest config and the newest hash of an environment.json come last.

    configs: every config that the training was started or resumed with, as `Config.dump` gave them. backbone: its
    fingerprint. start_from: the SHA-256 of the model whose head the training started from. environments: SHA-256s of
    environment.json, one for every change of it. photos: a SHA-256 of the lines of split.csv and leaks.csv; None in
    runs from before it was recorded.
    """

    configs: tuple[Mapping[str, Any], ...]
    backbone: str
    start_from: str | None
    environments: tuple[str, ...]
    photos: str | None = None

    @property
    def training_id(self) -> str:
        """What only the checkpoints of this training share: a hash of its first config and of its backbone."""
        return str(seal({"config": self.configs[0], "backbone": self.backbone})["sha256"])

    def to_json(self) -> dict[str, Any]:
        """The whole of the file, sealed."""
        return seal(
            {
                "format": formats.FORMAT,
                "configs": [dict(config) for config in self.configs],
                "backbone": self.backbone,
                "start_from": self.start_from,
                "environments": list(self.environments),
                "photos": self.photos,
            }
        )

    @classmethod
    def from_json(cls, document: object) -> "Start":
        """The record in `document`. Raises `FieldError` that names the key which is wrong."""
        fields = Fields(document)
        formats.known(FILE, fields)
        check_seal(fields)
        fields = formats.upgrade(FILE, fields)
        start = cls(
            configs=tuple(config.document for config in fields.objects("configs")),
            backbone=fields.text("backbone"),
            start_from=fields.optional("start_from", fields.sha256),
            environments=fields.sha256s("environments"),
            photos=fields.optional("photos", fields.sha256) if "photos" in fields.document else None,
        )
        for key in ("configs", "environments"):
            if not getattr(start, key):
                raise FieldError(f"{key} is empty")
        return start


def write(folder: Path, start: Start) -> None:
    """Write `start` into the run `folder`. Raises `StorageError`."""
    files.write_json(folder / FILE, start.to_json(), folder)


def read(folder: Path) -> Start:
    """The record of the run `folder`. Raises `RunError` when it is missing, damaged or of a later version."""
    path = folder / FILE
    if not os.path.lexists(path) and os.path.lexists(folder / _FILE_1):
        path = folder / _FILE_1
    try:
        return Start.from_json(json.loads(files.read_own(path, folder)))
    except NewerFormat as exc:
        problem = f"{path} has format {exc.found}, this version reads {exc.known}"
        raise RunError(problem, "update finetune-cli") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc
