"""Photos in, `float32 (photos, views, D)` features out, through the cache, with decoding and inference overlapping.

Each worker thread takes a few photos and carries them all the way: read and decode, warp the views that the cache
lacks, run the backbone on one core. There are as many workers as cores, so no core waits for another stage, nothing
is queued between stages, and memory is bounded by the few photos in flight. The finished array lives in a scratch
file that the operating system pages in and out, so it may be larger than memory.
"""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_cli import places
from finetune_cli.cache.digests import Facts
from finetune_cli.cache.features import FeatureStore
from finetune_cli.devices import Precision
from finetune_cli.duplicates import thumbnails
from finetune_cli.engines.engine import Engine
from finetune_cli.errors import BadImage, StorageError
from finetune_cli.inference import runtimes
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.photos import decode, probe, scan
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.listing import ListedPhoto
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance
from finetune_cli.training import first_look

_STORE_ROWS = 1024
THUMBNAIL = -1  # stands where the number of a view stands
FACTS = -2  # so does this, for photos in a store that were not read yet, see `first_look.py`


class RuntimeFactory(Protocol):
    """Compiles the backbone; called only if the cache lacks something."""

    def __call__(self, precision: Precision) -> Runtime:
        """The backbone as a runtime of that precision."""
        ...


class BackboneFiles(Protocol):
    """The backbone for other processes; called only if the cache lacks something."""

    def __call__(self) -> tuple[bytes, bytes]:
        """The two files of its OpenVINO form: the graph and the weights."""
        ...


@dataclass(frozen=True)
class FeatureRequest:
    """What the features are computed from: everything that their values depend on is part of the cache key.

    `thumbnails`: photos get a thumbnail, too, see `duplicates/thumbnails.py`; of the features, nothing depends on it.
    """

    settings: ImageSettings
    fingerprint: str
    precision: Precision
    augmenter: Augmenter | None = None
    thumbnails: bool = False

    @property
    def views(self) -> int:
        """Views per photo, view 0 included."""
        return self.augmenter.views if self.augmenter is not None else 1

    def key(self, digest: str, view: int) -> bytes:
        """The cache key, 32 bytes, of view `view`, or `THUMBNAIL`, of the photo whose SHA-256 is `digest`."""
        if view == THUMBNAIL:
            return thumbnails.key(digest, self.settings)
        augmentation = self.augmenter.key(view) if self.augmenter is not None else ""
        parts = (
            digest,
            decode.decoder(),
            f"{self.settings.size} {self.settings.resize}",
            augmentation,
            self.fingerprint,
            self.precision,
        )
        return hashlib.sha256("\0".join(parts).encode()).digest()


@dataclass(frozen=True)
class Features:
    """`array[i]` belongs to ``samples[i]``; `bad` is what the decoder refused.

    `computed` and `cached` count views; copies of a photo count once. `thumbnails`: ``uint8 (n, SIDE, SIDE)``, or
    empty if they were not asked for.
    """

    array: NDArray[np.float32]
    samples: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...]
    computed: int
    cached: int
    thumbnails: NDArray[np.uint8]


@dataclass(frozen=True)
class Resources:
    """What a feature pass works with; none of it changes a value.

    make_runtime: called only if the cache lacks something. scratch: the folder of the array. engine: what decodes and
    infers. batch_size: views that a thread infers at once. first: view 0 of some of the photos, from earlier passes of
    the same precision. files: the backbone for an engine that uses other processes.
    """

    store: FeatureStore
    make_runtime: RuntimeFactory
    scratch: Path
    engine: Engine
    batch_size: int
    first: Sequence[Features] = ()
    files: BackboneFiles | None = None


