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

from finetune_cli.cache.features import FeatureStore
from finetune_cli.devices import Precision
from finetune_cli.errors import BadImage, StorageError
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import decode, scan
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance

_STORE_ROWS = 1024


class RuntimeFactory(Protocol):
    """Compiles the backbone; called only if the cache lacks something."""

    def __call__(self, precision: Precision) -> Runtime:
        """The backbone as a runtime of that precision."""
        ...


@dataclass(frozen=True)
class Request:
    """What the features are computed from: everything that their values depend on is part of the cache key."""

    settings: ImageSettings
    fingerprint: str
    precision: Precision
    augmenter: Augmenter | None = None

    @property
    def views(self) -> int:
        """Views per photo, view 0 included."""
        return self.augmenter.views if self.augmenter is not None else 1

    def key(self, digest: str, view: int) -> bytes:
        """The cache key, 32 bytes, of view `view` of the photo whose SHA-256 is `digest`."""
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

    `computed` and `cached` count views; copies of a photo count once.
    """

    array: NDArray[np.float32]
    samples: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...]
    computed: int
    cached: int


@dataclass(frozen=True)
class Resources:
    """What a feature pass works with; none of it changes a value.

    make_runtime: called only if the cache lacks something. scratch: the folder of the array. workers: threads that
    decode and infer. batch_size: views that a thread infers at once.
    """

    store: FeatureStore
    make_runtime: RuntimeFactory
    scratch: Path
    workers: int
    batch_size: int


def extract(
    samples: Sequence[Sample], request: Request, width: int, resources: Resources, advance: Advance
) -> Features:
    """The features of all views of `samples`, `float32 (len(samples), views, width)`.

    What the cache holds is not computed. A photo that cannot be decoded is left out and listed in `bad`. `advance`
    counts photos. Raises `StorageError` when the scratch folder has no room for the array.
    """
    scratch, store = resources.scratch, resources.store
    array = scratch_array(scratch, (len(samples), request.views, width))
    originals: dict[str, int] = {}  # copies of a photo share its digest, and so its features
    for i, sample in enumerate(samples):
        originals.setdefault(sample.digest, i)
    missing = _from_store({i: samples[i].digest for i in originals.values()}, request, store, array, advance)
    computed = sum(map(len, missing.values()))
    bad: dict[int, BadPhoto] = {}
    if missing:
        runtime = resources.make_runtime(request.precision)
        work = ordered_map(worker(samples, request, runtime), chunks(missing, resources.batch_size), resources.workers)
        waiting: list[tuple[bytes, NDArray[np.float32]]] = []
        try:
            for rows, refused in work:
                for (i, view), row in rows.items():
                    array[i, view] = row
                    waiting.append((request.key(samples[i].digest, view), row))
                bad |= refused
                advance(len({i for i, _view in rows} | refused.keys()))
                if len(waiting) >= _STORE_ROWS:
                    store.put(waiting)
                    waiting = []
                    release(array)
        finally:  # an interrupted pass resumes where it stopped
            store.put(waiting)
    computed -= sum(len(missing[i]) for i in bad)
    cached = len(originals) * request.views - sum(map(len, missing.values()))
    _fill_copies(samples, originals, array, bad)
    advance(len(samples) - len(originals))
    kept = [i for i in range(len(samples)) if i not in bad]
    if bad:
        array = _without(array, kept, scratch)
    return Features(array, tuple(samples[i] for i in kept), tuple(bad.values()), computed, cached)


def _from_store(
    digests: dict[int, str], request: Request, store: FeatureStore, array: NDArray[np.float32], advance: Advance
) -> dict[int, list[int]]:
    """Fill the rows of `array` for the photos `digests` (row -> SHA-256) from the cache; return the missing views."""
    missing: dict[int, list[int]] = {}
    step = _STORE_ROWS // request.views or 1
    rows = list(digests)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        keys = {request.key(digests[i], view): (i, view) for i in block for view in range(request.views)}
        found = store.get(list(keys))
        for key, (i, view) in keys.items():
            row = found.get(key)
            if row is not None and row.shape == array.shape[2:]:
                array[i, view] = row
            else:
                missing.setdefault(i, []).append(view)
        release(array)
        advance(sum(i not in missing for i in block))
    return missing


def _fill_copies(
    samples: Sequence[Sample], originals: dict[str, int], array: NDArray[np.float32], bad: dict[int, BadPhoto]
) -> None:
    """Give copies of a photo the rows of the one that was computed, or list them as bad if it is."""
    for i, sample in enumerate(samples):
        original = originals[sample.digest]
        if original == i:
            continue
        if original in bad:
            bad[i] = BadPhoto(sample.path, sample.name, bad[original].reason)
        else:
            array[i] = array[original]


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


def chunks(missing: Mapping[int, Sequence[int]], batch_size: int) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Whole photos, each with its views in `missing`, as many as make up about `batch_size` views."""
    chunk: list[tuple[int, Sequence[int]]] = []
    size = 0
    for item in missing.items():
        chunk.append(item)
        size += len(item[1])
        if size >= batch_size:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_Rows = dict[tuple[int, int], NDArray[np.float32]]


def worker(
    samples: Sequence[Sample], request: Request, runtime: Runtime
) -> Callable[[list[tuple[int, Sequence[int]]]], tuple[_Rows, dict[int, BadPhoto]]]:
    """What a thread does with some photos, of which it gets (index, views): read, decode, warp, infer.

    It returns what the runtime gives for each (index, view), and the photos that cannot be decoded.
    """

    def work(chunk: list[tuple[int, Sequence[int]]]) -> tuple[_Rows, dict[int, BadPhoto]]:
        photos: list[NDArray[np.uint8]] = []
        positions: list[tuple[int, int]] = []
        bad: dict[int, BadPhoto] = {}
        for i, views in chunk:
            sample = samples[i]
            try:
                photo = scan.decode_sample(sample, request.settings)
            except BadImage as exc:
                bad[i] = BadPhoto(sample.path, sample.name, exc.reason)
                continue
            for view in views:
                changed = photo
                if view and request.augmenter is not None:
                    changed = request.augmenter.view(photo, sample.digest, view)
                photos.append(changed)
                positions.append((i, view))
        if not photos:
            return {}, bad
        return dict(zip(positions, runtime.infer(np.stack(photos)), strict=True)), bad

    return work
