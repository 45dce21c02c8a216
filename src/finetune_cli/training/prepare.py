"""From a configuration to what can be learnt from: indexed photos, a backbone, and features.

Every command that starts from a config (`train`, `check`, `preview`, the refits of `evaluate`) takes its parts from
here, so that all of them see the same photos in the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache import digests
from finetune_cli.cache.digests import DigestMemory
from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.schema import Config
from finetune_cli.devices import Device, Precision
from finetune_cli.errors import BadImage, Interrupted
from finetune_cli.head.lbfgs import class_weights
from finetune_cli.inference import runtimes
from finetune_cli.inference.predictor import UNSURE
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos import dataset, groups
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import BadPhoto, Dataset, Sample
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.progress import Meter, Observer
from finetune_cli.text import counted
from finetune_cli.training import extract
from finetune_cli.training.extract import Features, Request
from finetune_cli.training.requirements import cache_folder, check_room, check_settings, check_start, start_digest

_SHOWN = 20


@dataclass
class Prepared:
    """All that a head is fitted on and judged by; `parts` maps train, val and, if there is one, test to features.

    `start_from`: SHA-256 of the model of `model.start_from`, if there is one.
    """

    config: Config
    data: Dataset
    backbone: Backbone
    device: Device
    precision: Precision
    workers: int
    parts: dict[str, Features]
    cache_bytes: int
    start_from: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(config: Config, observer: Observer) -> Prepared:
    """Index the photos, build the backbone, and compute (or find in the cache) every feature.

    Raises `DataError` when photos are bad and `data.on_bad_image` does not let them be skipped; what was computed by
    then stays in the cache. Raises `StorageError` when there is no room for the features or for the run.
    """
    seconds: dict[str, float] = {}
    check_settings(config)
    started_from = start_digest(config)
    with timed(seconds, "preflight"):
        data = index(config, observer)
        _refuse_bad_headers(config, data, observer)
    class_weights(np.arange(len(data.classes)), config.training.class_weights, data.classes)
    augmentation = augmenter(config)
    if config.augmentation is not None and config.augmentation.views > 1 and not augmentation.active:
        observer.note("augmentation: no transform is active, so each photo has one view")
    if config.augmentation is not None and config.augmentation.views == 1 and augmentation.changed:
        observer.warn("augmentation.views is 1, the photo itself: no transform is applied")
    with timed(seconds, "backbone"), observer.stage("backbone", None, "MB") as advance:
        device = runtimes.choose_device(config.runtime.device)
        precision = runtimes.training_precision(device, config.runtime.feature_precision)
        backbone = build_backbone(config, advance_to(advance))
    check_start(config, backbone)
    check_room(config, data, augmentation.views, backbone)
    extractor = Extractor(config, backbone, device, observer)
    with timed(seconds, "features"), FeatureStore(cache_folder(config)) as store:
        try:
            parts = {"train": extractor(store, "train", data.train, precision, augmentation)}
            for split, samples in (("val", data.val), ("test", data.test)):
                if samples:
                    parts[split] = extractor(store, split, samples, "float32", None)
            cache_bytes = store.size()
        except Interrupted as exc:
            exc.remedy = "the features so far are in the cache; run the same command again to go on"
            raise
        finally:
            for warning in store.warnings:
                observer.warn(warning)
    bad = [*data.bad, *(photo for part in parts.values() for photo in part.bad)]
    dataset.refuse_bad(bad, data.photos, config.data.on_bad_image)
    dataset.refuse_empty(data.classes, {split: part.samples for split, part in parts.items()}, bad)
    for photo in bad[:_SHOWN]:
        observer.warn(f"skipped {photo.path}: {photo.reason}")
    if len(bad) > _SHOWN:
        observer.warn(f"skipped {len(bad) - _SHOWN} more photos; run.json will list all")
    return Prepared(
        config, data, backbone, device, precision, extractor.workers, parts, cache_bytes, started_from, seconds
    )


def _refuse_bad_headers(config: Config, data: Dataset, observer: Observer) -> None:
    """Raise `DataError` if what the headers tell stops the training: then with what decoding finds, so all at once."""
    if not dataset.may_skip(data.bad, data.photos, config.data.on_bad_image):
        observer.note(f"{counted(len(data.bad), 'photo')} cannot be used; decoding the others, to find all such photos")
        dataset.refuse_bad([*data.bad, *decode_all(config, data, observer)], data.photos, config.data.on_bad_image)
    dataset.refuse_empty(data.classes, data.splits, data.bad)


def decode_all(config: Config, data: Dataset, observer: Observer) -> list[BadPhoto]:
    """Decode every photo of `data` and return those that cannot be."""
    settings = image_settings(config)

    def decode(sample: Sample) -> BadPhoto | None:
        try:
            extract.decode_sample(sample, settings)
        except BadImage as exc:
            return BadPhoto(sample.path, sample.name, exc.reason)
        return None

    bad = []
    samples = [sample for part in data.splits.values() for sample in part]
    with observer.stage("decoding", len(samples)) as advance:
        for fault in ordered_map(decode, samples, worker_count(config)):
            advance(1)
            if fault is not None:
                bad.append(fault)
    return bad


@dataclass
class Extractor:
    """Computes the features of one split after another with one backbone."""

    config: Config
    backbone: Backbone
    device: Device
    observer: Observer
    _compiled: dict[Precision, Runtime] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Threads that decode and infer."""
        return worker_count(self.config)

    def __call__(
        self,
        store: FeatureStore,
        split: str,
        samples: Sequence[Sample],
        precision: Precision,
        augmentation: Augmenter | None,
    ) -> Features:
        """The features of `samples`, `float32 (n, views, D)`, through `store`."""
        request = Request(image_settings(self.config), self.backbone.fingerprint, precision, augmentation)
        with self.observer.stage(f"features of {split}", len(samples)) as advance:
            return extract.extract(
                samples,
                request,
                self.backbone.width,
                store,
                self._runtime,
                cache_folder(self.config),
                self.workers,
                self._batch_size(),
                advance,
            )

    def _runtime(self, precision: Precision) -> Runtime:
        """The backbone, converted once and compiled once a precision."""
        if precision not in self._compiled:
            if self.device == "gpu":
                self._compiled[precision] = runtimes.TensorFlowRuntime(self.backbone.model, precision)
            else:
                self._compiled[precision] = runtimes.OpenVinoRuntime(self._converted.clone(), precision, self.workers)
        return self._compiled[precision]

    @cached_property
    def _converted(self) -> Any:
        return runtimes.convert(self.backbone.model)

    def _batch_size(self) -> int:
        if self.config.runtime.batch_size != "auto":
            return self.config.runtime.batch_size
        # On a CPU the activations of a few photos stay in the cache of a core; a GPU wants more to do at once.
        return 4 if self.device == "cpu" else 64


