"""From a config to the inputs of a training: indexed photos, a backbone, and features.

Every command that starts from a config (`train`, `check`, `preview`, the refits of `evaluate`) gets them here, so that
all of them see the same photos in the same way.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.digests import DigestCache
from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.schema import Config
from finetune_cli.devices import Device, Precision
from finetune_cli.errors import BadImage, ChangedPhoto, Interrupted, RunError
from finetune_cli.head.data import class_weights
from finetune_cli.inference import runtimes
from finetune_cli.inference.predictor import UNSURE
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.parallel import ordered_map, worker_count
from finetune_cli.photos import dataset, groups, scan
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import Dataset, DataSettings
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance, Observer, ignore_progress, timed
from finetune_cli.runs.run import Run
from finetune_cli.text import counted, shown
from finetune_cli.training import extract
from finetune_cli.training.converted import Conversion, Converted
from finetune_cli.training.extract import Features, Request, Resources
from finetune_cli.training.requirements import cache_folder, check_room, start_digest

_SHOWN = 20
Result = TypeVar("Result")

# As Keras builds it in this process, for fine-tuning, or converted, in the cache.
AnyBackbone = Backbone | Converted

# How many photos of a split are read to see whether the index is up to date.
_CHECKED_PHOTOS = 16


@dataclass
class Prepared:
    """All that a head is fitted and evaluated on; `parts` maps train, val and, if there is one, test to features.

    `start_from`: SHA-256 of the model of `model.start_from`, if there is one.
    """

    config: Config
    data: Dataset
    backbone: AnyBackbone
    device: Device
    precision: Precision
    workers: int
    parts: dict[str, Features]
    cache_bytes: int
    start_from: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def keras_backbone(self) -> Backbone:
        """The backbone of a config for which `changes_backbone` is true."""
        assert isinstance(self.backbone, Backbone)
        return self.backbone


def changes_backbone(config: Config) -> bool:
    """Whether fine-tuning changes the weights of the backbone, or has changed those that `model.start_from` brings.

    Keras builds such a backbone in this process; any other is converted once, and kept in the cache.
    """
    if config.fine_tuning is not None:
        return True
    if config.model.start_from is None:
        return False
    old = Run.load(config.model.start_from).manifest.backbone
    return old.fingerprint != old.original


def prepare(
    config: Config, observer: Observer, check: Callable[[Dataset, AnyBackbone], None] | None = None
) -> Prepared:
    """Index the photos, build the backbone, and compute (or find in the cache) every feature.

    `config` is one that `check_settings` accepts. `check` may raise when it sees the photos and the backbone, before
    any feature is computed.

    Raises `DataError` when photos are bad and `data.on_bad_image` does not allow skipping them; what was computed until
    then stays in the cache. Raises `StorageError` when there is no room for the features or for the run.
    """
    seconds: dict[str, float] = {}
    started_from = start_digest(config)
    augmentation = augmenter(config)
    extractor: Extractor | None = None
    conversion: Conversion | None

    def work(data: Dataset) -> Prepared:
        nonlocal extractor
        with timed(seconds, "preflight"):
            _refuse_bad_headers(config, data, observer)
        class_weights(np.arange(len(data.classes)), config.training.class_weights, data.classes)
        if extractor is None:
            _note_augmentation(config, augmentation, observer)
            with timed(seconds, "backbone"):
                extractor = make_extractor(config, observer, conversion)
        check_room(config, data, augmentation.views, extractor.backbone)
        if check is not None:
            check(data, extractor.backbone)
        precision = runtimes.training_precision(extractor.device, config.runtime.feature_precision)
        with timed(seconds, "features"):
            parts, cache_bytes = _all_features(extractor, data, precision, augmentation)
        _refuse_bad(config, data, parts, observer)
        backbone, device, workers = extractor.backbone, extractor.device, extractor.workers
        return Prepared(config, data, backbone, device, precision, workers, parts, cache_bytes, started_from, seconds)

    with contextlib.nullcontext() if changes_backbone(config) else Conversion(config) as conversion:
        if conversion is not None and not conversion.downloads:  # a download waits for photos that can be used
            conversion.begin()
        return with_photos(config, observer, work, seconds)


def with_photos(
    config: Config, observer: Observer, work: Callable[[Dataset], Result], seconds: dict[str, float]
) -> Result:
    """The result of `work` on the indexed photos of `config`; the seconds of indexing go to ``seconds["preflight"]``.

    When `work` finds a photo that is not the indexed one, it is called once more, after all photos were read again: a
    row of the digest cache can be out of date where the times of a file system cannot be trusted. A photo that differs
    again is being changed right now, and the second `ChangedPhoto` is raised.
    """
    try:
        with timed(seconds, "preflight"):
            data = index(config, observer)
        return work(data)
    except ChangedPhoto as exc:
        observer.note(f"{shown(exc.path)} is not the photo that was indexed; all photos are read again")
    with timed(seconds, "preflight"):
        data = index(config, observer, fresh=True)
    return work(data)


def _note_augmentation(config: Config, augmentation: Augmenter, observer: Observer) -> None:
    if config.augmentation is not None and config.augmentation.views > 1 and not augmentation.active:
        observer.note("augmentation: no transform is active, so each photo has one view")
    if config.augmentation is not None and config.augmentation.views == 1 and augmentation.changed:
        observer.warn("augmentation.views is 1, the photo itself: no transform is applied")


def make_extractor(config: Config, observer: Observer, conversion: Conversion | None = None) -> "Extractor":
    """`conversion`: of the backbone; `None` for one that Keras builds here, see `changes_backbone`."""
    with observer.stage("backbone", None, "MB") as advance:
        device = runtimes.choose_device(config.runtime.device)
        start = Run.load(config.model.start_from) if config.model.start_from is not None else None
        if conversion is not None:
            converted = conversion.finish(advance)
            if start is not None:
                check_start(start, converted)
            return Extractor(config, converted, device, observer)
        backbone = build_backbone(config, advance)
        if start is not None:
            backbone = starting_backbone(start, config, backbone)
        return Extractor(config, backbone, device, observer)


def _all_features(
    extractor: "Extractor", data: Dataset, precision: Precision, augmentation: Augmenter
) -> tuple[dict[str, Features], int]:
    """The features of every split of `data`, and how many bytes the cache takes."""
    observer, folder = extractor.observer, cache_folder(extractor.config)
    with FeatureStore(folder.path, folder.writable) as store:
        try:
            parts = {"train": extractor(store, "train", data.train, precision, augmentation)}
            for split, samples in (("val", data.val), ("test", data.test)):
                if samples:
                    parts[split] = extractor(store, split, samples, "float32", None)
            for part in parts.values():
                _check_unchanged(part.samples)
            return parts, store.size()
        except Interrupted as exc:
            if store.writable and not folder.warning:
                exc.remedy = "the features so far are in the cache; run the same command again to continue"
            raise
        finally:
            for warning in store.warnings:
                observer.warn(warning)


def _check_unchanged(samples: Sequence[Sample]) -> None:
    """Raise `ChangedPhoto` if one of a few of `samples` is not the one that was indexed.

    Photos whose features are all in the cache are not read otherwise, and an index that is out of date would go unseen.
    """
    for i in evenly_spread(len(samples), _CHECKED_PHOTOS):
        with contextlib.suppress(BadImage):  # gone since it was indexed, or unreadable: its features are known
            scan.read_sample(samples[i])


def _refuse_bad(config: Config, data: Dataset, parts: dict[str, Features], observer: Observer) -> None:
    """Raise `DataError` for the photos that cannot be used, unless they may be skipped; then warn of them."""
    bad = [*data.bad, *(photo for part in parts.values() for photo in part.bad)]
    scan.refuse_bad(bad, data.photos, config.data.on_bad_image)
    dataset.refuse_empty(data.classes, {split: part.samples for split, part in parts.items()}, bad)
    for photo in bad[:_SHOWN]:
        observer.warn(f"skipped {photo.path}: {photo.reason}")
    if len(bad) > _SHOWN:
        observer.warn(f"skipped {len(bad) - _SHOWN} more photos; run.json will list all")


def _refuse_bad_headers(config: Config, data: Dataset, observer: Observer) -> None:
    """Raise `DataError` if the headers alone stop the training: then with what decoding finds, all at once."""
    if not scan.may_skip(data.bad, data.photos, config.data.on_bad_image):
        observer.note(f"{counted(len(data.bad), 'photo')} cannot be used; decoding the others, to find all such photos")
        scan.refuse_bad([*data.bad, *decode_all(config, data, observer)], data.photos, config.data.on_bad_image)
    dataset.refuse_empty(data.classes, data.splits, data.bad)


def decode_all(config: Config, data: Dataset, observer: Observer) -> list[BadPhoto]:
    """Decode every photo of `data` and return those that cannot be."""
    settings = image_settings(config)

    def decode(sample: Sample) -> BadPhoto | None:
        try:
            scan.decode_sample(sample, settings)
        except BadImage as exc:
            return BadPhoto(sample.path, sample.name, exc.reason)
        return None

    bad = []
    samples = [sample for part in data.splits.values() for sample in part]
    with observer.stage("decoding", len(samples)) as advance:
        for fault in ordered_map(decode, samples, worker_count(config.runtime.workers)):
            advance(1)
            if fault is not None:
                bad.append(fault)
    return bad


@dataclass
class Extractor:
    """Computes the features of one split after another with one backbone."""

    config: Config
    backbone: AnyBackbone
    device: Device
    observer: Observer
    _compiled: dict[Precision, Runtime] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Threads that decode and infer."""
        return worker_count(self.config.runtime.workers)

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
        scratch = cache_folder(self.config).scratch
        resources = Resources(store, self._runtime, scratch, self.workers, self.batch_size)
        with self.observer.stage(f"features of {split}", len(samples)) as advance:
            return extract.extract(samples, request, self.backbone.width, resources, advance)

    def _runtime(self, precision: Precision) -> Runtime:
        """The backbone, converted once and compiled once per precision."""
        if precision not in self._compiled:
            if self.device == "gpu":
                self._compiled[precision] = runtimes.TensorFlowRuntime(self._keras_model, precision)
            else:
                self._compiled[precision] = runtimes.OpenVinoRuntime(self._converted.clone(), precision, self.workers)
        return self._compiled[precision]

    @cached_property
    def _keras_model(self) -> Any:
        return build_backbone(self.config).model if isinstance(self.backbone, Converted) else self.backbone.model

    @cached_property
    def _converted(self) -> Any:
        if isinstance(self.backbone, Converted):
            return self.backbone.openvino_model()
        return runtimes.convert(self.backbone.model)

    @property
    def batch_size(self) -> int:
        """Views in a call of the runtime."""
        if self.config.runtime.batch_size != "auto":
            return self.config.runtime.batch_size
        # On a CPU the activations of a few photos stay in the cache of a core; a GPU needs larger batches.
        return 4 if self.device == "cpu" else 64


