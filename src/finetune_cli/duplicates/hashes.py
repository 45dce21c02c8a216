"""The perceptual hash of a thumbnail: its 63 lowest frequencies, as a unit vector.

The 8 x 8 lowest coefficients of the DCT-II without the mean, as in pHash (Zauner 2010, "Implementation and benchmarking
of perceptual image hash functions"), but kept as numbers instead of signs: the cosine of two hashes is about the
correlation of two blurred pictures. Brightness, contrast, size and compression hardly change it; cropping does.
"""

import numpy as np
from numpy.typing import NDArray

_FREQUENCIES = 8
_BLOCK = 4096


def hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``uint8 (n, S, S)`` -> ``float32 (n, 63)``; the hash of a picture of one grey is zero."""
    side = thumbnails.shape[1]
    k, i = np.ogrid[:_FREQUENCIES, :side]
    basis = np.cos(np.pi * k * (2 * i + 1) / (2 * side)).astype(np.float32)
    found = np.empty((len(thumbnails), _FREQUENCIES**2 - 1), np.float32)
    for start in range(0, len(thumbnails), _BLOCK):
        pictures = thumbnails[start : start + _BLOCK].astype(np.float32)
        coefficients = basis @ pictures @ basis.T
        found[start : start + _BLOCK] = coefficients.reshape(len(pictures), -1)[:, 1:]
    sizes = np.linalg.norm(found, axis=1, keepdims=True)
    found[sizes[:, 0] < side] = 0  # less than a tenth of a grey level
    found /= np.maximum(sizes, side)
    return found


def mirrored(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """The hashes of the same pictures, mirrored left to right: odd horizontal frequencies change their sign."""
    signs = np.tile(np.where(np.arange(_FREQUENCIES) % 2, -1, 1), _FREQUENCIES)[1:]
    return found * signs.astype(np.float32)