def build_backbone(config: Config, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Backbone:
    """The frozen backbone of `config`. Raises `ConfigError` and `WeightsError`.

    `progress` is called with (megabytes done, megabytes in all) while a weight file is downloaded.
    """
    model, size, seed = config.model, config.image.size, config.training.seed

    def fetched(done: int, total: int) -> None:
        progress(done // 10**6, total // 10**6)

    return build.build(model.backbone, model.weights, size, seed, model.weights_sha256, fetched)


def index(config: Config, observer: Observer) -> Dataset:
    """The photos of `config` after preflight (headers and digests); what a person should know is noted."""
    with observer.stage("preflight", None) as advance, digest_memory(config) as memory:
        data = dataset.load(
            config.data.train,
            config.data.val,
            config.data.test,
            config.data.val_split,
            config.data.group_regex,
            config.image.max_pixels,
            memory,
            advance_to(advance),
        )
    for note in data.notes:
        observer.note(note)
    for warning in data.warnings:
        observer.warn(warning)
    if UNSURE in data.classes:
        observer.warn(
            f"a class is named {UNSURE}, which is also what predict --min-confidence answers: "
            "that option will not work with this model unless the class gets another name"
        )
    return data


def warn_of_series(config: Config, data: Dataset, observer: Observer) -> None:
    """Say that photos taken at nearly the same time are in train and in val, if no groups are known or proposed."""
    if data.proposal is not None or any(sample.group for part in data.splits.values() for sample in part):
        return
    paths = {split: [sample.path for sample in part] for split, part in data.splits.items()}
    if said := groups.series(paths, config.image.max_pixels):
        observer.warn(f"{said}; if they show the same thing, name the groups in the column `group` of a table")


def advance_to(advance: Meter) -> Callable[[int, int], None]:
    """Turn a callback that advances by n into one that is told (done, total)."""
    last = 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        advance(done - last, total)
        last = done

    return progress


def image_settings(config: Config) -> ImageSettings:
    """How the photos of `config` are decoded."""
    return ImageSettings(config.image.size, config.image.resize, config.image.max_pixels)


def augmenter(config: Config) -> Augmenter:
    """The augmentation of `config`; no section means one view."""
    section = config.augmentation
    arguments = section.arguments() if section is not None else {}
    return Augmenter(arguments, section.views if section is not None else 1, config.training.seed, config.image.size)


def worker_count(config: Config) -> int:
    """Threads that decode and infer: one for each core unless the config says otherwise."""
    return cores() if config.runtime.workers == "auto" else config.runtime.workers


def digest_memory(config: Config) -> DigestMemory:
    """The memory of digests beside the feature cache."""
    return DigestMemory(cache_folder(config) / digests.NAME)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `seconds[stage]`."""
    started = time.monotonic()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 3)
