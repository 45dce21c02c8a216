"""Checkpoints, from which a killed training resumes: each is whole or absent, and is used only if every bit is intact.

    checkpoints/epoch-0007/
        arrays.npz    weights, optimizer and random states, one member per array, without pickles
        state.json    epoch, whether it is the best, the arrays' names, and the state of the training
        SHA256SUMS    of these two, written last (`sha256sum -c SHA256SUMS` checks it as well)

A checkpoint is built under a temporary name, made durable, renamed, and only then are older ones removed; the last two
and the best are kept. What the state means (classes, hashes of config and data) is for the caller to compare.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.errors import CheckpointError, RunError, StorageError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.progress import Observer
from finetune_cli.runs import formats
from finetune_cli.runs.formats import NewerFormat

ARRAYS = "arrays.npz"
STATE = "state.json"
SUMS = "SHA256SUMS"
_NAME = re.compile(r"epoch-(\d{4,})")
_KEPT = 2
_REMEDY = "remove it to resume from the one before, or train a new run"
# What NumPy, zipfile and json raise for files with the right hashes that this module did not write.
_NOT_OURS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `warnings` says which newer ones were damaged and passed over."""

    epoch: int
    arrays: Mapping[str, NDArray[Any]]
    state: Mapping[str, Any]
    best: bool
    path: Path
    warnings: tuple[str, ...] = ()


def save(folder: Path, epoch: int, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any], best: bool) -> Path:
    """Write the checkpoint of `epoch` (completed epochs, from 1) into `folder` and return its path.

    `arrays`: numeric or text arrays of any shape; `state`: JSON values (infinity and NaN are kept). An existing
    checkpoint of that epoch is replaced. Afterwards the last two and the best remain. The caller holds the
    run's lock, so that one process writes at a time. Raises `StorageError`; all older checkpoints are untouched then.
    """
    contents = {ARRAYS: _pack(arrays), STATE: _describe(epoch, list(arrays), state, best)}
    contents[SUMS] = _sums(contents)
    path = folder / f"epoch-{epoch:04d}"
    # `folder` is inside a run: neither it nor what is in it may be a link.
    run = folder.parent
    files.remove_leftovers(folder, run)
    if os.path.lexists(path):
        files.remove_folder(path, run)
    with files.atomic_folder(path, sum(map(len, contents.values())), run) as temporary:
        for name, data in contents.items():
            (temporary / name).write_bytes(data)
            files.fsync_file(temporary / name)
    with contextlib.suppress(StorageError):  # the new one is safe; what cannot be removed only takes space
        _remove_old(folder, path, best)
    return path


def keep_only(path: Path) -> None:
    """Remove the checkpoints beside `path`, which is that of the last epoch: the training is finished."""
    for other in _newest_first(path.parent):
        if other != path:
            with contextlib.suppress(StorageError):
                files.remove_folder(other, path.parent.parent)


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises `CheckpointError` unless every file is as it was written."""
    try:
        contents = {}
        for name in (ARRAYS, STATE, SUMS):
            contents[name] = files.read_own(path / name, path.parent.parent)
        sums = contents.pop(SUMS)
    except OSError as exc:
        raise CheckpointError(f"{path} is damaged: {name} cannot be read: {exc.strerror}", _REMEDY) from exc
    # The sums are compared as a whole with those that would be written, so that a change in them shows, too.
    if sums != _sums(contents):
        wrong = [line.split()[1] for line in _sums(contents).decode().splitlines() if line.encode() not in sums]
        raise CheckpointError(f"{path} is damaged: {SUMS} does not match {' and '.join(wrong) or 'its files'}", _REMEDY)
    return _unpack(path, contents)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, or `None` when there is none at all.

    Raises `CheckpointError` when there are some and none is whole, so that no training silently starts over.
    """
    damaged = []
    for path in _newest_first(folder):
        try:
            found = load(path)
        except CheckpointError as exc:
            damaged.append(exc.problem)
            continue
        warnings = tuple(f"{problem}; resuming from {path.name}" for problem in damaged)
        return Checkpoint(found.epoch, found.arrays, found.state, found.best, found.path, warnings)
    if damaged:
        raise CheckpointError(
            "no checkpoint is whole:\n" + "\n".join(f"  {problem}" for problem in damaged),
            f"remove {folder} to train this run from its first epoch",
        )
    return None


def latest_of(folder: Path, training_id: str, observer: Observer) -> Checkpoint | None:
    """`load_latest`, and warn of what is damaged. `training_id`: see `runs/start.py`; it is in the state.

    Raises `RunError` when the checkpoint belongs to another training, and what `load_latest` raises.
    """
    last = load_latest(folder)
    if last is None:
        return None
    for warning in last.warnings:
        observer.warn(warning)
    try:
        owner = Fields(last.state).sha256("training_id")
    except FieldError as exc:
        raise CheckpointError(f"{last.path} is damaged: {exc}", f"remove {last.path}") from exc
    if owner != training_id:
        raise RunError(f"{last.path} belongs to another training", f"remove {last.path}")
    return last


def _pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays in NumPy's `.npz` form, under their positions: their names may hold what file names cannot."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.kind not in "biufcUS":
            raise TypeError(f"{name} has the type {np.asarray(array).dtype}, which NumPy cannot store without pickles")
    buffer = io.BytesIO()
    np.savez(buffer, **{str(i): np.asarray(array) for i, array in enumerate(arrays.values())})  # type: ignore[arg-type]
    return buffer.getvalue()


def _describe(epoch: int, names: list[str], state: Mapping[str, Any], best: bool) -> bytes:
    document = {"format": formats.FORMAT, "epoch": epoch, "best": best, "arrays": names, "state": dict(state)}
    return (json.dumps(document, indent=2) + "\n").encode()


def _sums(contents: Mapping[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in (ARRAYS, STATE)).encode()


def _unpack(path: Path, contents: Mapping[str, bytes]) -> Checkpoint:
    try:
        fields = formats.upgrade(STATE, Fields(json.loads(contents[STATE])))
        epoch = fields.integer("epoch")
        if f"epoch-{epoch:04d}" != path.name:
            raise ValueError(f"it is the checkpoint of epoch {epoch}")
        arrays = _read_arrays(contents[ARRAYS], fields.names("arrays", 0))
        return Checkpoint(epoch, arrays, fields.object("state").document, fields.flag("best"), path)
    except NewerFormat as exc:
        raise CheckpointError(
            f"{path} has format {exc.found}, this version reads {exc.known}",
            "update finetune-cli, or train a new run",
        ) from exc
    except _NOT_OURS as exc:
        raise CheckpointError(f"{path} is damaged: {exc}", _REMEDY) from exc


def _read_arrays(data: bytes, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
            raise ValueError("its arrays are compressed")  # which ours never are; they could fill the memory
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[str(i)] for i, name in enumerate(names)}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise TypeError("it holds something else than arrays")  # which NumPy gives as bytes
    return arrays


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("epoch-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_epoch, reverse=True)


def _epoch(path: Path) -> int:
    return int(path.name.removeprefix("epoch-"))


def _remove_old(folder: Path, new: Path, new_is_best: bool) -> None:
    """Keep `new`, the one before it, and the newest that says that it is the best."""
    found = _newest_first(folder)
    # Epochs after `new` were abandoned: the training was resumed from an earlier checkpoint.
    current = [path for path in found if _epoch(path) <= _epoch(new)]
    best = new if new_is_best else next(filter(_is_best, current), new)
    for path in found:
        if path not in (*current[:_KEPT], best):
            files.remove_folder(path, folder.parent)


def _is_best(path: Path) -> bool:
    try:
        return json.loads(files.read_own(path / STATE, path.parent.parent))["best"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged: the same as lost
