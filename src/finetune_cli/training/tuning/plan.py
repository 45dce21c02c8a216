"""What a fine-tuning is going to do, decided by the config, the network and the number of photos: never by the clock.

So a resumed training, or the same one on another machine, tries the same.
"""

import math
from dataclasses import dataclass
from typing import Literal

from finetune_cli.config.schema import FineTuningConfig
from finetune_cli.devices import Device
from finetune_cli.training.tuning.cuts import LAST_STAGE, Cut

# Views that may be stored as float16: pixels are whole numbers, and others need not be exact. recomputed: the lower
# part runs again for every batch. none: there are no activations, because the photos themselves go in.
Storage = Literal["float16", "uint8", "recomputed", "none"]

_MOST_ROWS = 100_000  # whose features are half a gigabyte in memory, for 1,280 numbers a row
_VALIDATION_ITEM = 4  # bytes: what decides is computed in float32


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of the upper part."""

    unfreeze: str
    learning_rate: float
    epochs: int


# What `auto` tries, by the most training photos that a list is for; it ends with the first that is kept. The first of a
# list is for photos unlike those that the backbone knows, the second for photos more like them, which learn with less.
# Measured: docs/training.md.
_LISTS: tuple[tuple[float, tuple[Trial, ...]], ...] = (
    (2_000, (Trial(LAST_STAGE, 0.001, 20), Trial(LAST_STAGE, 0.0003, 6))),
    (10_000, (Trial(LAST_STAGE, 0.001, 10), Trial(LAST_STAGE, 0.0003, 4))),
    (math.inf, (Trial(LAST_STAGE, 0.001, 5),)),
)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many training photos there are, with how many views each, and how many validation photos."""

    photos: int
    views: int
    val_photos: int


@dataclass(frozen=True, slots=True)
class Store:
    """How the activations at a cut are kept: the number of views, the type, and the bytes of the scratch files."""

    storage: Storage
    views: int
    bytes: int


def trials(section: FineTuningConfig, photos: int) -> tuple[Trial, ...]:
    """The trainings for so many photos at most, at least one: those of the list that the section leaves open."""
    found: dict[tuple[str, float], Trial] = {}
    for trial in next(listed for most, listed in _LISTS if photos <= most):
        unfreeze = trial.unfreeze if section.unfreeze == "auto" else section.unfreeze
        rate = trial.learning_rate if section.learning_rate == "auto" else section.learning_rate
        epochs = trial.epochs if section.epochs == "auto" else section.epochs
        found.setdefault((unfreeze, rate), Trial(unfreeze, rate, epochs))
    # A cut that was chosen is trained once, as the first of the list is.
    return tuple(found.values()) if section.unfreeze == "auto" else (next(iter(found.values())),)


def views_again(store: Store, counts: Counts) -> int:
    """On how many views a photo the head is fitted again: all, unless that makes more than `_MOST_ROWS`."""
    return max(1, min(store.views, counts.views, _MOST_ROWS // counts.photos))


def limit(section: FineTuningConfig) -> int:
    """The most bytes that the scratch files may take."""
    return int(1e9 * section.scratch_gb)


def store(cut: Cut, epochs: int, device: Device, counts: Counts, most: int) -> Store:
    """How the activations at `cut` are kept within `most` bytes for a training of `epochs`.

    All views if they fit, else fewer, and with no room for one view a photo the lower part runs again in every epoch.
    The validation photos take their view in float32. On a GPU nothing is kept, and each epoch has views of its own.
    """
    if device == "gpu":
        return Store("none", max(counts.views, epochs) if counts.views > 1 else 1, 0)
    numbers = math.prod(cut.shape)
    storage: Storage = "float16" if cut.lower is not None else "uint8"
    item = 2 if storage == "float16" else 1
    val = _VALIDATION_ITEM * numbers * counts.val_photos
    fitting = (most - val) // (item * numbers * counts.photos)
    if fitting < 1:
        return Store("recomputed", counts.views, 0)
    views = min(counts.views, fitting)
    return Store(storage, views, item * numbers * counts.photos * views + val)