def build_backbone(config: Config, advance: Advance = ignore_progress) -> Backbone:
    """The frozen backbone of `config`; `advance` counts the megabytes of a download.

    Raises `ConfigError` and `WeightsError`.
    """
    model, size, seed = config.model, config.image.size, config.training.seed
    return build.build(model.backbone, model.weights, size, seed, model.weights_sha256, advance)


def check_start(start: Run, backbone: AnyBackbone) -> None:
    """Raise `RunError` when the run `start` was trained on another backbone than `backbone` or a tuned form of it."""
    old = start.manifest.backbone
    if backbone.fingerprint != old.fingerprint and backbone.original != old.original:
        raise RunError(
            f"model.start_from: {start.folder} was trained on another backbone ({old.name})",
            "use the same model.backbone, model.weights and image.size, or drop model.start_from",
        )


def starting_backbone(start: Run, config: Config, backbone: Backbone) -> Backbone:
    """`backbone`, with the weights that fine-tuning gave it if `start` is a run that tuned it; it changes then.

    Raises `RunError` when `start` has another backbone.
    """
    check_start(start, backbone)
    old = start.manifest.backbone
    if old.fingerprint == backbone.fingerprint:
        return backbone
    path = start.file("model.keras")
    tuned = build.with_weights_of(backbone, config.model.backbone, path)
    if tuned.fingerprint != old.fingerprint:
        raise RunError(f"{path} does not hold the backbone that run.json names", "restore the run from a copy")
    return tuned


