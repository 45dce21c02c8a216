"""The activations at the cut: computed once by the fast runtime into a scratch file, or again for every batch.

Photos -> decode -> view -> lower part -> ``(H, W, C)`` a view. The scratch file is unnamed, so its space is free again
when the process ends in whatever way. It is read by system calls and not mapped: memory does not grow with its size,
and a file that another program cuts short is an error and not a crash. Every row carries a CRC.
"""

import math
import os
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_cli.devices import Device, Precision
from finetune_cli.errors import DataError, StorageError
from finetune_cli.files import human_bytes
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.parallel import ordered_map
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Advance
from finetune_cli.training import extract
from finetune_cli.training.extract import FeatureRequest

Rows = NDArray[np.float32]
_FLOAT16_LARGEST = 65504.0


class Source(Protocol):
    """Where a training gets its activations: ``shape`` is (photos, views, H, W, C)."""

    shape: tuple[int, ...]

    def batch(self, photos: NDArray[np.intp], views: NDArray[np.intp]) -> Rows:
        """``float32 (n, H, W, C)`` of the given view of each given photo."""
        ...


class Pixels:
    """A runtime that gives the photos themselves: the lower part when the cut is at the pixels."""

    device: Device = "cpu"
    precision: Precision = "float32"

    def infer(self, photos: NDArray[np.uint8]) -> Rows:
        """``uint8 (n, H, W, 3)`` -> the same numbers in float32."""
        return photos.astype(np.float32)


class ScratchFile:
    """Rows of one shape in an unnamed file in `folder`; `shape` is (photos, views, H, W, C).

    The space is taken at once where the system can do that. dtype: float16, float32, or uint8 for pixels; float16 has
    11 significant bits, more than the bfloat16 in which training features may be computed, and what lies beyond its
    largest number becomes that. Raises `StorageError` when the disk is full.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.shape, self._dtype, self._folder = shape, np.dtype(dtype), folder
        self._row = self._dtype.itemsize * math.prod(shape[2:])
        self._checksums = np.zeros(shape[:2], np.uint32)
        self._lock = threading.Lock()
        size = row_bytes(shape, dtype) * shape[0] * shape[1]
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this object
            weakref.finalize(self, self._file.close)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as exc:
            raise self._error(f"no room for {human_bytes(size)} of activations: {exc.strerror}") from exc

    def write(self, photo: int, view: int, row: Rows) -> None:
        """Store the row ``(H, W, C)``. Raises `StorageError`."""
        if self._dtype == np.float16:
            row = np.clip(row, -_FLOAT16_LARGEST, _FLOAT16_LARGEST)
        data = np.ascontiguousarray(row, self._dtype).tobytes()
        self._checksums[photo, view] = zlib.crc32(data)
        try:
            with self._lock:
                self._file.seek(self._offset(photo, view))
                self._file.write(data)
        except OSError as exc:
            raise self._error(f"activations cannot be written: {exc.strerror}") from exc

    def batch(self, photos: NDArray[np.intp], views: NDArray[np.intp]) -> Rows:
        """``float32 (n, H, W, C)``. Raises `StorageError` when a row is not as it was written."""
        rows = np.empty((len(photos), *self.shape[2:]), np.float32)
        for i, (photo, view) in enumerate(zip(photos.tolist(), views.tolist(), strict=True)):
            try:
                with self._lock:
                    self._file.seek(self._offset(photo, view))
                    data = self._file.read(self._row)
            except OSError as exc:
                raise self._error(f"activations cannot be read: {exc.strerror}") from exc
            if len(data) != self._row or zlib.crc32(data) != self._checksums[photo, view]:
                raise self._error("the scratch file of activations is damaged")
            rows[i] = np.frombuffer(data, self._dtype).reshape(self.shape[2:])
        return rows

    def _offset(self, photo: int, view: int) -> int:
        return (photo * self.shape[1] + view) * self._row

    def _error(self, what: str) -> StorageError:
        return StorageError(
            f"{self._folder}: {what}",
            "look after that disk, set runtime.cache_dir to another, or lower fine_tuning.scratch_gb, and go on "
            "with: finetune train --resume",
        )


@dataclass(frozen=True)
class Lower:
    """The frozen lower part on a fast runtime, and how photos get to it."""

    request: FeatureRequest
    runtime: Runtime
    shape: tuple[int, ...]
    workers: int
    batch_size: int


@dataclass(frozen=True)
class Scratch:
    """Where and how activations are kept: of the first `views` views of each photo, as `dtype`; see `ScratchFile`."""

    folder: Path
    views: int
    dtype: type[np.generic]


class Recomputed:
    """The lower part again for every batch: for sets whose activations do not fit in the scratch file."""

    def __init__(self, samples: Sequence[Sample], lower: Lower) -> None:
        self._samples, self._lower = samples, lower
        self.shape = (len(samples), lower.request.views, *lower.shape)

    def batch(self, photos: NDArray[np.intp], views: NDArray[np.intp]) -> Rows:
        """``float32 (n, H, W, C)``; no view twice. Raises `DataError` when a photo has changed since it was indexed."""
        rows = np.empty((len(photos), *self._lower.shape), np.float32)
        places: dict[tuple[int, int], int] = {}
        wanted: dict[int, list[int]] = {}
        for i, (photo, view) in enumerate(zip(photos.tolist(), views.tolist(), strict=True)):
            places[photo, view] = i
            wanted.setdefault(photo, []).append(view)
        if len(places) != len(rows):
            raise ValueError("a batch names a view of a photo twice")
        for place, row in _computed(self._samples, wanted, self._lower):
            rows[places[place]] = row
        return rows


class Part:
    """Some `photos` of another source, which are numbered from 0 here."""

    def __init__(self, whole: Source, photos: NDArray[np.intp]) -> None:
        self._whole, self._photos = whole, photos
        self.shape = (len(photos), *whole.shape[1:])

    def batch(self, photos: NDArray[np.intp], views: NDArray[np.intp]) -> Rows:
        """``float32 (n, H, W, C)``."""
        return self._whole.batch(self._photos[photos], views)


def stored(samples: Sequence[Sample], lower: Lower, scratch: Scratch, advance: Advance) -> ScratchFile:
    """The activations of `samples` in a scratch file.

    `advance` counts photos. Raises `StorageError` when the disk is full, `DataError` when a photo has changed.
    """
    views = scratch.views
    file = ScratchFile(scratch.folder, (len(samples), views, *lower.shape), scratch.dtype)
    everything = dict.fromkeys(range(len(samples)), range(views))
    for (photo, view), row in _computed(samples, everything, lower):
        file.write(photo, view, row)
        if view == views - 1:
            advance(1)
    return file


def _computed(
    samples: Sequence[Sample], wanted: Mapping[int, Sequence[int]], lower: Lower
) -> Iterator[tuple[tuple[int, int], Rows]]:
    """``(H, W, C)`` of each view in `wanted`, by (photo, view), in order."""
    work = extract.FeatureWork(lower.request, lower.runtime, lambda: lower.runtime)
    for rows, bad in ordered_map(work, extract.chunks(samples, wanted, lower.batch_size), lower.workers):
        for photo in bad.values():
            raise DataError(f"{photo.path} could be decoded before, and now: {photo.reason}", "run the command again")
        yield from rows.items()


def row_bytes(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    """Bytes on the disk for one view of (photos, views, H, W, C)."""
    return np.dtype(dtype).itemsize * math.prod(shape[2:])
