"""Technical trouble of single photos: blank, nearly black or white, blurred, tiny, of an odd shape.

Measured on the pixels as the model sees them, but for the size and the shape, which are those of the file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TINY = 64  # pixels of the shorter side
_ODD = 3.0  # longer side / shorter side
_BLANK = 6.0  # grey levels of standard deviation
_BLACK, _WHITE = 16.0, 240.0  # mean grey levels
_BLURRED = 1 / 12  # of the median sharpness of the set
_LEAST_SHARPNESS = 0.02  # photos above this are never called blurred


@dataclass(frozen=True, slots=True)
class Measured:
    """`width` and `height` of the file; mean and standard deviation of the grey levels, 0 to 255.

    sharpness: the variance of the Laplacian (Pech-Pacheco et al. 2000) divided by that of the grey levels, so that
    contrast does not count.
    """

    width: int
    height: int
    mean: float
    deviation: float
    sharpness: float


def measure(photo: NDArray[np.uint8], width: int, height: int) -> Measured:
    """What `faults` needs to know of a photo ``uint8 (S, S, 3)``, whose file has `width` x `height` pixels."""
    import cv2

    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float32)
    deviation = float(grey.std())
    laplacian = float(cv2.Laplacian(grey, cv2.CV_32F).var())
    return Measured(width, height, float(grey.mean()), deviation, laplacian / max(deviation, 1.0) ** 2)


def faults(photo: Measured, usual_sharpness: float) -> list[str]:
    """What is wrong with `photo`, in words; `usual_sharpness`: the median of its set."""
    found = []
    if photo.deviation < _BLANK:
        found.append(f"blank: all of it is grey level {photo.mean:.0f}, +/- {photo.deviation:.0f}")
    elif photo.mean < _BLACK:
        found.append(f"nearly black: mean grey level {photo.mean:.0f} of 255")
    elif photo.mean > _WHITE:
        found.append(f"nearly white: mean grey level {photo.mean:.0f} of 255")
    elif photo.sharpness < min(_BLURRED * usual_sharpness, _LEAST_SHARPNESS):
        found.append(f"blurred: sharpness {photo.sharpness:.3g}, where {usual_sharpness:.3g} is usual")
    shorter, longer = sorted((photo.width, photo.height))
    if shorter < _TINY:
        found.append(f"tiny: {photo.width} x {photo.height} pixels")
    if longer > _ODD * shorter:
        found.append(f"odd shape: {photo.width} x {photo.height} pixels")
    return found
