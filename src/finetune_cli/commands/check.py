"""`check`: decode every photo of a config and say all that is wrong; nothing is trained and nothing is written."""

from collections import Counter
from dataclasses import dataclass

from finetune_cli.config import Config
from finetune_cli.observer import Observer
from finetune_cli.photos.dataset import BadPhoto, Dataset, refuse_bad, refuse_empty
from finetune_cli.runs.preparation import decode_all, index


@dataclass(frozen=True)
class Report:
    """`counts[class][split]` is a number of good photos; `bad` are those that would be skipped."""

    data: Dataset
    counts: dict[str, dict[str, int]]
    bad: tuple[BadPhoto, ...]


def check(config: Config, observer: Observer) -> Report:
    """Index and decode all photos of `config`. Raises `DataError` that lists what would stop `train`."""
    data = index(config, observer)
    bad = [*data.bad, *decode_all(config, data, observer)]
    refuse_bad(bad, data.photos, config.data.on_bad_image)
    refused = {photo.path for photo in bad}
    good = {split: [s for s in samples if s.path not in refused] for split, samples in data.splits.items()}
    refuse_empty(data.classes, good, bad)
    counts: dict[str, dict[str, int]] = {name: Counter() for name in data.classes}
    for split, samples in good.items():
        for sample in samples:
            counts[data.classes[sample.label]][split] += 1
    return Report(data, counts, tuple(bad))
