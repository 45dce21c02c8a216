"""A small grey picture of every photo: what near-duplicates are compared by, kept beside the features.

In: ``uint8 (size, size, 3)`` RGB as `photos/decode.py` makes it. Out: ``uint8 (SIDE, SIDE)``, averaged by Pillow's box
filter, which gives the same bits on every machine.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from finetune_cli.photos import decode
from finetune_cli.photos.decode import ImageSettings

SIDE = 48
_VERSION = 1  # part of the cache key: raise it when `thumbnail` gives other pixels than before


def thumbnail(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``uint8 (size, size, 3)`` -> ``uint8 (SIDE, SIDE)``, grey by the luma of ITU-R BT.601."""
    from PIL import Image

    return np.array(Image.fromarray(photo).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def key(digest: str, settings: ImageSettings) -> bytes:
    """The key, in the feature cache, of the thumbnail of the photo whose SHA-256 is `digest`."""
    parts = ("thumbnail", str(_VERSION), digest, decode.decoder(), f"{settings.size} {settings.resize}")
    return hashlib.sha256("\0".join(parts).encode()).digest()


def packed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A thumbnail as the feature cache takes it, ``float32 (SIDE * SIDE / 4,)``: its bytes, not its numbers."""
    return np.ascontiguousarray(pixels).reshape(-1).view("<f4")


def unpacked(row: NDArray[np.float32] | None) -> NDArray[np.uint8] | None:
    """What `packed` was given, or `None` if `row` is nothing of that kind."""
    if row is None or row.nbytes != SIDE * SIDE:
        return None
    return row.view(np.uint8).reshape(SIDE, SIDE)
