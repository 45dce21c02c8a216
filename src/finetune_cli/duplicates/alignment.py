"""Whether two thumbnails show the same picture: one is laid over the other as well as that can be, and compared.

Coarse, at 24 x 24: the middle of one, at several scales and mirrored, is searched for in the other by normalised
cross-correlation. Fine, at 48 x 48: the best of these places is refined to an affine map (Evangelidis and Psarakis
2008, "Parametric image alignment using enhanced correlation coefficient maximization"), and the score is the
correlation of the two where they overlap. All is done on pictures without their low frequencies, because skies, seas
and lawns correlate whatever they show. Brightness and contrast do not count.

Measured on hymenoptera and scenes (benchmarks/duplicates.py): copies that were re-encoded, resized, cropped to 90 % or
brightened score 0.65 to 1, and the most similar pairs of different photos below 0.4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_cli.duplicates.thumbnails import SIDE

Picture = NDArray[np.float32]

_COARSE = 24
_SCALES = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
_MIDDLE = 0.75  # the share of each side that is searched for: a crop may reach over the edge of what the other shows
_BLUR, _COARSE_BLUR = 2.0, 1.5  # sigma in pixels of what is taken away
_LEAST_COARSE = 0.6  # below this the fine step never succeeds: copies have 0.66 and more, crops to 70 % mostly
_LEAST_OVERLAP = 0.4
_MOST_STRETCH = 1.25
_LEAST_SCALE, _MOST_SCALE = 0.45, 1.2
_LEAST_DETAIL = 1.0  # grey levels: a picture of less, such as a blank frame, resembles nothing
_REMEMBERED = 4096  # thumbnails

_Middle = tuple[int, Picture]  # the side of the picture whose middle it is


class _Place(NamedTuple):
    """Where the middle of a thumbnail was found in another: correlation, scale, and offset in shares of the side."""

    value: float
    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0


class Alignment:
    """Compares thumbnails ``uint8 (n, SIDE, SIDE)`` by their numbers; may be used from several threads."""

    def __init__(self, thumbnails: NDArray[np.uint8]) -> None:
        self._thumbnails = thumbnails
        # What a thumbnail is made of, by its number; most pairs need only one part of each of their two.
        self._coarse: Callable[[int], Picture] = functools.lru_cache(_REMEMBERED)(self._at_coarse_size)
        self._middles: Callable[[int], tuple[_Middle, ...]] = functools.lru_cache(_REMEMBERED)(self._at_every_scale)
        self._fine: Callable[[int], Picture] = functools.lru_cache(_REMEMBERED)(self._at_full_size)

    def score(self, first: int, second: int, mirrored: bool | None = None) -> float:
        """The correlation, at most 1, of two photos laid over each other; 0 if they do not fit at all.

        mirrored: whether one is mirrored before; None: what is better.
        """
        best, scene, inserted, mirror = max(
            (_search(self._coarse(a), self._middles(b), mirror), a, b, mirror)
            for a, b in ((first, second), (second, first))
            for mirror in ((False, True) if mirrored is None else (mirrored,))
        )
        if best.value < _LEAST_COARSE:
            return 0.0
        pictures = self._fine(scene), self._fine(inserted)
        if min(float(picture.std()) for picture in pictures) < _LEAST_DETAIL:
            return 0.0
        return _correlation(pictures[0], np.ascontiguousarray(pictures[1][:, :: -1 if mirror else 1]), best)

    def _at_full_size(self, i: int) -> Picture:
        return detail(self._thumbnails[i].astype(np.float32), _BLUR)

    def _at_coarse_size(self, i: int) -> Picture:
        return smaller(self._thumbnails[i], _COARSE, _COARSE_BLUR)

    def _at_every_scale(self, i: int) -> tuple[_Middle, ...]:
        sides = (round(_COARSE * scale) for scale in _SCALES)
        return tuple((side, middle(smaller(self._thumbnails[i], side, _COARSE_BLUR))) for side in sides)


def smaller(thumbnail: NDArray[np.uint8], side: int, sigma: float) -> Picture:
    """The `detail` of a thumbnail of `side` x `side` pixels."""
    import cv2

    whole = thumbnail.astype(np.float32)
    return detail(cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA), sigma)


def margin(side: int) -> int:
    """How many of the `side` pixels of a picture are before its middle, and after it."""
    return round(side * (1 - _MIDDLE) / 2)


def middle(picture: Picture) -> Picture:
    """What is searched for in another picture."""
    inside = slice(margin(len(picture)), len(picture) - margin(len(picture)))
    return np.ascontiguousarray(picture[inside, inside])


def detail(picture: Picture, sigma: float) -> Picture:
    """`picture` without its low frequencies: less what a Gaussian of `sigma` pixels makes of it."""
    import cv2

    return np.asarray(picture - cv2.GaussianBlur(picture, (0, 0), sigma), np.float32)


def _search(scene: Picture, middles: tuple[_Middle, ...], mirrored: bool) -> _Place:
    import cv2

    best = _Place(-1.0)
    for side, picture in middles:
        template = np.ascontiguousarray(picture[:, ::-1]) if mirrored else picture
        _low, value, _where, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(scene, template, cv2.TM_CCOEFF_NORMED))
        if best.value < value <= 1.01:  # OpenCV gives infinity where there is no contrast
            best = _Place(value, side / _COARSE, (x - margin(side)) / _COARSE, (y - margin(side)) / _COARSE)
    return best


def _correlation(scene: Picture, inserted: Picture, place: _Place) -> float:
    import cv2

    half_pixel = (place.scale - 1) / 2
    start = np.array(
        [[place.scale, 0, place.x * SIDE + half_pixel], [0, place.scale, place.y * SIDE + half_pixel]], np.float32
    )
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 12, 1e-3)
    try:
        warp = cv2.findTransformECC(inserted, scene, start, cv2.MOTION_AFFINE, criteria, None, 5)[1]
    except cv2.error:  # it does not converge: these are different pictures
        return 0.0
    largest, smallest = np.linalg.svd(warp[:, :2], compute_uv=False)
    if not (smallest >= _LEAST_SCALE and largest <= min(_MOST_SCALE, _MOST_STRETCH * smallest)):
        return 0.0

    def warped(picture: Picture) -> Any:
        return cv2.warpAffine(picture, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    overlap = warped(np.ones((SIDE, SIDE), np.float32)) > 0.99
    if overlap.mean() < _LEAST_OVERLAP:
        return 0.0
    a, b = (picture[overlap].astype(np.float64) for picture in (warped(scene), inserted))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0
