"""An image in, ``uint8 (size, size, 3)`` RGB pixels out: the only decoder of the package.

    bytes -> format by content -> size from the header -> (reduced) decode -> 8 bits -> resize -> upright -> RGB

The steps are those of `photo.py`, which is a part of every export, too; this module and `codecs.py` make them safe for
files of strangers. The order is chosen for speed. Cropping and resizing are one step, and what follows works on the
small picture only: turning it upright and laying it on white commute with a centred resize.

Resizing uses Hamming's filter where a picture shrinks and bicubic where it grows. Measured with EfficientNet-Lite0
features and logistic regression: Hamming equals bicubic and Lanczos on 500 px photos (94.8, 94.1, 94.1 % on
hymenoptera) in 1.0 ms instead of 1.6 and 2.2 ms; on photos of 150 px enlarged to 224, bicubic has a log loss of 0.316
where bilinear has 0.329 and Hamming 0.346.

JPEG is decoded at 1/2, 1/4 or 1/8 of its size by libjpeg where that leaves twice the pixels needed: 35 instead of
75 ms for 12 megapixels, 0.2 grey levels from the full decode on average. Without the factor of two it would be 30 ms
and 0.6 grey levels.

Everything here is thread-safe and releases the interpreter lock while decoding and resizing.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage
from finetune_cli.photos.codecs import Refused, opened, reason, too_large
from finetune_cli.places import Place

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
        *(".avif", ".heic", ".heif", ".hif"),
    )
)

_EXIF_DATA, _RECORDED = 0x8769, 0x9003


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How a photo becomes a square of `size` pixels.

    `resize`: ``crop`` scales the shorter side to `size` and takes the centre; ``squash`` scales both sides to `size`;
    ``pad`` scales the longer side to `size` and pads with black. A photo of more than `max_pixels` is refused.
    """

    size: int = 224
    resize: str = "crop"
    max_pixels: int = 100_000_000


def decoder() -> str:
    """What the pixels of a photo depend on besides its bytes and the settings; part of every feature's cache key.

    Raise the number when `decode` gives other pixels than before.
    """
    import PIL
    import pillow_heif

    return f"2, Pillow {PIL.__version__}, libheif {pillow_heif.libheif_version()}"


@dataclass(frozen=True, slots=True)
class Header:
    """From the first bytes of a file: its size in pixels as stored, before any Exif rotation, and Pillow's format."""

    width: int
    height: int
    format: str


def read_header(source: Place | bytes | BinaryIO, max_pixels: int) -> Header:
    """Size and format of an image file; no pixel is decoded.

    Raises `BadImage` when it is not an image, damaged, not a regular file, or has more than `max_pixels` pixels.
    """
    with opened(source, max_pixels) as image:
        return Header(*image.size, str(image.format))


def recorded(path: Place, max_pixels: int) -> datetime | None:
    """When a photo was taken, without a time zone: DateTimeOriginal of Exif 2.32; `None` if it is missing."""
    with contextlib.suppress(BadImage), opened(path, max_pixels) as image:
        text = image.getexif().get_ifd(_EXIF_DATA).get(_RECORDED)
        return None if text is None else datetime.strptime(str(text), "%Y:%m:%d %H:%M:%S")
    return None


def decode(source: Place | bytes, settings: ImageSettings) -> NDArray[np.uint8]:
    """The photo as ``uint8 (size, size, 3)`` RGB: upright, first frame, 8 bits, on white where it was transparent.

    Raises `BadImage`, and nothing else, when it cannot be decoded whole. Nothing is printed.
    """
    with opened(source, settings.max_pixels) as image:
        from finetune_cli.photos.photo import reduced, square

        stored = image.width * image.height
        extent = reduced(image, settings.size, settings.resize)
        # libjpeg keeps a progressive picture in memory at its full size.
        pixels = stored if image.info.get("progressive") else image.width * image.height
        with _BUDGET.spend(pixels):
            return square(image, extent, settings.size, settings.resize)


def from_image(image: "Image", settings: ImageSettings) -> NDArray[np.uint8]:
    """A Pillow image as ``uint8 (size, size, 3)`` RGB: what `decode` makes of a file with the same pixels.

    `image` itself is only loaded, not changed. Of an animation, the current frame is used. Exif data that it
    carries turn it upright. `decode` reads large JPEG files at a fraction of their size, so these differ by 0.2 grey
    levels on average. Raises `BadImage`.
    """
    from finetune_cli.photos.photo import square

    try:
        if not (image.width and image.height):
            raise Refused(f"{image.width} x {image.height} pixels")
        if image.width * image.height > settings.max_pixels:
            raise Refused(too_large(*image.size, settings.max_pixels))
        with _BUDGET.spend(image.width * image.height):
            return square(image, image.size, settings.size, settings.resize)
    # As in `opened`: an image that was opened and not loaded can raise anything.
    except Exception as exc:
        raise BadImage("image", reason(exc, image.format)) from exc


def decode_whole(source: Place | bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The photo at its own size, ``uint8 (h, w, 3)`` RGB: upright, first frame, 8 bits, on white. Raises `BadImage`."""
    with opened(source, max_pixels) as image, _BUDGET.spend(image.width * image.height):
        from finetune_cli.photos.photo import whole

        return whole(image)


class _PixelBudget:
    """Bounds the memory that all threads together need: at most `most` pixels are being decoded at any time.

    A picture that is larger than that waits until it is alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._spent = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def spend(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` more may be decoded, and count them as long as the block lasts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._spent or self._spent + pixels <= self._most)
            self._spent += pixels
        try:
            yield
        finally:
            with self._changed:
                self._spent -= pixels
                self._changed.notify_all()


# Decoding and what follows needs 4 to 10 bytes a pixel, 16 for WebP, up to 19 for HEIF.
_BUDGET = _PixelBudget(100_000_000)
