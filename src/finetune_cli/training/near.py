"""The near-duplicates of a data set: found, kept on one side of the split, and named where a split divides them."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.cache.features import FeatureStore
from finetune_cli.duplicates.find import VERSION, Found, find
from finetune_cli.errors import RunError
from finetune_cli.photos import dataset
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.runs.run import Run, SplitRow
from finetune_cli.tables import parse_csv, write_csv
from finetune_cli.text import counted, shown
from finetune_cli.training.extract import FeatureRequest, Features, scratch_array
from finetune_cli.training.settings import Settings

LEAKS = "leaks.csv"
_MOST_STORED = 1 << 24  # `Found.packed` has no larger numbers
_REMEDY = "restore it from a copy, or train again"
_HEADER = ("split", "path", "train_path", "score")


@dataclass(frozen=True, slots=True)
class Leak:
    """A photo of `split`, val or test, that shows the same picture as the training photo `train_path`.

    Both are named as in split.csv. `score`: how well they fit over each other, at most 1; 1 for copies.
    """

    split: str
    path: str
    train_path: str
    score: float


@dataclass(frozen=True, eq=False)
class Linked:
    """The photos of a data set, of copies the first one, and what `find` found among them, by number."""

    photos: tuple[Sample, ...]
    found: Found

    def together(self) -> list[set[str]]:
        """The digests of each group that stays on one side."""
        return [{self.photos[i].digest for i in group} for group in self.found.groups]

    def leaks(self, data: Dataset) -> tuple[Leak, ...]:
        """The val and test photos of `data` that show the same picture as a training photo, with the most alike one."""
        train: dict[str, str] = {}
        for sample in data.train:
            train.setdefault(sample.digest, sample.name)
        best = {digest: (1.0, name) for digest, name in train.items()}
        for link in sorted(self.found.links, key=lambda link: -link.score):
            a, b = self.photos[link.first].digest, self.photos[link.second].digest
            for own, other in ((a, b), (b, a)):
                if other in train:
                    best.setdefault(own, (link.score, train[other]))
        return tuple(
            Leak(split, sample.name, best[sample.digest][1], round(best[sample.digest][0], 4))
            for split in ("val", "test")
            for sample in data.splits.get(split, ())
            if sample.digest in best
        )


def may_split_otherwise(data: Dataset, near_duplicates: str) -> str | None:
    """That the split of `data` was made before near-duplicates are known; None if that makes no difference.

    near_duplicates: as the config has it.
    """
    if data.val_split is None or near_duplicates == "ignore":
        return None
    return "train may split the photos a little differently: it looks for near-duplicates and keeps them on one side"


def link(
    parts: Mapping[str, Features],
    request: Callable[[str], FeatureRequest],
    store: FeatureStore,
    settings: Settings,
    observer: Observer,
) -> Linked:
    """The near-duplicates among the photos of `parts`, by split, with thumbnails: from `store`, or found now.

    `request`: what view 0 of the photos of a split was computed from. Raises `StorageError` when there is no room for a
    copy of view 0.
    """
    where: dict[str, tuple[str, int]] = {}
    for split, part in parts.items():
        for i, sample in enumerate(part.samples):
            where.setdefault(sample.digest, (split, i))
    photos = tuple(parts[split].samples[i] for split, i in where.values())
    key = _key([request(split) for split, _i in where.values()], photos)
    found = Found.unpacked(store.get([key]).get(key), len(photos))
    if found is None:
        width = next(iter(parts.values())).array.shape[2]
        features = scratch_array(settings.cache.scratch, (len(photos), width))
        for row, (split, i) in enumerate(where.values()):
            features[row] = parts[split].array[i, 0]
        thumbnails: NDArray[np.uint8] = np.stack([parts[split].thumbnails[i] for split, i in where.values()])
        labels = np.array([sample.label for sample in photos], np.int64)
        with observer.stage("near-duplicates", None, "comparisons") as advance:
            found = find(thumbnails, features, labels, settings.workers, advance)
        if len(photos) <= _MOST_STORED:
            store.put([(key, found.packed())])
    return Linked(photos, found)


def _key(requests: Sequence[FeatureRequest], photos: Sequence[Sample]) -> bytes:
    """The key, in the feature cache, of what `find` found: all that it depends on."""
    key = hashlib.sha256(f"near-duplicates {VERSION}".encode() + requests[0].key("", 0))
    for request, sample in zip(requests, photos, strict=True):
        key.update(f"\0{sample.digest} {sample.label} {request.precision}".encode())
    return key.digest()


def keep_together(linked: Linked, data: Dataset, trained_on: Set[str], observer: Observer) -> Dataset:
    """`data` with near-duplicates as groups, and split again where the user did not choose the validation photos.

    What was found is reported. Raises `DataError` if no photo is left to validate with.
    """
    grouped = dataset.split_again(data, linked.together(), trained_on)
    pool = {sample.digest for sample in (*data.train, *data.val)}
    sizes = [sum(linked.photos[i].digest in pool for i in group) for group in linked.found.groups]
    sizes = [size for size in sizes if size > 1]
    in_folds = any(sample.fold for sample in data.train)
    if sizes and (in_folds or data.val_split is not None):
        observer.note(
            f"{counted(sum(sizes), 'photo')} have near-duplicates, in {counted(len(sizes), 'group')}; "
            f"each group is {'in one fold' if in_folds else 'on one side of the validation split'}"
        )
    for group in linked.found.large:
        first, second = (shown(linked.photos[i].path) for i in group[:2])
        observer.warn(
            f"{len(group)} photos such as {first} and {second} look like near-duplicates of each other; that is so "
            "large a part of a class that they are not kept on one side of the split"
        )
    return grouped


def warn_of_leaks(leaks: Sequence[Leak], observer: Observer) -> None:
    """Name the near-duplicates that are in train and in another split; copies are reported with the index."""
    for split in ("val", "test"):
        found = [leak for leak in leaks if leak.split == split and leak.score < 1]
        if found:
            shows = "photo of {} shows" if len(found) == 1 else "photos of {} show"
            observer.warn(
                f"{len(found)} {shows.format(split)} the same picture as a training photo, such as "
                f"{shown(found[0].path)} and {shown(found[0].train_path)}: the accuracy on {split} will look better "
                f"than it is; it is told without them, too, and {LEAKS} of the run lists them"
            )


def regrouped(part: Features, data: Dataset) -> Features:
    """`part` with the groups that its photos have in `data`."""
    group_of = {sample.digest: sample.group for samples in data.splits.values() for sample in samples}
    samples = tuple(replace(sample, group=group_of.get(sample.digest, sample.group)) for sample in part.samples)
    return replace(part, samples=samples)


def recorded(rows: Iterable[SplitRow]) -> Mapping[tuple[str, str], tuple[str, str | None]]:
    """The lines of split.csv as `dataset.split_as_recorded` takes them."""
    return {(row.digest, row.path): (row.split, row.group or None) for row in rows}


def leaked(leaks: Iterable[Leak], split: str, samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """``bool (n,)``: which `samples` of `split` are leaks."""
    names = {leak.path for leak in leaks if leak.split == split}
    return np.array([sample.name in names for sample in samples], np.bool_)


def write_leaks(folder: Path, leaks: Sequence[Leak]) -> None:
    """Write leaks.csv into the run `folder`. Raises `StorageError`."""
    write_csv(folder / LEAKS, _HEADER, ((leak.split, leak.path, leak.train_path, f"{leak.score:g}") for leak in leaks))


def read_leaks(folder: Path) -> tuple[Leak, ...]:
    """What `write_leaks` wrote; nothing if there is no such file. Raises `RunError` when it is damaged."""
    path = folder / LEAKS
    try:
        return _parsed(files.read_own(path, folder), path)
    except FileNotFoundError:
        return ()
    except OSError as exc:
        raise RunError(f"{path} cannot be read: {exc.strerror}", _REMEDY) from exc


def leaks_of(run: Run) -> tuple[Leak, ...]:
    """The leaks of a finished run. Raises `RunError` when leaks.csv is damaged."""
    return _parsed(run.read(LEAKS), run.folder / LEAKS) if LEAKS in run.manifest.files else ()


def _parsed(content: bytes, path: Path) -> tuple[Leak, ...]:
    try:
        rows = parse_csv(content, _HEADER)
        return tuple(Leak(split, name, train_name, float(score)) for split, name, train_name, score in rows)
    except (ValueError, csv.Error) as exc:
        raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc
