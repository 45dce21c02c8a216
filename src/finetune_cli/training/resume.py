"""An unfinished run: what its training started from, and whether a resumed training finds the same.

config.yaml              the config that it is resumed with
environment.json         the environment that it was started in, and what differed where it was resumed
checkpoints/start.json   all that must be found again; see `runs/start.py`
split.csv                the photos; written last, because it marks a run that can be resumed
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import yaml

from finetune_cli import files
from finetune_cli.config.load import load_config, restored
from finetune_cli.config.schema import Config
from finetune_cli.errors import ConfigError, RunError
from finetune_cli.progress import Observer
from finetune_cli.runs import environment, run, start
from finetune_cli.runs.environment import Difference, differences
from finetune_cli.runs.run import SplitRow
from finetune_cli.runs.start import Start
from finetune_cli.training import near
from finetune_cli.training.near import Leak
from finetune_cli.training.prepare import Prepared

_MAY_CHANGE = ("training.epochs", "training.early_stopping_patience", "data.", "runtime.")
_NEW_RUN = "put them back, or train a new run"


def record_start(temporary: Path, folder: Path, prepared: Prepared) -> None:
    """Write what a resumed training must find into `temporary`, which becomes `folder`. Raises `StorageError`."""
    config = prepared.config.dump(folder)
    if prepared.data.fixes is not None:
        files.write_bytes(temporary / run.FIXES, prepared.data.fixes)
        config["data"]["fixes"] = run.FIXES
    _write_config(temporary, config)
    environment.write_environment(temporary, *_environment_arguments(prepared))
    record = Start(
        configs=(config,),
        backbone=prepared.backbone.fingerprint,
        start_from=prepared.start_from,
        environments=(files.sha256_own(temporary / environment.FILE),),
        photos=_photos_digest(_split_rows(prepared), prepared.leaks),
    )
    start.write(temporary, record)
    if prepared.leaks:
        near.write_leaks(temporary, prepared.leaks)
    run.write_split(temporary / "split.csv", _split_rows(prepared))


def check_files(folder: Path) -> None:
    """Raise `RunError` unless `folder` holds an unfinished run whose files are as the training wrote them."""
    if os.path.lexists(folder / run.MANIFEST):
        raise RunError(
            f"{folder} is finished; there is nothing to resume", "to train on, set model.start_from to that folder"
        )
    if not os.path.lexists(folder / "split.csv"):
        raise RunError(f"{folder} cannot be resumed: it has no split.csv", "train a new run")
    record = start.read(folder)
    environment_file = folder / environment.FILE
    try:
        digest = files.sha256_own(environment_file)
    except OSError as exc:
        problem = f"{environment_file} cannot be read: {exc.strerror}"
        raise RunError(problem, "restore it from a copy, or train a new run") from exc
    if digest not in record.environments[-2:]:
        raise RunError(f"{environment_file} is damaged", "restore it from a copy, or train a new run")
    rows, leaks = run.read_split(folder / "split.csv"), near.read_leaks(folder)
    if record.photos is not None and record.photos != _photos_digest(rows, leaks):
        raise RunError(f"{folder}/split.csv or {near.LEAKS} was changed", "restore it from a copy, or train a new run")
    stored = load_config(folder / "config.yaml", own=True).dump(folder)
    # Two, as above: a kill may have come between the record of a change and the change itself.
    recorded = [_as_dumped_now(folder, values) for values in record.configs[-2:]]
    if stored not in recorded:
        raise _other_settings(folder, differences(recorded[-1], stored))


def check_inputs(folder: Path, prepared: Prepared, observer: Observer) -> None:
    """Compare photos, settings and environment with those of the start, and record the config that is used from now on.

    Raises `RunError` when the photos or the settings differ; warns when the environment does.
    """
    record = start.read(folder)
    if prepared.backbone.fingerprint != record.backbone:
        raise RunError(f"the backbone's weights are not those that {folder} was started with", _NEW_RUN)
    if prepared.start_from != record.start_from:
        raise RunError(f"the run model.start_from is not the one that {folder} was started from", _NEW_RUN)
    config = prepared.config.dump(folder)
    changed = differences(_as_dumped_now(folder, record.configs[-1]), config)
    refused = [change for change in changed if not change.what.startswith(_MAY_CHANGE) or change.what == "data.folds"]
    if refused:
        raise _other_settings(folder, refused)
    _refuse_other_photos(folder, prepared)
    if changed:
        record = replace(record, configs=(*record.configs, config))
        start.write(folder, record)
    _write_config(folder, config)
    _note_other_environment(folder, prepared, record, observer)


def _as_dumped_now(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config as `Config.dump` gives it now: an earlier version may not have had all keys."""
    try:
        return restored(values, folder).dump(folder)
    except ConfigError as exc:
        problem = f"the config recorded in {folder / start.FILE} cannot be used: {exc.problem}"
        raise RunError(problem, "train a new run") from exc


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "config.yaml", text)


