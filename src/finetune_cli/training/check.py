"""`check`: decode every photo of a config and report all problems; nothing is trained and nothing is written."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from finetune_cli.config.schema import Config
from finetune_cli.head.data import class_weights
from finetune_cli.photos.dataset import Dataset, refuse_empty
from finetune_cli.photos.scan import BadPhoto, refuse_bad
from finetune_cli.progress import Observer
from finetune_cli.training.prepare import decode_all, warn_of_series, with_photos
from finetune_cli.training.requirements import check_settings


@dataclass(frozen=True)
class Report:
    """`counts[class][split]` is a number of good photos; `bad` are those that would be skipped."""

    data: Dataset
    counts: dict[str, dict[str, int]]
    bad: tuple[BadPhoto, ...]


def check(config: Config, observer: Observer) -> Report:
    """Check the settings, then index and decode all photos of `config`.

    Raises the errors that would stop `train`: `DataError` that lists the photos, `ConfigError`, `RunError`,
    `StorageError`.
    """
    settings = check_settings(config)

    def decode(data: Dataset) -> tuple[Dataset, list[BadPhoto]]:
        warn_of_series(data, settings.image.max_pixels, observer)
        class_weights(np.arange(len(data.classes)), config.training.class_weights, data.classes)
        return data, [*data.bad, *decode_all(data, settings.image, settings.workers, observer)]

    data, bad = with_photos(settings, observer, decode, {})
    refuse_bad(bad, data.photos, config.data.on_bad_image)
    refused = {photo.path for photo in bad}
    good = {split: [s for s in samples if s.path not in refused] for split, samples in data.splits.items()}
    refuse_empty(data.classes, good, bad)
    counts: dict[str, dict[str, int]] = {name: Counter() for name in data.classes}
    for split, samples in good.items():
        for sample in samples:
            counts[data.classes[sample.label]][split] += 1
    return Report(data, counts, tuple(bad))