def index(config: Config, observer: Observer, fresh: bool = False) -> Dataset:
    """The photos of `config` after preflight (headers and digests); what the user should know is noted.

    `fresh`: all photos are read, whatever the digest cache says.
    """
    folder = cache_folder(config)
    with (
        observer.stage("preflight", None) as advance,
        DigestCache(folder.path, folder.writable, fresh) as cache,
    ):
        data = dataset.load(data_settings(config), cache, advance)
    for note in data.notes:
        observer.note(note)
    for warning in (folder.warning, *cache.warnings, *data.warnings):
        if warning:
            observer.warn(warning)
    if UNSURE in data.classes:
        observer.warn(
            f"a class is named {UNSURE}, which is also what predict --min-confidence answers: "
            "that option will not work with this model unless the class gets another name"
        )
    return data


def warn_of_series(config: Config, data: Dataset, observer: Observer) -> None:
    """Warn that photos taken at nearly the same time are in train and in val, if no groups are known or proposed."""
    if data.proposal is not None or any(sample.group for part in data.splits.values() for sample in part):
        return
    paths = {split: [sample.path for sample in part] for split, part in data.splits.items()}
    if finding := groups.series(paths, config.image.max_pixels):
        observer.warn(f"{finding}; if they show the same thing, name the groups in the column `group` of a table")


def data_settings(config: Config) -> DataSettings:
    """Where the photos of `config` are and how they are split."""
    section = config.data
    return DataSettings(
        section.train, section.val, section.test, section.val_split, section.group_regex, config.image.max_pixels
    )


def image_settings(config: Config) -> ImageSettings:
    """How the photos of `config` are decoded."""
    return ImageSettings(config.image.size, config.image.resize, config.image.max_pixels)


def augmenter(config: Config, views: int | None = None) -> Augmenter:
    """The augmentation of `config`, perhaps with another number of `views`; no section means one view."""
    section = config.augmentation
    arguments = section.arguments() if section is not None else {}
    configured = section.views if section is not None else 1
    return Augmenter(arguments, configured if views is None else views, config.training.seed, config.image.size)


def evenly_spread(count: int, most: int) -> NDArray[np.intp]:
    """At most `most` of the numbers below `count`, from the first to the last of them."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.intp)
