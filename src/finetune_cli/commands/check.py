"""`check`: decode every photo of a config and say all that is wrong; nothing is trained and nothing is written."""

from collections import Counter
from dataclasses import dataclass

from finetune_cli.config import Config
from finetune_cli.errors import BadImage
from finetune_cli.model.features import decode_sample
from finetune_cli.observer import Observer
from finetune_cli.parallel import ordered_map
from finetune_cli.photos.dataset import BadPhoto, Dataset, Sample, refuse_bad
from finetune_cli.runs.preparation import image_settings, index, worker_count


@dataclass(frozen=True)
class Report:
    """`counts[class][split]` is a number of good photos; `bad` are those that would be skipped."""

    data: Dataset
    counts: dict[str, dict[str, int]]
    bad: tuple[BadPhoto, ...]


def check(config: Config, observer: Observer) -> Report:
    """Index and decode all photos of `config`. Raises `DataError` that lists what would stop `train`."""
    data = index(config, observer, "list")
    settings = image_settings(config)

    def decode(sample: Sample) -> BadPhoto | None:
        try:
            decode_sample(sample, settings)
        except BadImage as exc:
            return BadPhoto(sample.path, sample.name, exc.reason)
        return None

    splits = {"train": data.train, "val": data.val, "test": data.test}
    counts: dict[str, dict[str, int]] = {name: Counter() for name in data.classes}
    bad = list(data.bad)
    total = sum(map(len, splits.values()))
    with observer.stage("decoding", total) as advance:
        for split, samples in splits.items():
            for sample, fault in zip(samples, ordered_map(decode, samples, worker_count(config)), strict=True):
                advance(1)
                if fault is None:
                    counts[data.classes[sample.label]][split] += 1
                else:
                    bad.append(fault)
    refuse_bad(bad, total + len(data.bad), config.data.on_bad_image)
    return Report(data, counts, tuple(bad))