def extract(
    samples: Sequence[Sample], request: FeatureRequest, width: int, resources: Resources, advance: Advance
) -> Features:
    """The features of all views of `samples`, `float32 (len(samples), views, width)`.

    What the cache or `resources.first` holds is not computed. A photo that cannot be decoded is left out and listed in
    `bad`. `advance` counts photos. Raises `StorageError` when the scratch folder has no room for the array, and what
    `FeatureStore.put` raises.
    """
    scratch, store = resources.scratch, resources.store
    rows = _Rows(samples, request, width, scratch)
    originals: dict[str, int] = {}  # copies of a photo share its digest, and so its features
    for i, sample in enumerate(samples):
        originals.setdefault(sample.digest, i)
    for first in resources.first:
        rows.take_first(first)
    missing, found = _from_store(list(originals.values()), rows, store, advance)
    wanted = sum(view != THUMBNAIL for views in missing.values() for view in views)
    bad: dict[int, BadPhoto] = {}
    if missing:
        task = FeatureTask(request, resources.make_runtime, resources.files)
        stored = places.stored(sample.path for sample in samples)
        work = resources.engine.map(task, chunks(samples, missing, resources.batch_size), stored)
        waiting: list[tuple[bytes, NDArray[np.float32]]] = []
        try:
            for computed, refused in work:
                for (i, view), row in computed.items():
                    rows.accept(i, view, row)
                    waiting.append((rows.key(i, view), row))
                bad |= refused
                advance(len({i for i, _view in computed} | refused.keys()))
                if len(waiting) >= _STORE_ROWS:
                    store.put(waiting)
                    waiting = []
                    release(rows.array)
        finally:  # an interrupted pass resumes where it stopped
            store.put(waiting)
    unusable = sum(view != THUMBNAIL for i in bad for view in missing[i])
    _fill_copies(samples, originals, rows, bad)
    advance(len(samples) - len(originals))
    kept = [i for i in range(len(samples)) if i not in bad]
    array, small = rows.array, rows.thumbnails
    if bad:
        array = _without(array, kept, scratch)
        small = small[kept] if request.thumbnails else small
    return Features(
        array=array,
        samples=tuple(samples[i] for i in kept),
        bad=tuple(bad.values()),
        computed=wanted - unusable,
        cached=found,
        thumbnails=small,
    )


def look(
    photos: Sequence[ListedPhoto], request: FeatureRequest, resources: Resources
) -> Iterator[tuple[Facts | str, str | None]]:
    """Read `photos` in a store, once, for their facts and for what `request` asks; the features go into the cache.

    Yields the facts of each photo, or the reason why it is bad, and the version that was read; in order. What was
    yielded is stored even when the caller stops early. Raises `StorageError`, and what `prove` raises.
    """
    samples = [Sample(places.place(photo.path), photo.name, 0, "") for photo in photos]
    views = [FACTS, *range(THUMBNAIL if request.thumbnails else 0, request.views)]
    wanted = dict.fromkeys(range(len(samples)), views)
    task = FeatureTask(request, resources.make_runtime, resources.files)
    waiting: list[tuple[bytes, NDArray[np.float32]]] = []
    try:
        for computed, refused in resources.engine.map(task, chunks(samples, wanted, resources.batch_size), stored=True):
            for i in sorted({i for i, _view in computed} | refused.keys()):
                if i in refused:
                    yield refused[i].reason, None
                    continue
                facts, version = first_look.unpacked(computed[i, FACTS])
                rows = ((view, computed[i, view]) for view in views if view != FACTS)
                waiting += [(request.key(facts.digest, view), row) for view, row in rows]
                yield facts, version
            if len(waiting) >= _STORE_ROWS:
                resources.store.put(waiting)
                waiting = []
    finally:
        resources.store.put(waiting)


