"""How an unfinished run began: what a training that goes on must find as it was, and what may have changed since.

config.yaml        the config that it goes on with
environment.json   where it was begun, and what differed where it went on
checkpoints/begun.json   every config that it was begun or gone on with, the backbone's fingerprint, the SHA-256 of the
                   model that it started from and of every environment.json, and one of its own content
split.csv          the photos; written last, because it marks a run that can be resumed
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune_cli import files
from finetune_cli.config.load import load_config
from finetune_cli.config.schema import Config
from finetune_cli.errors import RunError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.progress import Observer
from finetune_cli.runs import environment, run
from finetune_cli.runs.environment import Difference, differences
from finetune_cli.runs.manifest import check_seal, seal
from finetune_cli.runs.run import SplitRow
from finetune_cli.training.prepare import Prepared

_RECORD = Path("checkpoints", "begun.json")
_MAY_CHANGE = ("training.epochs", "training.early_stopping_patience", "data.", "runtime.")
_NEW_RUN = "put them back, or train a new run"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The content of `begun.json`; the newest config and the newest hash of an environment.json are the last ones.

    configs: as `Config.dump` gives them. backbone: its fingerprint. start_from: the SHA-256 of the model that the head
    was begun with. environments: SHA-256s.
    """

    configs: tuple[Mapping[str, Any], ...]
    backbone: str
    start_from: str | None
    environments: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The whole of the file, sealed."""
        return seal(
            {
                "configs": [dict(config) for config in self.configs],
                "backbone": self.backbone,
                "start_from": self.start_from,
                "environments": list(self.environments),
            }
        )

    @classmethod
    def from_json(cls, document: object) -> "Beginning":
        """The record in `document`. Raises `FieldError` that names the key which is wrong."""
        fields = Fields(document)
        check_seal(fields)
        beginning = cls(
            configs=tuple(config.document for config in fields.objects("configs")),
            backbone=fields.text("backbone"),
            start_from=fields.optional("start_from", fields.sha256),
            environments=fields.sha256s("environments"),
        )
        for key in ("configs", "environments"):
            if not getattr(beginning, key):
                raise FieldError(f"{key} is empty")
        return beginning


def begin(folder: Path, prepared: Prepared) -> None:
    """Write what a resumed training must find. Raises `StorageError`."""
    _write_config(folder, prepared.config)
    environment.write_environment(folder, *_surroundings(prepared))
    record = Beginning(
        configs=(prepared.config.dump(folder),),
        backbone=prepared.backbone.fingerprint,
        start_from=prepared.start_from,
        environments=(files.sha256_own(folder / environment.FILE),),
    )
    _write_record(folder, record)
    run.write_split(folder / "split.csv", _split_rows(prepared))


def identity(folder: Path) -> str:
    """What only the checkpoints of this training share: a hash of its first config and of its backbone."""
    record = _read(folder)
    return str(seal({"config": record.configs[0], "backbone": record.backbone})["sha256"])


def check(folder: Path) -> None:
    """Raise `RunError` unless `folder` holds an unfinished run whose beginning is as it was written."""
    if os.path.lexists(folder / run.MANIFEST):
        raise RunError(
            f"{folder} is finished; there is nothing to resume", "to train on, set model.start_from to that folder"
        )
    if not os.path.lexists(folder / "split.csv"):
        raise RunError(f"{folder} was not begun: it has no split.csv", "train a new run")
    record = _read(folder)
    environment_file = folder / environment.FILE
    try:
        digest = files.sha256_own(environment_file)
    except OSError as exc:
        problem = f"{environment_file} cannot be read: {exc.strerror}"
        raise RunError(problem, "restore it from a copy, or train a new run") from exc
    if digest not in record.environments[-2:]:
        raise RunError(f"{folder / environment.FILE} is damaged", "restore it from a copy, or train a new run")
    stored = load_config(folder / "config.yaml", own=True).dump(folder)
    # Two, as above: a kill may have come between the record of a change and the change itself.
    if stored not in record.configs[-2:]:
        raise _other_settings(folder, differences(record.configs[-1], stored))


def go_on(folder: Path, prepared: Prepared, observer: Observer) -> None:
    """Compare photos, settings and surroundings with those of the beginning, and note the config that is gone on with.

    Raises `RunError` when the photos or the settings differ; warns when the surroundings do.
    """
    _refuse_other_photos(folder, prepared)
    record = _read(folder)
    if prepared.backbone.fingerprint != record.backbone:
        raise RunError(f"the backbone's weights are not those that {folder} was begun with", _NEW_RUN)
    if prepared.start_from != record.start_from:
        raise RunError(f"the run model.start_from is not the one that {folder} was begun from", _NEW_RUN)
    config = prepared.config.dump(folder)
    changed = differences(record.configs[-1], config)
    if refused := [each for each in changed if not each.what.startswith(_MAY_CHANGE)]:
        raise _other_settings(folder, refused)
    if changed:
        record = replace(record, configs=(*record.configs, config))
        _write_record(folder, record)
    _write_config(folder, prepared.config)
    _note_other_surroundings(folder, prepared, record, observer)


def _write_record(folder: Path, record: Beginning) -> None:
    files.write_json(folder / _RECORD, record.to_json(), folder)


def _read(folder: Path) -> Beginning:
    path = folder / _RECORD
    try:
        return Beginning.from_json(json.loads(files.read_own(path, folder)))
    except (OSError, ValueError, RecursionError) as exc:
        raise RunError(f"{path} is damaged: {exc}", "restore it from a copy, or train a new run") from exc


def _write_config(folder: Path, config: Config) -> None:
    text = yaml.safe_dump(config.dump(folder), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "config.yaml", text)


def _surroundings(prepared: Prepared) -> tuple[Config, str, str, int]:
    return prepared.config, prepared.device, prepared.precision, prepared.workers


def _note_other_surroundings(folder: Path, prepared: Prepared, record: Beginning, observer: Observer) -> None:
    """Say why the end may not be that of an uninterrupted run, here and in environment.json."""
    before = environment.read_environment(folder / environment.FILE)
    elsewhere = before.pop(environment.ELSEWHERE, None)
    now = environment.environment(*_surroundings(prepared))
    changed = [each for each in differences(before, now) if each.what != "git_commit"]
    if not changed:
        return
    names = ", ".join(each.what for each in changed)
    observer.warn(
        f"the surroundings are not those that {folder} was begun in ({names}), so the weights may differ from those of "
        "an uninterrupted run"
    )
    told = [f"{each.what}: {each.now or 'none'}" for each in changed]
    told = list(dict.fromkeys([*map(str, elsewhere if isinstance(elsewhere, list) else ()), *told]))
    content = files.json_text({**before, environment.ELSEWHERE: told})
    digest = hashlib.sha256(content.encode()).hexdigest()
    _write_record(folder, replace(record, environments=(*record.environments, digest)))
    files.write_text(folder / environment.FILE, content)


def _other_settings(folder: Path, changes: Iterable[Difference]) -> RunError:
    return RunError(
        f"the settings are not those that {folder} was begun with\n"
        + "\n".join(f"  {each.what} was {each.before or 'null'}, is {each.now or 'null'}" for each in changes),
        _NEW_RUN,
    )


def _split_rows(prepared: Prepared) -> list[SplitRow]:
    return [
        SplitRow(split, prepared.data.classes[sample.label], sample.digest, sample.name, sample.group or "")
        for split, part in prepared.parts.items()
        for sample in part.samples
    ]


def _refuse_other_photos(folder: Path, prepared: Prepared) -> None:
    """Raise `RunError` when the photos are not those that the run was begun with, and say which differ."""
    before, now = set(run.read_split(folder / "split.csv")), set(_split_rows(prepared))
    if before == now:
        return
    changes = [
        f"{what} {row.split}/{row.label}: {row.path}"
        for what, rows in (("gone or changed", before - now), ("new or changed", now - before))
        for row in sorted(rows, key=lambda row: (row.split, row.path))[:5]
    ]
    raise RunError(
        f"the photos are not those that {folder} was begun with ({len(before - now)} gone, {len(now - before)} new)\n"
        + "\n".join(f"  {change}" for change in changes),
        "restore them, or train a new run (the features of the unchanged photos are in the cache)",
    )
