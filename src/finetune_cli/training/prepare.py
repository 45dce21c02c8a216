"""From a config to the inputs of a training: indexed photos, a backbone, and features.

Every command that starts from a config (`train`, `check`, `preview`, the refits of `evaluate`) gets them here, so that
all of them see the same photos in the same way.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune_cli import places, storage
from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.digests import DigestCache
from finetune_cli.cache.features import FeatureStore
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config
from finetune_cli.devices import Device, Precision
from finetune_cli.engines.engine import Engine
from finetune_cli.engines.opening import opened
from finetune_cli.errors import BadImage, ChangedPhoto, Interrupted
from finetune_cli.head.data import class_weights
from finetune_cli.inference import runtimes
from finetune_cli.inference.predictor import UNSURE
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import dataset, groups, scan
from finetune_cli.photos.dataset import Dataset, DataSettings
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.listing import ListedPhoto
from finetune_cli.photos.objects import Examined, Look
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.places import Address
from finetune_cli.progress import Observer, timed
from finetune_cli.runs.run import SplitRow
from finetune_cli.text import counted, shown
from finetune_cli.training import near, start_from
from finetune_cli.training.converted import Conversion
from finetune_cli.training.extract import FeatureRequest, Features
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.near import Leak
from finetune_cli.training.requirements import check_room
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone

_SHOWN = 20
Result = TypeVar("Result")

# How many photos of a split are read to see whether the index is up to date.
_CHECKED_PHOTOS = 16


@dataclass
class Prepared:
    """All that a head is fitted and evaluated on; `parts` maps train, val and, if there is one, test to features.

    `leaks`: val and test photos that show the same picture as a training photo. `start_from`: SHA-256 of the model of
    `model.start_from`, if there is one. With `data.folds`, `held_out` has view 0 of the training photos in float32, as
    they are answered when their fold is held out. `storage_retries_before`: `storage.retries()` when the command began.
    `retries`: blocks of photos that were done again, see `engines/`.
    """

    settings: Settings
    data: Dataset
    backbone: AnyBackbone
    device: Device
    precision: Precision
    parts: dict[str, Features]
    cache_bytes: int
    leaks: tuple[Leak, ...] = ()
    start_from: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    held_out: Features | None = None
    storage_retries_before: int = 0
    retries: int = 0

    @property
    def validating(self) -> Features:
        """The photos that validate, view 0 in float32: those of val or, with `data.folds`, all training photos."""
        return self.parts["val"] if self.held_out is None else self.held_out

    @property
    def config(self) -> Config:
        """The config that all of this was made for."""
        return self.settings.config

    @property
    def keras_backbone(self) -> Backbone:
        """The backbone of settings for which `changes_backbone` is true."""
        assert isinstance(self.backbone, Backbone)
        return self.backbone


def prepare(
    settings: Settings,
    observer: Observer,
    *checks: Callable[[Dataset, AnyBackbone], None],
    recorded: Sequence[SplitRow] | None = None,
) -> Prepared:
    """Index the photos, build the backbone, compute (or find in the cache) every feature, and split the photos.

    `checks` may raise when they see the photos and the backbone, before any feature is computed. `recorded`: the split
    of an unfinished run, which is then used as it is; its leaks are in the run.

    Raises `DataError` when photos are bad and `data.on_bad_image` does not allow skipping them; what was computed until
    then stays in the cache. Raises `StorageError` when there is no room for the features or for the run.
    """
    config, seconds = settings.config, dict[str, float]()
    retries_before = storage.retries()
    start_digest = start_from.digest_of(settings.start)
    conversion: Conversion | None

    @functools.cache
    def made() -> Extractor:
        _note_augmentation(settings, observer)
        with timed(seconds, "backbone"):
            return make_extractor(settings, observer, conversion, engine)

    def work(data: Dataset) -> Prepared:
        class_weights(np.arange(len(data.classes)), config.training.class_weights, data.classes)
        with timed(seconds, "preflight"):
            _refuse_bad_headers(settings, data, observer)
        extractor = made()
        check_room(settings, data, extractor.backbone)
        if config.data.folds is not None:
            start_from.check_held_out(settings.start, data.train, config.training.solver)
        for check in checks:
            check(data, extractor.backbone)
        split = _split_and_extract(extractor, data, recorded, seconds)
        with timed(seconds, "features"):
            extractor.prove()  # all features may have been in the cache
        data, parts = split.data, split.parts
        _count_looked(parts, extractor.looked)
        _refuse_bad(data, parts, config.data.on_bad_image, observer)
        if config.data.folds is not None:  # again: bad photos were left out, and near-duplicates found
            samples = tuple(dataset.into_folds(parts["train"].samples, config.data.folds))
            parts["train"] = replace(parts["train"], samples=samples)
        return Prepared(
            settings=settings,
            data=data,
            backbone=extractor.backbone,
            device=extractor.device,
            precision=extractor.precision,
            parts=parts,
            cache_bytes=split.cache_bytes,
            leaks=split.leaks,
            start_from=start_digest,
            seconds=seconds,
            held_out=split.held_out,
            storage_retries_before=retries_before,
            retries=engine.retries,
        )

    runtime = config.runtime
    with (
        contextlib.nullcontext() if settings.builds_backbone else conversion_of(settings) as conversion,
        opened(runtime.engine, runtime.ray_address, runtime.workers, observer) as engine,
    ):
        if conversion is not None and not conversion.downloads:  # a download waits for photos that can be used
            conversion.begin()
        first = _first_look(made(), seconds) if dataset.in_store(settings.photos) else None
        return with_photos(settings, observer, work, seconds, Indexing(first=first))


def _count_looked(parts: dict[str, Features], views: int) -> None:
    """Count `views` as computed that were found in the cache because this command's first look put them there."""
    for split, part in parts.items():
        own = min(views, part.cached)
        parts[split] = replace(part, computed=part.computed + own, cached=part.cached - own)
        views -= own


