"""The photos of a run, found again: where they were when it was trained or, after a move, by their content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files, places
from finetune_cli.errors import BadImage, ChangedPhoto, DataError, RunError, UsageError
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import dataset, scan
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.places import Place
from finetune_cli.progress import Advance
from finetune_cli.runs.run import Run

_SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "folds": "training"}


@dataclass(frozen=True)
class LabelledPhotos:
    """Photos that a run is evaluated on. part: a split of the run, folds, or data. source: the same in words.

    bad: those that cannot be used. moved: after a search by content, where every photo of the run is, by digest.
    """

    part: str
    source: str
    samples: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...] = ()
    notes: tuple[str, ...] = ()
    moved: Mapping[str, Place] = field(default_factory=dict)


def photos_of_run(
    run: Run, root: Place | None, workers: int, advance: Advance, part: str | None = None
) -> LabelledPhotos:
    """The photos of `run` in `part`, by default its test photos if it has some, else those that validated it.

    `part` is train, val, test or folds: the training photos that were cross-validated. They are looked for where they
    were when the run was made or, with `root`, by their content anywhere below it. For those of folds, whose answers
    are known, it does not matter whether they are there. Raises `DataError` when none is found, `RunError` when the run
    does not say where they were, `UsageError` when `root` is not a folder.
    """
    rows = run.split()
    if part is None:
        parts = {row.split for row in rows} | {"folds" for row in rows if row.fold}
        part = next((part for part in ("test", "folds") if part in parts), "val")
    source = f"{_SPLIT_NAMES[part]} photos of the run"
    if part == "folds":
        source += f", cross-validated in {len({row.fold for row in rows if row.fold})} folds"
    moved = None if root is None else _by_digest(root, {row.digest for row in rows}, workers, advance)
    rows = [row for row in rows if (row.fold if part == "folds" else row.split == part)]
    folder = run.data_roots().get("train" if part == "folds" else part) if root is None else root
    if folder is None:
        raise RunError(f"{run.folder}/run.json does not say where the {source} are", "add --data FOLDER")
    label = {name: i for i, name in enumerate(run.classes)}
    samples, bad = [], []
    for row in rows:
        if row.label not in label:
            raise RunError(
                f"{run.folder}/split.csv names {row.label!r}, which is not a class of the run",
                "restore the run from a copy",
            )
        recorded = places.join(folder, row.path)
        path = recorded if moved is None else moved.get(row.digest)
        if part == "folds":
            samples.append(Sample(path or recorded, row.path, label[row.label], row.digest))
        elif path is None or (isinstance(path, Path) and not path.is_file()):  # an address is tried when it is read
            bad.append(BadPhoto(recorded, row.path, f"not found under {folder}"))
        else:
            samples.append(Sample(path, row.path, label[row.label], row.digest))
    if not samples:
        raise DataError(
            f"none of the {len(rows)} {source} is under {folder}",
            "say where they are with --data FOLDER (they are recognised by content); "
            "evaluate can judge other labelled photos, too",
        )
    return LabelledPhotos(part, source, tuple(samples), tuple(bad), moved=moved or {})


def _by_digest(root: Place, wanted: set[str], workers: int, advance: Advance) -> dict[str, Place]:
    """Where the files with the `wanted` SHA-256 are below `root`."""
    if not root.is_dir():
        raise UsageError(f"--data {root} is not a folder", "name the folder that the photos are in now")

    def digest(path: str) -> tuple[str | None, Place]:
        where = places.place(path)
        try:
            if isinstance(where, Path):
                return files.sha256(where), where
            return hashlib.sha256(places.read(where)).hexdigest(), where
        except OSError:
            return None, where

    found: dict[str, Place] = {}
    for content, path in ordered_map(digest, map(str, dataset.iter_photos([root])), places.threads(workers, [root])):
        advance(1)
        if content in wanted:
            found.setdefault(content, path)
    return found


def pixels(sample: Sample, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pixels ``uint8 (size, size, 3)`` of `sample`.

    Raises `BadImage` when it cannot be read or decoded, or when its bytes are not those of its digest.
    """
    try:
        return scan.decode_sample(sample, settings)
    except ChangedPhoto as exc:
        raise BadImage(sample.path, "the file is not the one that was indexed: its content has changed") from exc