class _Rows:
    """Where the features, and perhaps the thumbnails, of `samples` are collected."""

    def __init__(self, samples: Sequence[Sample], request: FeatureRequest, width: int, scratch: Path) -> None:
        self.array = scratch_array(scratch, (len(samples), request.views, width))
        self.thumbnails = np.zeros((len(samples) * request.thumbnails, thumbnails.SIDE, thumbnails.SIDE), np.uint8)
        self.views = range(THUMBNAIL if request.thumbnails else 0, request.views)
        self.taken: set[int] = set()  # photos whose view 0 is known
        self._digests = [sample.digest for sample in samples]
        self._request = request

    def take_first(self, first: Features) -> None:
        """Take view 0 of the photos in `first`."""
        known = {sample.digest: i for i, sample in enumerate(first.samples)}
        for i, digest in enumerate(self._digests):
            if digest in known:
                self.array[i, 0] = first.array[known[digest], 0]
                self.taken.add(i)

    def key(self, i: int, view: int) -> bytes:
        """The cache key of a row."""
        return self._request.key(self._digests[i], view)

    def accept(self, i: int, view: int, row: NDArray[np.float32] | None) -> bool:
        """Take a row, unless it is missing or has another shape; returns whether it was taken."""
        if view == THUMBNAIL:
            picture = thumbnails.unpacked(row)
            if picture is None:
                return False
            self.thumbnails[i] = picture
            return True
        if row is None or row.shape != self.array.shape[2:]:
            return False
        self.array[i, view] = row
        return True

    def copy(self, source: int, target: int) -> None:
        """Give one photo what another has."""
        self.array[target] = self.array[source]
        if len(self.thumbnails):
            self.thumbnails[target] = self.thumbnails[source]


def _from_store(
    photos: Sequence[int], rows: _Rows, store: FeatureStore, advance: Advance
) -> tuple[dict[int, list[int]], int]:
    """Fill the rows of `photos`, by their numbers, from the cache; return what is missing, and how many were there."""
    missing: dict[int, list[int]] = {}
    count = 0
    step = _STORE_ROWS // len(rows.views) or 1
    for start in range(0, len(photos), step):
        block = photos[start : start + step]
        keys = {rows.key(i, view): (i, view) for i in block for view in rows.views if view or i not in rows.taken}
        found = store.get(list(keys))
        for key, (i, view) in keys.items():
            if not rows.accept(i, view, found.get(key)):
                missing.setdefault(i, []).append(view)
            elif view != THUMBNAIL:
                count += 1
        release(rows.array)
        advance(sum(i not in missing for i in block))
    return missing, count


def _fill_copies(samples: Sequence[Sample], originals: dict[str, int], rows: _Rows, bad: dict[int, BadPhoto]) -> None:
    """Give copies of a photo the rows of the one that was computed, or list them as bad if it is."""
    for i, sample in enumerate(samples):
        original = originals[sample.digest]
        if original == i:
            continue
        if original in bad:
            bad[i] = BadPhoto(sample.path, sample.name, bad[original].reason)
        else:
            rows.copy(original, i)