def conversion_of(settings: Settings) -> Conversion:
    """A solver of Keras imports it here anyway, so the backbone is converted here, too."""
    return Conversion(settings.backbone, settings.cache, here=settings.config.training.solver != "lbfgs")


def with_photos(
    settings: Settings,
    observer: Observer,
    work: Callable[[Dataset], Result],
    seconds: dict[str, float],
    how: "Indexing | None" = None,
) -> Result:
    """The result of `work` on the indexed photos; the seconds of indexing go to ``seconds["preflight"]``.

    When `work` finds a photo that is not the indexed one, it is called once more, after all photos were read again: a
    row of the digest cache can be out of date where the times of a file system cannot be trusted. A photo that differs
    again is being changed right now, and the second `ChangedPhoto` is raised.
    """
    try:
        with timed(seconds, "preflight"):
            data = index(settings.photos, settings.cache, observer, how)
        return work(data)
    except ChangedPhoto as exc:
        observer.note(f"{shown(exc.path)} is not the photo that was indexed; all photos are read again")
    with timed(seconds, "preflight"):
        data = index(settings.photos, settings.cache, observer, replace(how or Indexing(), fresh=True))
    return work(data)


class FirstLook:
    """Reads photos in a store for the first time, with the features that they need whatever their digests are.

    Used as a context: the feature cache is open in it. `wanted`: what is computed of the photos of a split, which the
    user has made or not. `seconds`: what it takes is counted as features, not as preflight.
    """

    def __init__(
        self, extractor: Extractor, wanted: Callable[[str, bool], FeatureRequest], seconds: dict[str, float]
    ) -> None:
        self._extractor = extractor
        self._wanted = wanted
        self._seconds = seconds
        self._store: FeatureStore | None = None

    def __enter__(self) -> Look:
        """What `dataset.load` takes."""
        folder = self._extractor.settings.cache
        self._store = FeatureStore(folder.path, folder.writable, self._extractor.prove)
        return self._look

    def __exit__(self, *_exception: object) -> None:
        """Close the cache."""
        assert self._store is not None
        self._store.close()

    def _look(self, split: str, photos: Sequence[ListedPhoto], split_is_made: bool) -> Iterator[Examined]:
        assert self._store is not None
        request = self._wanted(split, split_is_made)
        if split == "train" and not split_is_made and request.views < self._extractor.request("train").views:
            self._extractor.observer.note(
                f"{counted(len(photos), 'photo')} of a store must be read before the split; those that become training "
                "photos are read once more for their other views"
            )
        started = time.monotonic()
        yield from self._extractor.look(self._store, photos, request)
        spent = time.monotonic() - started
        for stage, change in (("preflight", -spent), ("features", spent)):
            self._seconds[stage] = round(self._seconds.get(stage, 0.0) + change, 3)


@dataclass(frozen=True)
class Indexing:
    """How photos are indexed.

    contradictions: photos under two labels are no error. fresh: all photos are read, whatever the digest cache says.
    first: how photos in a store are read.
    """

    contradictions: bool = False
    fresh: bool = False
    first: FirstLook | None = None


def _first_look(extractor: Extractor, seconds: dict[str, float]) -> FirstLook:
    """The first look of a training.

    Where the user made the split, or with folds, it computes all that is needed; before an automatic split, view 0 of
    the photos to be split. Those that become training photos are read once more for their other views.
    """
    data = extractor.settings.config.data
    thumbnails = data.near_duplicates != "ignore"

    def wanted(split: str, split_is_made: bool) -> FeatureRequest:
        if split == "train" and not split_is_made and data.folds is None:
            return replace(extractor.first_request("train"), thumbnails=thumbnails)
        return extractor.request(split, thumbnails)

    return FirstLook(extractor, wanted, seconds)