def _environment_arguments(prepared: Prepared) -> tuple[Config, str, str, int]:
    return prepared.config, prepared.device, prepared.precision, prepared.settings.workers


def _note_other_environment(folder: Path, prepared: Prepared, record: Start, observer: Observer) -> None:
    """Say why the weights may not be those of an uninterrupted run, here and in environment.json."""
    before = environment.read_environment(folder / environment.FILE)
    now = environment.current(*_environment_arguments(prepared))
    changed = [change for change in differences(before.facts, now.facts) if change.what != "git_commit"]
    if not changed:
        return
    names = ", ".join(change.what for change in changed)
    observer.warn(
        f"the environment is not the one that {folder} was started in ({names}), so the weights may differ from those "
        "of an uninterrupted run"
    )
    lines = [*before.resumed_with, *(f"{change.what}: {change.now or 'none'}" for change in changed)]
    content = files.json_text(replace(before, resumed_with=tuple(dict.fromkeys(lines))).to_json())
    digest = hashlib.sha256(content.encode()).hexdigest()
    start.write(folder, replace(record, environments=(*record.environments, digest)))
    files.write_text(folder / environment.FILE, content)


def _other_settings(folder: Path, changes: Iterable[Difference]) -> RunError:
    return RunError(
        f"the settings are not those that {folder} was started with\n"
        + "\n".join(f"  {change.what} was {change.before or 'null'}, is {change.now or 'null'}" for change in changes),
        _NEW_RUN,
    )


def _split_rows(prepared: Prepared) -> list[SplitRow]:
    classes = prepared.data.classes
    return [
        SplitRow(split, classes[sample.label], sample.digest, sample.name, sample.group or "", sample.fold)
        for split, part in prepared.parts.items()
        for sample in part.samples
    ]


def _photos_digest(rows: Iterable[SplitRow], leaks: Iterable[Leak]) -> str:
    """A SHA-256 of the lines of split.csv and leaks.csv: a resumed training takes both as they are."""
    lines = [[astuple(row) for row in rows], [astuple(leak) for leak in leaks]]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _refuse_other_photos(folder: Path, prepared: Prepared) -> None:
    """Raise `RunError` when the photos are not those that the run was started with; name those that differ."""
    before, now = set(run.read_split(folder / "split.csv")), set(_split_rows(prepared))
    if before == now:
        return
    changes = [
        f"{what} {row.split}/{row.label}: {row.path}"
        for what, rows in (("gone or changed", before - now), ("new or changed", now - before))
        for row in sorted(rows, key=lambda row: (row.split, row.path))[:5]
    ]
    raise RunError(
        f"the photos are not those that {folder} was started with ({len(before - now)} gone, {len(now - before)} new)\n"
        + "\n".join(f"  {change}" for change in changes),
        "restore them, or train a new run (the features of the unchanged photos are in the cache)",
    )
