"""A photo as the model wants it: RGB pixels of a square, made as for the training of the model.

    from photo import pixels

    model_input = pixels("photo.jpg", "classes.json")

Needs Pillow 10.1 or newer and NumPy, nothing else. `finetune export` puts this file beside every model. finetune-cli
runs the same code in training and prediction, so the pixels are equal where the version of Pillow is. For HEIC files,
call `register_heif_opener()` of pillow-heif first.
"""

import json
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling, Transpose

# What turns a picture upright, by its Exif orientation (Exif 2.32, tag 0x0112).
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
# Tags of TIFF 6.0, and the value of the second one that means that 0 is white.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def pixels(source: str | PathLike[str] | IO[bytes], classes_json: str | PathLike[str]) -> NDArray[np.float32]:
    """The photo in the file `source` as ``float32 (1, size, size, 3)``, RGB from 0 to 255.

    classes_json: the file of that name beside the model, which says how photos are prepared for it. Raises
    `ValueError` for a photo of more pixels than it allows, and what Pillow raises for one that it cannot read.
    """
    settings = json.loads(Path(classes_json).read_text("utf-8"))["image"]
    size, resize = settings["size"], settings["resize"]
    with Image.open(source) as image:
        if image.width * image.height > settings["max_pixels"]:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {settings['max_pixels']}")
        return square(image, reduced(image, size, resize), size, resize)[None].astype(np.float32)


def reduced(image: Image.Image, size: int, resize: str) -> tuple[float, float]:
    """Let libjpeg decode a JPEG file at 1/2, 1/4 or 1/8 of its size where that leaves twice the pixels needed.

    Returns width and height at that fraction, which need not be whole numbers. Call it before `image` is loaded.
    """
    _box, target = _geometry(*image.size, size, resize)
    fraction = image.draft(None, (2 * target[0], 2 * target[1]))
    return image.size if fraction is None else (fraction[1][2], fraction[1][3])


def square(image: Image.Image, extent: tuple[float, float], size: int, resize: str) -> NDArray[np.uint8]:
    """`image` as ``uint8 (size, size, 3)`` RGB: upright, first frame, 8 bits, on white where it is transparent.

    extent: its width and height, as `reduced` gives them, or ``image.size``. `resize`: ``crop`` scales the shorter side
    to `size` and takes the centre; ``squash`` scales both sides to `size`; ``pad`` scales the longer side to `size` and
    pads with black. Raises `ValueError` for pixels that are not numbers of 8 or 16 bits.
    """
    image.load()
    picture = _resized(_eight_bits(image), extent, size, resize)
    return np.array(_padded(_on_white(_upright(picture, image)), size))


def whole(image: Image.Image) -> NDArray[np.uint8]:
    """`image` at its own size, ``uint8 (h, w, 3)`` RGB, otherwise as `square`."""
    image.load()
    return np.array(_on_white(_upright(_eight_bits(image), image)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture in mode L, LA, RGB or RGBA."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.array(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            values[values == transparent] = np.iinfo(np.uint16).max
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts pixels of up to 8 bits only
            values = (1 << bits) - 1 - values
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError(
            "its pixels are signed, 32-bit or floating-point numbers, and the file does not say which is white; "
            "save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        return image if image.mode in {"LA", "RGBA"} else _transparent_to_alpha(image)
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in {"L", "RGB"} else image.convert("RGB")


def _transparent_to_alpha(image: Image.Image) -> Image.Image:
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:  # of a PNG with 16 bits, of which Pillow kept the upper 8
        image = image.copy()  # the caller's image stays as it is
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image.convert("RGBA")


def _geometry(
    width: float, height: float, size: int, resize: str
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """The part of a picture of `width` x `height` that is used (left, top, right, bottom), and its size afterwards."""
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side), (size, size)
    if resize == "squash":
        return (0, 0, width, height), (size, size)
    scale = size / max(width, height)
    return (0, 0, width, height), (max(1, round(width * scale)), max(1, round(height * scale)))


def _resized(picture: Image.Image, extent: tuple[float, float], size: int, resize: str) -> Image.Image:
    box, target = _geometry(*extent, size, resize)
    shrinks = box[2] - box[0] >= target[0] and box[3] - box[1] >= target[1]
    method = Resampling.HAMMING if shrinks else Resampling.BICUBIC
    # From a factor of six on, whole blocks are averaged first: 0.2 grey levels away, and much faster.
    return picture.resize(target, method, box, reducing_gap=3.0)


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """`picture`, turned as the Exif data of `image` say. The two commute with a resize around the centre."""
    if image.format in {"TIFF", "HEIF"}:  # turned while loading
        return picture
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    # Damaged Exif data can raise any exception, and are no reason to refuse an intact picture.
    except Exception:  # noqa: BLE001
        return picture
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode not in {"LA", "RGBA"}:
        return picture.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return white


def _padded(picture: Image.Image, size: int) -> Image.Image:
    if picture.size == (size, size):
        return picture
    black = Image.new("RGB", (size, size))
    black.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return black