def _note_augmentation(settings: Settings, observer: Observer) -> None:
    section, augmentation = settings.config.augmentation, settings.augmenter
    if section is not None and section.views > 1 and not augmentation.active:
        observer.note("augmentation: no transform is active, so each photo has one view")
    if section is not None and section.views == 1 and augmentation.changed:
        observer.warn("augmentation.views is 1, the photo itself: no transform is applied")


def make_extractor(
    settings: Settings, observer: Observer, conversion: Conversion | None = None, engine: Engine | None = None
) -> Extractor:
    """`conversion`: of the backbone; `None` for one that Keras builds here, see `Settings.builds_backbone`."""
    with observer.stage("backbone", None, "MB") as advance:
        device = settings.device
        precision = runtimes.training_precision(device, settings.config.runtime.feature_precision)
        built = build.build(settings.backbone, advance) if conversion is None else conversion.start(advance)
        backbone = start_from.backbone_of(settings.start, built)
        extractor = Extractor(settings, backbone, device, precision, observer, engine=engine)
        if conversion is not None:
            extractor.prove = conversion.finish
        return extractor


@dataclass
class _Split:
    """The photos of every split, their features, and where near-duplicates are on both sides.

    held_out: see `Prepared`.
    """

    data: Dataset
    parts: dict[str, Features]
    leaks: tuple[Leak, ...] = ()
    held_out: Features | None = None
    cache_bytes: int = 0


def _split_and_extract(
    extractor: Extractor, data: Dataset, recorded: Sequence[SplitRow] | None, seconds: dict[str, float]
) -> _Split:
    """Split the photos of `data` as near-duplicates or `recorded` want it, with the features of every split."""
    observer, folder = extractor.observer, extractor.settings.cache
    with FeatureStore(folder.path, folder.writable, extractor.prove) as store:
        try:
            if recorded is not None:
                data = dataset.split_as_recorded(data, near.recorded(recorded))
                split = _Split(data, _features(extractor, store, data, seconds))
            elif extractor.settings.config.data.near_duplicates == "ignore":
                split = _Split(data, _features(extractor, store, data, seconds))
            else:
                split = _with_near_duplicates(extractor, store, data, seconds)
            if extractor.settings.config.data.folds is not None:
                with timed(seconds, "features"):
                    split.held_out = as_held_out(extractor, store, split.parts["train"])
            for part in split.parts.values():
                _check_unchanged(part.samples)
            split.cache_bytes = store.size()
            return split
        except Interrupted as exc:
            if store.writable and not folder.warning:
                exc.remedy = "the features so far are in the cache; run the same command again to continue"
            raise
        finally:
            for warning in store.warnings:
                observer.warn(warning)


def _features(
    extractor: Extractor, store: FeatureStore, data: Dataset, seconds: dict[str, float], thumbnails: bool = False
) -> dict[str, Features]:
    with timed(seconds, "features"):
        return {split: extractor(store, split, samples, thumbnails) for split, samples in data.splits.items()}


def _with_near_duplicates(
    extractor: Extractor, store: FeatureStore, data: Dataset, seconds: dict[str, float]
) -> _Split:
    """Where the user chose the validation photos, all features come first; else view 0 alone, which decides the split.

    Raises `DataError` for photos that cannot be decoded, before more is computed.
    """
    observer, settings = extractor.observer, extractor.settings
    if data.val_split is None:
        parts = _features(extractor, store, data, seconds, thumbnails=True)
    else:
        with timed(seconds, "features"):
            parts = extractor.first_views(store, data)
        bad = [photo for part in parts.values() for photo in part.bad]
        data = dataset.without(data, bad)
        scan.refuse_bad(data.bad, data.photos, settings.config.data.on_bad_image)
        dataset.refuse_empty(data.classes, data.splits, data.bad)
    with timed(seconds, "near-duplicates"):
        linked = near.link(parts, extractor.first_request, store, settings, observer)
    data = near.keep_together(linked, data, settings.photos.trained_on, observer)
    if data.val_split is not None:
        first = {split: parts[split] for split in ("train", "val")}
        with timed(seconds, "features"):
            for split, own in first.items():
                # In one precision, what moved to the other side is known, too.
                known = list(first.values()) if extractor.precision == "float32" else [own]
                part = extractor(store, split, data.splits[split], first=known)
                parts[split] = replace(
                    part,
                    computed=part.computed + own.computed,
                    cached=part.cached + own.cached,
                )
    parts = {split: near.regrouped(part, data) for split, part in parts.items()}
    leaks = linked.leaks(data)
    near.warn_of_leaks(leaks, observer)
    return _Split(data, parts, leaks)


