"""Which pairs of thumbnails may show the same picture: a cheap look at many pairs, before `alignment.py` decides.

The middle of one picture, at three scales and mirrored, is searched for in the other, as `alignment.py` does it, but at
16 x 16 and for hundreds of pairs at once, by Fourier transforms: for a single pair, calls cost more than arithmetic.

Measured on 1,800 copies of hymenoptera, scenes and digits: of those that are links all but two have at least 0.58 here;
of the nearest neighbours of 30,000 photos that are none, a tenth has.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli.duplicates.alignment import margin, smaller
from finetune_cli.parallel import ordered_map

LEAST = 0.58
_SIDE, _BLUR = 16, 1.5
_SIDES = (16, 13, 11)  # of a picture whose middle is searched for: scales 1, 0.81, 0.69
_BLOCK = 256  # photos or pairs that a thread takes at once

_Planes = NDArray[np.float32]
_Half = NDArray[np.float16]
_WIDTHS = tuple(side - 2 * margin(side) for side in _SIDES)  # of the middles


class Screened(NamedTuple):
    """Of pairs ``(m,)``: which may be links, and whether one of the two is mirrored."""

    passing: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]


class Screening:
    """Compares thumbnails ``uint8 (n, S, S)`` by their numbers. Memory: 3.6 KB a photo."""

    def __init__(self, thumbnails: NDArray[np.uint8], workers: int) -> None:
        self._workers = workers
        count = len(thumbnails)
        # float16, because pictures are divided by their largest value.
        self._scenes = np.empty((count, _SIDE, _SIDE), np.float16)
        self._middles = np.zeros((count, len(_SIDES), _SIDE, _SIDE), np.float16)  # zero mean, length 1
        # One over the length of what a middle is compared with at every place; 0 where it would reach over the edge.
        self._scales = np.zeros((count, len(_SIDES), _SIDE, _SIDE), np.float16)

        def prepare(start: int) -> None:
            rows = slice(start, start + _BLOCK)
            self._prepare(thumbnails[rows], self._scenes[rows], self._middles[rows], self._scales[rows])

        for _done in ordered_map(prepare, range(0, count, _BLOCK), workers):
            pass

    def _prepare(self, thumbnails: NDArray[np.uint8], scenes: _Half, middles: _Half, scales: _Half) -> None:
        for number, (side, width) in enumerate(zip(_SIDES, _WIDTHS, strict=True)):
            pictures = np.stack([smaller(thumbnail, side, _BLUR) for thumbnail in thumbnails])
            if side == _SIDE:
                pictures /= np.maximum(np.abs(pictures).max(axis=(1, 2), keepdims=True), 1.0)
                scenes[:] = pictures
                sums, squares = _integral(pictures), _integral(pictures**2)
            inside = slice(margin(side), side - margin(side))
            own = pictures[:, inside, inside]
            own = own - own.mean(axis=(1, 2), keepdims=True)
            lengths = np.sqrt((own**2).sum(axis=(1, 2), keepdims=True))
            middles[:, number, :width, :width] = own / np.maximum(lengths, 1e-3)
            spread = _boxes(squares, width) - _boxes(sums, width) ** 2 / width**2
            places = _SIDE - width + 1
            scales[:, number, :places, :places] = np.where(spread > 1e-4, spread, np.inf) ** -0.5

    def screened(self, pairs: NDArray[np.intp]) -> Screened:
        """Which of `pairs` ``(m, 2)`` are alike enough to be compared by `Alignment`."""

        def correlations(start: int) -> NDArray[np.float32]:
            first, second = pairs[start : start + _BLOCK].T
            return np.maximum(self._correlations(first, second), self._correlations(second, first))

        blocks = ordered_map(correlations, range(0, len(pairs), _BLOCK), self._workers)
        plain, mirrored = np.concatenate([np.zeros((2, 0), np.float32), *blocks], axis=1)
        return Screened(np.maximum(plain, mirrored) >= LEAST, mirrored > plain)

    def _correlations(self, scenes: NDArray[np.intp], inserted: NDArray[np.intp]) -> NDArray[np.float32]:
        """``(2, m)``: the highest normalised cross-correlation of a middle, as it is and mirrored, in a scene."""
        from scipy import fft

        scene = fft.rfft2(self._scenes[scenes].astype(np.float32))[:, None]
        scales = self._scales[scenes].astype(np.float32)
        middles = self._middles[inserted].astype(np.float32)
        mirrored = np.zeros_like(middles)
        for number, width in enumerate(_WIDTHS):
            mirrored[:, number, :width, :width] = middles[:, number, :width, width - 1 :: -1]
        return np.stack(
            [
                (fft.irfft2(scene * np.conj(fft.rfft2(templates)), s=(_SIDE, _SIDE)) * scales).max(axis=(1, 2, 3))
                for templates in (middles, mirrored)
            ]
        )


def _integral(pictures: _Planes) -> NDArray[np.float64]:
    """Sums of everything above and left of each corner of a pixel, ``(n, S + 1, S + 1)``."""
    sums = np.cumsum(np.cumsum(pictures, axis=1, dtype=np.float64), axis=2)
    return np.pad(sums, ((0, 0), (1, 0), (1, 0)))


def _boxes(integral: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """The sums of all squares of `side` pixels."""
    return (
        integral[:, side:, side:]
        - integral[:, :-side, side:]
        - integral[:, side:, :-side]
        + integral[:, :-side, :-side]
    )
