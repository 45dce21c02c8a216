"""A known photo, by which a process shows that it decodes, augments and infers what another one does."""

import functools
import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEIGHT, _WIDTH = 260, 340


@functools.cache
def photo() -> bytes:
    """A JPEG file of a ramp under noise: every step of the decoder, and of a network, has something to round."""
    from PIL import Image

    down, across = np.linspace(0, 160, _HEIGHT)[:, None, None], np.linspace(0, 60, _WIDTH)[None, :, None]
    noise = np.random.default_rng(0).uniform(0, 35, (_HEIGHT, _WIDTH, 3))
    file = io.BytesIO()
    Image.fromarray((down + across + noise).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def digest(array: NDArray[Any]) -> str:
    """SHA-256, in hexadecimal, of an array's type, shape and bytes."""
    return hashlib.sha256(
        f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()