def as_held_out(extractor: Extractor, store: FeatureStore, train: Features) -> Features:
    """View 0 of the training photos in float32, as a prediction sees them."""
    if extractor.precision == "float32":
        return replace(train, array=train.array[:, :1], computed=0, cached=0)
    found = extractor(store, "train in float32", train.samples)
    scan.refuse_bad(found.bad, len(train.samples), "error")
    return found


def _check_unchanged(samples: Sequence[Sample]) -> None:
    """Raise `ChangedPhoto` if one of a few of `samples` is not the one that was indexed.

    Photos whose features are all in the cache are not read otherwise, and an index that is out of date would go unseen.
    Stores tell whether an object was written again.
    """
    samples = [sample for sample in samples if not isinstance(sample.path, Address)]
    for i in evenly_spread(len(samples), _CHECKED_PHOTOS):
        with contextlib.suppress(BadImage):  # gone since it was indexed, or unreadable: its features are known
            scan.read_sample(samples[i])


def _refuse_bad(data: Dataset, parts: dict[str, Features], on_bad_image: str, observer: Observer) -> None:
    """Raise `DataError` for the photos that cannot be used, unless they may be skipped; then warn of them."""
    bad = [*data.bad, *(photo for part in parts.values() for photo in part.bad)]
    scan.refuse_bad(bad, data.photos, on_bad_image)
    dataset.refuse_empty(data.classes, {split: part.samples for split, part in parts.items()}, bad)
    for photo in bad[:_SHOWN]:
        observer.warn(f"skipped {photo.path}: {photo.reason}")
    if len(bad) > _SHOWN:
        observer.warn(f"skipped {len(bad) - _SHOWN} more photos; run.json will list all")


def _refuse_bad_headers(settings: Settings, data: Dataset, observer: Observer) -> None:
    """Raise `DataError` if the headers alone stop the training: then with what decoding finds, all at once."""
    on_bad_image = settings.config.data.on_bad_image
    if not scan.may_skip(data.bad, data.photos, on_bad_image):
        if dataset.in_store(settings.photos):  # what could be read was decoded then
            scan.refuse_bad(data.bad, data.photos, on_bad_image)
        observer.note(f"{counted(len(data.bad), 'photo')} cannot be used; decoding the others, to find all such photos")
        found = decode_all(data, settings.image, settings.workers, observer)
        scan.refuse_bad([*data.bad, *found], data.photos, on_bad_image)
    dataset.refuse_empty(data.classes, data.splits, data.bad)


def decode_all(data: Dataset, image: ImageSettings, workers: int, observer: Observer) -> list[BadPhoto]:
    """Decode every photo of `data` and return those that cannot be."""

    def decode(sample: Sample) -> BadPhoto | None:
        try:
            scan.decode_sample(sample, image)
        except BadImage as exc:
            return BadPhoto(sample.path, sample.name, exc.reason)
        return None

    bad = []
    samples = [sample for part in data.splits.values() for sample in part]
    with observer.stage("decoding", len(samples)) as advance:
        for fault in ordered_map(decode, samples, places.threads(workers, (sample.path for sample in samples))):
            advance(1)
            if fault is not None:
                bad.append(fault)
    return bad


def index(
    photos: DataSettings,
    folder: CacheFolder,
    observer: Observer,
    how: "Indexing | None" = None,
) -> Dataset:
    """The photos after preflight (headers and digests); what the user should know is noted."""
    how = how or Indexing()
    with (
        observer.stage("preflight", None) as advance,
        DigestCache(folder.path, folder.writable, how.fresh) as cache,
        contextlib.nullcontext() if how.first is None else how.first as look,
    ):
        data = dataset.load(photos, cache, advance, how.contradictions, look)
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


def warn_of_series(data: Dataset, max_pixels: int, observer: Observer) -> None:
    """Warn that photos taken at nearly the same time are in train and in val, if no groups are known or proposed."""
    if any(isinstance(sample.path, Address) for part in data.splits.values() for sample in part):
        return  # every photo would have to be read once more
    if data.proposal is not None or any(sample.group for part in data.splits.values() for sample in part):
        return
    paths = {split: [sample.path for sample in part] for split, part in data.splits.items()}
    if folds := max((sample.fold or 0 for sample in data.train), default=0):
        paths = {f"fold {i}": [s.path for s in data.train if s.fold == i] for i in range(1, folds + 1)}
    if finding := groups.series(paths, max_pixels):
        observer.warn(f"{finding}; if they show the same thing, name the groups in the column `group` of a table")


def evenly_spread(count: int, most: int) -> NDArray[np.intp]:
    """At most `most` of the numbers below `count`, from the first to the last of them."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.intp)
