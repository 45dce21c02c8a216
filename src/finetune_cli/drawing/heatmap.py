"""A map of evidence ``(h, w)`` over a photo: red is evidence for, blue against, grey is neutral."""

import numpy as np
from numpy.typing import NDArray

_FOR = np.array((214, 39, 24), np.float64)
_AGAINST = np.array((33, 102, 205), np.float64)
_STRONGEST = 0.7  # the opacity of the strongest evidence
_GREY = np.array((0.299, 0.587, 0.114))  # luminance, ITU-R BT.601


def overlay(photo: NDArray[np.uint8], evidence: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The photo ``uint8 (H, W, 3)`` in grey with `evidence` ``(h, w)`` in colour, as ``uint8 (H, W, 3)``.

    The strongest evidence, for or against, has the full colour; zero has none.
    """
    from PIL import Image

    height, width, _ = photo.shape
    scale = max(float(np.abs(evidence).max()), 1e-12)
    small = Image.fromarray((evidence / scale).astype(np.float32))
    smooth = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), -1, 1)[..., None]
    grey = np.repeat((photo @ _GREY)[..., None], 3, axis=2)
    cover = _STRONGEST * np.abs(smooth)
    mixed = grey * (1 - cover) + np.where(smooth > 0, _FOR, _AGAINST) * cover
    return np.asarray(np.clip(np.round(mixed), 0, 255), np.uint8)


def side_by_side(*pictures: NDArray[np.uint8], gap: int = 8) -> NDArray[np.uint8]:
    """Pictures ``uint8 (H, W, 3)`` of equal height in a row, with white between them."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(parts, axis=1)
