"""`finetune doctor`: a config in, findings about its photos out. Nothing is trained, and no photo is changed.

All splits are examined together, by what a training computes anyway: digests, view 0 of every photo, near-duplicates.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.schema import Config
from finetune_cli.doctor import labels, outliers, quality
from finetune_cli.doctor.quality import Measured
from finetune_cli.engines.opening import opened
from finetune_cli.errors import BadImage
from finetune_cli.head.data import HeadData
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import dataset, decode, fixes, scan, split
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.listing import byte_order
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.places import Place
from finetune_cli.progress import Observer
from finetune_cli.training import near, prepare
from finetune_cli.training.extract import Features
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.near import Linked
from finetune_cli.training.requirements import check_settings
from finetune_cli.training.settings import Settings

_ORDER = {"train": 0, "val": 1, "test": 2}
PROBLEMS = ("duplicate", "near-duplicate", "label", "outlier", "quality")


@dataclass(frozen=True)
class Finding:
    """What is wrong with `photo`; `path` is its name in fixes.csv. `other`: the photo that it is compared with.

    `serious`: near certain, or it makes numbers wrong: a label that is wrong with high confidence, copies under two
    labels or in two splits.
    """

    problem: str
    photo: Sample
    path: str
    evidence: str
    suggestion: str
    serious: bool = False
    other: Sample | None = None


@dataclass(frozen=True)
class Examination:
    """`bad`: photos that cannot be decoded. `large`: sizes of groups of near-duplicates that are too large to use."""

    data: Dataset
    settings: Settings
    findings: tuple[Finding, ...]
    bad: tuple[BadPhoto, ...]
    large: tuple[int, ...]

    def count(self, problem: str, serious: bool = False) -> int:
        """How many photos have this problem; with `serious`, only those of serious findings."""
        return len({each.path for each in self.findings if each.problem == problem and (each.serious or not serious)})


def examine(config: Config, observer: Observer) -> Examination:
    """Examine all photos of `config`. Raises what a training raises before it fits the head, but not for bad photos."""
    settings = check_settings(config)
    # Which photos may validate does not matter here, and must not stop the examination.
    settings = replace(settings, photos=replace(settings.photos, trained_on=frozenset()))
    context = contextlib.nullcontext() if settings.builds_backbone else prepare.conversion_of(settings)
    runtime = config.runtime
    with context as conversion, opened(runtime.engine, runtime.ray_address, runtime.workers, observer) as engine:

        @functools.cache
        def extractor() -> Extractor:
            return prepare.make_extractor(settings, observer, conversion, engine)

        def work(data: Dataset) -> Examination:
            return _examined(data, settings, extractor(), observer)

        first = None
        if dataset.in_store(settings.photos):
            first = prepare.FirstLook(extractor(), lambda split, _made: extractor().first_request(split), {})
        return prepare.with_photos(settings, observer, work, {}, prepare.Indexing(contradictions=True, first=first))


def _examined(data: Dataset, settings: Settings, extractor: Extractor, observer: Observer) -> Examination:
    with FeatureStore(settings.cache.path, settings.cache.writable, extractor.prove) as store:
        parts = extractor.first_views(store, data)
        linked = near.link(parts, extractor.first_request, store, settings, observer)
    for warning in store.warnings:
        observer.warn(warning)
    data = dataset.without(data, [photo for part in parts.values() for photo in part.bad])
    dataset.refuse_empty(data.classes, data.splits, data.bad)
    names = _names(data)
    samples = sorted((sample for part in data.splits.values() for sample in part), key=names.order)
    found = [*_copies(samples, names), *_near_duplicates(linked, names)]
    found += _judged(parts, linked, settings, names, observer)
    found += _quality(samples, settings, names, observer)
    return Examination(data, settings, tuple(found), data.bad, tuple(map(len, linked.found.large)))


@dataclass(frozen=True)
class _Names:
    """What findings call photos, classes and splits."""

    classes: tuple[str, ...]
    split_of: Mapping[Place, str]
    root: Place

    def path(self, sample: Sample) -> str:
        """The photo's name in fixes.csv."""
        return fixes.name_below(self.root, sample.path)

    def split(self, sample: Sample) -> str:
        """train, val or test; photos of an automatic split are all photos of train."""
        return self.split_of[sample.path]

    def label(self, sample: Sample) -> str:
        """The name of its class."""
        return self.classes[sample.label]

    def order(self, sample: Sample) -> tuple[int, bytes]:
        """Photos are in the order of the splits, and then of their names."""
        return _ORDER[self.split(sample)], byte_order(self.path(sample))

    def pair(self, problem: str, photo: Sample, other: Sample, relation: str) -> Finding:
        """A finding about two photos that show the same picture."""
        evidence, suggestion = f"{relation} {self.path(other)}", "drop, or keep: they stay on one side of the split"
        serious = True
        if photo.label != other.label:
            evidence += f", which is {self.label(other)}; this one is {self.label(photo)}"
            suggestion = f"relabel: {self.label(other)}, or drop; one of the two labels is wrong"
        elif self.split(photo) != self.split(other):
            evidence += f", in {self.split(other)}; this one is in {self.split(photo)}"
            suggestion = "drop one of the two: the accuracy looks better than it is"
        else:
            serious = False
        return Finding(problem, photo, self.path(photo), evidence, suggestion, serious, other)