def scratch_array(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A zeroed `float32` array in an unnamed file in `folder`; the space is given back when the array is gone.

    Where the system can, the space is taken at once, so that a full disk is an error here and not a crash (SIGBUS)
    later. Raises `StorageError`.
    """
    size = max(1, 4 * int(np.prod(shape)))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            if 0 in shape:
                return np.zeros(shape, np.float32)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as exc:
        raise StorageError(
            f"{folder} has no room for {size / 1e6:.0f} MB of features: {exc.strerror}",
            "free some space, or set runtime.cache_dir to a larger disk",
        ) from exc


def release(array: NDArray[np.float32]) -> None:
    """Give the memory of a `scratch_array` back; its numbers stay in the file, from where the next use reads them."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _without(array: NDArray[np.float32], kept: list[int], folder: Path) -> NDArray[np.float32]:
    smaller = scratch_array(folder, (len(kept), *array.shape[1:]))
    for target, source in enumerate(kept):
        smaller[target] = array[source]
    return smaller


# Some photos that are processed together: each with its number and the views that are wanted of it.
Chunk = list[tuple[int, Sample, Sequence[int]]]
_Computed = dict[tuple[int, int], NDArray[np.float32]]
# What the runtime gives for each (number, view), and the photos that cannot be decoded.
Computed = tuple[_Computed, dict[int, BadPhoto]]


def chunks(samples: Sequence[Sample], missing: Mapping[int, Sequence[int]], batch_size: int) -> Iterator[Chunk]:
    """Whole photos, each with its views in `missing`, as many as make up about `batch_size` views."""
    chunk: Chunk = []
    size = 0
    for i, views in missing.items():
        chunk.append((i, samples[i], views))
        size += len(views)
        if size >= batch_size:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class FeatureWork:
    """What is done with some photos: read, decode, warp, infer; in every thread and every worker.

    exact: the backbone in float32, for the probe.
    """

    request: FeatureRequest
    runtime: Runtime
    exact: Callable[[], Runtime]

    def __call__(self, chunk: Chunk) -> Computed:
        """What the runtime gives for each (number, view) in `chunk`, and the photos that cannot be decoded."""
        request = self.request
        photos: list[NDArray[np.uint8]] = []
        positions: list[tuple[int, int]] = []
        computed: _Computed = {}
        bad: dict[int, BadPhoto] = {}
        for i, sample, views in chunk:
            try:
                if FACTS in views:
                    digest, photo, computed[i, FACTS] = first_look.read(sample, request.settings)
                else:
                    digest, photo = sample.digest, scan.decode_sample(sample, request.settings)
            except BadImage as exc:
                bad[i] = BadPhoto(sample.path, sample.name, exc.reason)
                continue
            for view in views:
                if view == FACTS:
                    continue
                if view == THUMBNAIL:
                    computed[i, view] = thumbnails.packed(thumbnails.thumbnail(photo))
                    continue
                changed = photo
                if view and request.augmenter is not None:
                    changed = request.augmenter.view(photo, digest, view)
                photos.append(changed)
                positions.append((i, view))
        if photos:
            computed.update(zip(positions, self.runtime.infer(np.stack(photos)), strict=True))
        return computed, bad

    def probe(self) -> dict[str, str]:
        """See `engine.Work.probe`."""
        photo = decode.decode(probe.photo(), self.request.settings)
        views = [photo]
        if self.request.augmenter is not None:
            views += [self.request.augmenter.view(photo, "probe", view) for view in range(1, self.request.views)]
        found = {"pixels": probe.digest(photo), "augmented pixels": probe.digest(np.stack(views))}
        if self.request.thumbnails:
            found["thumbnails"] = probe.digest(thumbnails.packed(thumbnails.thumbnail(photo)))
        for runtime in (self.exact(), self.runtime):
            found[f"{runtime.precision} features"] = probe.digest(runtime.infer(np.stack(views[:4])))
        return found


_GRAPH, _WEIGHTS = "backbone.xml", "backbone.bin"


@dataclass(frozen=True)
class FeatureTask:
    """The features of photos, for any engine; see `engine.Task`."""

    request: FeatureRequest
    make_runtime: RuntimeFactory
    backbone: BackboneFiles | None = None

    def work(self) -> FeatureWork:
        """For this process."""
        make = self.make_runtime
        return FeatureWork(self.request, make(self.request.precision), lambda: make("float32"))

    def recipe(self) -> "FeatureRecipe":
        """For other processes."""
        return FeatureRecipe(self.request)

    def files(self) -> dict[str, bytes]:
        """The backbone."""
        assert self.backbone is not None
        return dict(zip((_GRAPH, _WEIGHTS), self.backbone(), strict=True))

    def names(self, item: Chunk) -> list[str]:
        """The paths of photos."""
        return [str(sample.path) for _i, sample, _views in item]


@dataclass(frozen=True)
class FeatureRecipe:
    """Makes the work of a `FeatureTask` of the backbone's files, on one core."""

    request: FeatureRequest
    # Two processors with bfloat16 may round otherwise, as a second training on another machine would.
    tolerated: tuple[str, ...] = ("bfloat16 features",)

    def work(self, files: Mapping[str, bytes]) -> FeatureWork:
        """See `engine.Recipe.work`."""
        precision = self.request.precision
        if precision == "bfloat16":
            runtimes.training_precision("cpu", precision)
        model = runtimes.parse_ir(files[_GRAPH], files[_WEIGHTS], Path(_GRAPH))

        def compiled(wanted: Precision) -> Runtime:
            return runtimes.OpenVinoRuntime(model.clone(), wanted, 1)

        return FeatureWork(self.request, compiled(precision), lambda: compiled("float32"))
