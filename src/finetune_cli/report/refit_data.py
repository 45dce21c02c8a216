"""The training features of a finished run, from the cache alone: neither the photos nor the backbone is needed.

split.csv has the digests, run.json the backbone's fingerprint, config.yaml the augmentation: together the cache keys.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli.cache import features as cache
from finetune_cli.cache import folder as cachefolder
from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.schema import Config
from finetune_cli.errors import DataError, StorageError
from finetune_cli.head.data import class_weights
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.runs.run import Run, SplitRow
from finetune_cli.training import settings
from finetune_cli.training.extract import FeatureRequest

# Refits must not take longer than the training did: beyond this many numbers (rows x features x classes), fewer
# photos are taken. The bytes allow 6,100 photos x 4 views of ResNet50; what is worked on is copied once.
_MOST_NUMBERS = 2_000_000_000
_MOST_BYTES = 200_000_000
_ROWS_A_READ = 1000


@dataclass(frozen=True, eq=False)
class Material:
    """Training features ``float32 (n, views, D)`` with labels, weights and groups ``(n,)`` and lines of split.csv.

    `photos` is how many training photos the run has; n may be less, then the classes keep their shares. `l2`: the
    strength that the run's head was fitted with. `calibrated`: whether its model got a temperature. `folds` ``(n,)``:
    in which fold the run held a photo out, from 1, 0 if in none; None if the run was not cross-validated. `frozen`:
    whether the features are those of the backbone before it was fine-tuned, see `load`.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    groups: NDArray[np.int64]
    rows: tuple[SplitRow, ...]
    classes: tuple[str, ...]
    photos: int
    l2: float
    label_smoothing: float
    seed: int
    calibrated: bool
    folds: NDArray[np.int64] | None = None
    frozen: bool = False

    @property
    def views(self) -> int:
        """Views a photo."""
        return int(self.features.shape[1])


def load(run: Run, config: Config, out_of_fold: bool = False) -> Material:
    """The training features of `run`, whose config is `config`.

    out_of_fold: the training photos are to judge each other. A backbone that was tuned at the end of a cross-validation
    has learned from all of them, so then the features of the frozen one are taken, without the l2 of the run, which
    belongs to the tuned ones. Raises `DataError` when the cache is not there or lacks some: it was cleared, or the run
    comes from elsewhere.
    """
    everything = [row for row in run.split() if row.split == "train"]
    if unknown := {row.label for row in everything} - set(run.classes):
        raise DataError(
            f"{run.folder}/split.csv names {min(unknown)!r}, which is not a class of the run",
            "restore the run from a copy",
        )
    augmenter = settings.augmenter(config)
    width = run.manifest.backbone.width
    numbers = augmenter.views * width
    most = max(len(run.classes), min(_MOST_NUMBERS // (numbers * len(run.classes)), _MOST_BYTES // (4 * numbers)))
    rows = _some(everything, most)
    tuning = run.manifest.fine_tuning or {}
    frozen = out_of_fold and tuning.get("kept", "frozen") != "frozen"
    request = FeatureRequest(
        settings.image_settings(config),
        str(tuning.get("frozen_fingerprint")) if frozen else run.manifest.backbone.fingerprint,
        run.manifest.feature_precision,
        augmenter,
    )
    label = {name: i for i, name in enumerate(run.classes)}
    labels = np.array([label[row.label] for row in rows], np.int64)
    training = config.training
    return Material(
        _read(rows, request, width, config),
        labels,
        class_weights(labels, training.class_weights, run.classes),
        group_numbers((row.group, row.digest) for row in rows),
        tuple(rows),
        run.classes,
        len(everything),
        0.0 if frozen else run.manifest.solver.l2,
        training.label_smoothing,
        training.seed,
        config.calibration == "temperature",
        np.array([row.fold or 0 for row in rows], np.int64) if any(row.fold for row in rows) else None,
        frozen,
    )


def _some(rows: Sequence[SplitRow], most: int) -> list[SplitRow]:
    """At most about `most` rows, every class in proportion, chosen by content."""
    if len(rows) <= most:
        return list(rows)
    of_class: dict[str, list[SplitRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.digest):
        of_class[row.label].append(row)
    chosen = {id(row) for own in of_class.values() for row in own[: math.ceil(len(own) * most / len(rows))]}
    return [row for row in rows if id(row) in chosen]


def _read(rows: Sequence[SplitRow], request: FeatureRequest, width: int, config: Config) -> NDArray[np.float32]:
    folder = _cache_folder(config)
    missing = DataError(
        f"the training features are not in the feature cache {folder or ''}".rstrip(),
        "train again with the same photos and config; what is still there is not computed again",
    )
    if folder is None or not (folder / cache.KIND.name).is_file():
        raise missing
    array = np.empty((len(rows), request.views, width), np.float32)
    step = max(1, _ROWS_A_READ // request.views)
    with FeatureStore(folder) as store:
        for start in range(0, len(rows), step):
            block = range(start, min(start + step, len(rows)))
            keys = {(i, view): request.key(rows[i].digest, view) for i in block for view in range(request.views)}
            found = store.get(list(set(keys.values())))
            for index, key in keys.items():
                row = found.get(key)
                if row is None or row.shape != (width,):
                    raise missing
                array[index] = row
    return array


def _cache_folder(config: Config) -> Path | None:
    try:
        return cachefolder.own_folder(config.runtime.cache_dir)
    except StorageError:
        return None