def _names(data: Dataset) -> _Names:
    merged = {"val": "train"} if data.val_split is not None else {}
    split_of = {s.path: merged.get(split, split) for split, part in data.splits.items() for s in part}
    return _Names(data.classes, split_of, fixes.data_root(data.roots.values()))


def _copies(samples: Sequence[Sample], names: _Names) -> Iterator[Finding]:
    """Every photo that is byte for byte an earlier one."""
    first: dict[str, Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.digest, sample)
        if other is not sample:
            yield names.pair("duplicate", sample, other, "an exact copy of")


def _near_duplicates(linked: Linked, names: _Names) -> list[Finding]:
    """Of each linked photo, the strongest link to an earlier one; those across classes and splits all."""
    found, told = [], set()
    for link in linked.found.links:
        other, photo = sorted((linked.photos[link.first], linked.photos[link.second]), key=names.order)
        finding = names.pair("near-duplicate", photo, other, f"the same picture (score {link.score:.2f}) as")
        if finding.serious or photo.digest not in told:
            told.add(photo.digest)
            found.append(finding)
    return sorted(found, key=lambda finding: not finding.serious)


def _judged(
    parts: Mapping[str, Features], linked: Linked, settings: Settings, names: _Names, observer: Observer
) -> Iterator[Finding]:
    """Labels in doubt, and outliers; of copies, the first one is examined."""
    row_of = {sample.digest: part.array[i, 0] for part in parts.values() for i, sample in enumerate(part.samples)}
    rows = np.stack([row_of[sample.digest] for sample in linked.photos])
    together = split.merged(
        [(sample.digest, sample.group) for sample in linked.photos],
        [{linked.photos[i].digest for i in group} for group in (*linked.found.groups, *linked.found.large)],
    )
    groups = group_numbers((group, sample.digest) for group, sample in zip(together, linked.photos, strict=True))
    label_of = np.array([sample.label for sample in linked.photos], np.int64)
    data = HeadData.of(rows, label_of, len(names.classes), groups=groups)
    with observer.stage("labels by cross-validation", labels.FITS, "fits") as advance:
        doubts = labels.doubts(data, settings.workers, settings.config.training.seed, advance)
    for doubt in doubts:
        photo, suggested = linked.photos[doubt.photo], names.classes[doubt.suggested]
        evidence = (
            f"{'high' if doubt.high else 'look'}: labelled {names.label(photo)}, probability {doubt.probability:.2f}; "
            f"{suggested} {doubt.suggested_probability:.2f}, and {doubt.neighbours} of {doubt.of} nearest photos"
        )
        yield Finding("label", photo, names.path(photo), evidence, f"relabel: {suggested}", doubt.high)
    for i, cosine, usual in outliers.outliers(rows, settings.workers):
        photo = linked.photos[i]
        evidence = f"unlike the others: cosine {cosine:.2f} to its tenth nearest photo, where {usual:.2f} is usual"
        yield Finding("outlier", photo, names.path(photo), evidence, "drop, if it shows none of the classes")


def _quality(samples: Sequence[Sample], settings: Settings, names: _Names, observer: Observer) -> Iterator[Finding]:
    """Technical trouble, and photos that cannot be read any more."""

    def measured(sample: Sample) -> Measured | None:
        try:
            content = scan.read_sample(sample)
            header = decode.read_header(content, settings.image.max_pixels)
            return quality.measure(decode.decode(content, settings.image), header.width, header.height)
        except BadImage:
            return None

    found: list[tuple[Sample, Measured]] = []
    with observer.stage("technical trouble", len(samples)) as advance:
        for sample, photo in zip(samples, ordered_map(measured, samples, settings.workers), strict=True):
            advance(1)
            if photo is not None:
                found.append((sample, photo))
    usual = float(np.median([photo.sharpness for _sample, photo in found])) if found else 0.0
    for sample, photo in found:
        for fault in quality.faults(photo, usual):
            yield Finding("quality", sample, names.path(sample), fault, "drop, if nothing can be seen on it")
