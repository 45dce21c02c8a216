"""Predictions for many photos as a folder of Parquet files, in a file system or a store, that can be continued.

    part-00000.parquet ...            the same number of photos each, in the order in which they are listed
    _finetune/answers.json            what the folder is an answer to: the model and the settings
    _finetune/part-00000.json ...     of which photos a partition is, written after it: without it, it is made again
    _finetune/complete.json           how many partitions and rows there are, written last

A partition is a pure function of the model, the settings and its photos, so a repeated command makes what is missing,
and no row is there twice. Programs that read folders of Parquet files leave out what begins with an underscore.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli import files, storage
from finetune_cli.errors import StorageError, UsageError
from finetune_cli.fields import Fields
from finetune_cli.inference import parquet
from finetune_cli.inference.predict import Limits, PredictionRow
from finetune_cli.photos import decode
from finetune_cli.places import Address, Place, read
from finetune_cli.progress import Advance, ignore_progress
from finetune_cli.runs.run import MANIFEST, Run
from finetune_cli.text import shown

PHOTOS = 10_000  # of a partition: about 1 MB of Parquet, and a minute of work for two cores
_FORMAT = 1
_OURS = "_finetune"
_ANSWERS, _COMPLETE = "answers.json", "complete.json"

# Photos in order -> their predictions in order.
Predict = Callable[[Iterable[Place]], Iterable[PredictionRow]]


@dataclass(frozen=True)
class Written:
    """What a folder holds: rows, those of them that are errors, and how many rows were there already."""

    rows: int
    failed: int
    kept: int


def question(run: Run, top_k: int, limits: Limits) -> dict[str, Any]:
    """What the predictions of `run` depend on besides the photos."""
    return {
        "format": _FORMAT,
        "run": files.sha256_own(run.folder / MANIFEST),  # which holds the SHA-256 of the model
        "decoder": decode.decoder(),
        "top_k": top_k,
        "min_confidence": limits.min_confidence,
        "unknown": limits.unknown,
        "photos_per_partition": PHOTOS,
    }


def begin(folder: Place, asked: Mapping[str, Any], force: bool = False) -> None:
    """Make `folder` ready for the answer to `asked`, see `question`; it may hold a part of it.

    force: a folder in the file system that answers something else is begun anew. Raises `UsageError` when it answers
    something else, or holds what is not ours; `StorageError` when it cannot be written.
    """
    if isinstance(folder, Path):
        files.make_folder(folder)
        files.check_writable(folder)
    found = _read(folder, _ANSWERS)
    if found is None:
        if _holds_partitions(folder):
            raise UsageError(f"{shown(folder)} holds Parquet files of another origin", "name another folder")
    elif force:
        _empty(folder)
    else:
        if different := [key for key in asked if found.document.get(key) != asked[key]]:
            raise UsageError(
                f"{shown(folder)} holds the predictions of another command: {', '.join(different)} differs",
                "name another folder, or begin this one anew with --force",
            )
        return
    _write_json(folder, _ANSWERS, asked)


def write(
    folder: Place,
    asked: Mapping[str, Any],
    photos: Iterable[Place],
    predict: Predict,
    advance: Advance = ignore_progress,
) -> Written:
    """Write the predictions for `photos` into `folder`, or those that it lacks; `begin` has been called.

    asked: see `question`. advance: counts photos. Raises `UsageError` when the photos are not those of before,
    `StorageError` when something cannot be written.
    """
    todo: deque[_Partition] = deque()
    kept = [0, 0]
    listed = 0

    def missing() -> Iterator[Place]:
        nonlocal listed
        for partition, block in _partitions(photos):
            listed += 1
            facts = _facts(folder, partition)
            if facts is None:
                todo.append(partition)
                yield from block
                continue
            kept[0] += facts[0]
            kept[1] += facts[1]
            advance(facts[0])

    rows = iter(predict(missing()))
    made = failed = 0
    while True:
        first = list(itertools.islice(rows, 1))  # which lists the photos, and so knows the partition
        if not first:
            break
        partition = todo.popleft()
        block = itertools.chain(first, itertools.islice(rows, partition.photos - 1))
        wrong = _write_partition(folder, partition, _counting(block, advance), asked["top_k"])
        made, failed = made + partition.photos, failed + wrong
    total = Written(kept[0] + made, kept[1] + failed, kept[0])
    if listed:
        _finish(folder, {"partitions": listed, "rows": total.rows, "failed": total.failed})
    return total


def _counting(rows: Iterable[PredictionRow], advance: Advance) -> Iterator[PredictionRow]:
    for row in rows:
        advance(1)
        yield row


@dataclass(frozen=True)
class _Partition:
    """The partition `number`: how many photos it has, and a SHA-256 of which."""

    number: int
    photos: int
    digest: str

    @property
    def name(self) -> str:
        """Without a suffix."""
        return f"part-{self.number:05}"


def _partitions(photos: Iterable[Place]) -> Iterator[tuple[_Partition, list[Place]]]:
    iterator = iter(photos)
    for number in itertools.count():
        block = list(itertools.islice(iterator, PHOTOS))
        if not block:
            return
        digest = hashlib.sha256("\0".join(map(_identity, block)).encode("utf-8", "surrogateescape")).hexdigest()
        yield _Partition(number, len(block), digest), block


def _identity(photo: Place) -> str:
    """The name of a photo and, in the file system, what changes with its content: its size and its time."""
    if isinstance(photo, Address):
        return str(photo)
    try:
        status = os.stat(photo)  # noqa: PTH116 - Path.stat is slower, and there may be millions
    except (OSError, ValueError):
        return f"{photo}\n"
    return f"{photo}\n{status.st_size} {status.st_mtime_ns}"


def _holds_partitions(folder: Place) -> bool:
    if isinstance(folder, Address):
        return any(entry.name.endswith(".parquet") for entry in storage.entries(folder.text))
    return any(folder.glob("*.parquet"))


def _empty(folder: Place) -> None:
    """Remove what `write` has written, the record first: what a kill leaves is then made anew, too."""
    if isinstance(folder, Address):
        raise UsageError(
            f"{shown(folder)} cannot be begun anew: objects in a store are never removed",
            "name another folder, or empty this one with the tools of the store",
        )
    for path in (*sorted((folder / _OURS).glob("part-*.json")), *sorted(folder.glob("part-*.parquet"))):
        path.unlink(missing_ok=True)
    for name in (_COMPLETE, _ANSWERS):
        (folder / _OURS / name).unlink(missing_ok=True)


def _facts(folder: Place, partition: _Partition) -> tuple[int, int] | None:
    """Rows and failed rows of a partition that is there; None if it must be made. Raises `UsageError`."""
    found = _read(folder, f"{partition.name}.json")
    if found is None:
        return None
    with _parsing(folder, f"{partition.name}.json"):
        digest, rows, failed, length = (
            found.sha256("photos"),
            found.integer("rows"),
            found.integer("failed"),
            found.integer("bytes"),
        )
    if digest != partition.digest:
        raise UsageError(
            f"{shown(folder)} holds predictions for other photos: those of {partition.name} were changed, or others "
            "were added or removed before them",
            "name another folder, or begin this one anew with --force",
        )
    where = folder / f"{partition.name}.parquet"
    try:
        size = storage.status(where.text).size if isinstance(where, Address) else where.stat().st_size
    except OSError:
        return None
    return (rows, failed) if size == length else None


def _write_partition(folder: Place, partition: _Partition, rows: Iterable[PredictionRow], top_k: int) -> int:
    """Write a partition and then its record; returns how many rows are errors."""
    failed = count = 0
    buffer = io.BytesIO()
    with parquet.writer(buffer, top_k) as add:
        for row in rows:
            add(row)
            count += 1
            failed += row.error is not None
    assert count == partition.photos
    data = buffer.getvalue()
    _write_bytes(folder / f"{partition.name}.parquet", data)
    facts = {"photos": partition.digest, "rows": count, "failed": failed, "bytes": len(data)}
    _write_json(folder, f"{partition.name}.json", facts)
    return failed


def _finish(folder: Place, facts: Mapping[str, int]) -> None:
    """Say that all is there. Raises `UsageError` when there is more: photos were removed since."""
    surplus = f"part-{facts['partitions']:05}"
    if _read(folder, f"{surplus}.json") is not None:
        raise UsageError(
            f"{shown(folder)} holds predictions for photos that are not there any more, from {surplus} on",
            "name another folder, or begin this one anew with --force",
        )
    _write_json(folder, _COMPLETE, facts)


def _read(folder: Place, name: str) -> Fields | None:
    """A record of ours; None if it is not there. Raises `StorageError` when it is damaged."""
    with _parsing(folder, name):
        try:
            return Fields(json.loads(read(folder / _OURS / name)))
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _parsing(folder: Place, name: str) -> Iterator[None]:
    """Translate what goes wrong when a record of ours is read."""
    try:
        yield
    except OSError as exc:
        problem = f"{shown(folder / _OURS / name)} cannot be read: {exc.strerror}"
        raise StorageError(problem, "name another folder") from exc
    except (ValueError, RecursionError) as exc:
        problem = f"{shown(folder / _OURS / name)} is damaged: {exc}"
        raise StorageError(problem, "name another folder, or remove this one") from exc


def _write_json(folder: Place, name: str, value: Mapping[str, Any]) -> None:
    if isinstance(folder, Path):
        files.make_folder(folder / _OURS)
    _write_bytes(folder / _OURS / name, files.json_text(dict(value)).encode())


def _write_bytes(where: Place, data: bytes) -> None:
    if isinstance(where, Address):
        storage.write(where.text, data)
    else:
        files.write_bytes(where, data)
