"""Opens image files safely: by their content, never by their name.

Returns a Pillow image whose header has been read and whose size is allowed. Every error, here or later while the pixels
are read, becomes a `BadImage`. Neither Pillow nor the C libraries behind it print anything.
"""

import contextlib
import ctypes
import errno
import functools
import importlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from finetune_cli import files, places
from finetune_cli.errors import BadImage
from finetune_cli.places import Address, Place
from finetune_cli.safe_open import IrregularError
from finetune_cli.text import shown

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# The first bytes of a file -> the Pillow plug-in that reads it. Only these plug-ins are ever reached: none of them
# starts another program, as Pillow's PostScript reader does.
_SIGNATURES = (
    (rb"\xff\xd8\xff", "Jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "Png"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"GIF8[79]a", "Gif"),
    (rb"BM", "Bmp"),
    (rb"II[*+]\0|MM\0[*+]", "Tiff"),
    (rb"P[1-6fF]", "Ppm"),
)
# The same for a container that holds either: by the brands that it names (ISO/IEC 23008-12, 10; AVIF 1.1, 6).
_BRANDS = {
    b"avif": "Avif",
    b"avis": "Avif",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "Heif"),
}
_HEAD_BYTES = 256
_NOT_PHOTOS = (
    (rb"$", "the file is empty"),
    (rb"....ftyp", "a video, or an unsupported kind of photo; save it as JPEG"),
    (rb"version https://git-lfs", "a Git LFS pointer instead of the photo; run: git lfs pull"),
    (rb"\s*<", "a web page or another markup file, not an image"),
    (rb"", "not an image in a supported format"),
)

# libjpeg goes through all pixels again for each scan of a JPEG file; a few kilobytes can hold thousands of scans, where
# cameras and web sites write one or about ten. Measured: 0.6 s for 1e9 pixels.
_MOST_SCANNED_PIXELS = 1e10
_SCAN_SEARCH_BYTES = 1 << 28

# What Pillow decodes in Python, number by number: PPM as text or with another maximum than 255, BMP with run lengths.
# Measured: 0.7 s for 1e6 samples. 100 megapixels of any other kind take a few seconds.
_SLOW_CODECS = frozenset(("ppm", "ppm_plain", "bmp_rle"))
_MOST_SLOW_SAMPLES = 1e7

# A pixel takes up to 16 bytes in a WebP file and 19 in a HEIF file (10 bits and alpha), where the worst of the others
# takes 10; 38 bytes can promise any size.
_SHARES = {"WebP": 0.8, "Heif": 0.7}
# libheif holds the whole file. 100 megapixels without loss take about that much.
_MOST_HEIF_BYTES = 1 << 28

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class Refused(Exception):
    """The reason why a file is not decoded; raised within `opened`, which makes a `BadImage` of it."""


@contextlib.contextmanager
def opened(source: Place | bytes | BinaryIO, max_pixels: int) -> Iterator["ImageFile"]:
    """The image with its header read; every exception of the block becomes a `BadImage`.

    No pixel is decoded here. An image of more than `max_pixels` is refused. Raises `StorageError` when the store of an
    address fails: that says nothing about the image.
    """
    _silence_pillow()
    name, kind = source if isinstance(source, Path | Address) else "image", None
    if isinstance(source, Address):
        try:
            source = places.read(source)
        except OSError as exc:
            raise unreadable(name, exc) from exc
    try:
        with _stream(source) as stream:
            kind = _format(stream)
            if kind == "Heif":
                _refuse_cut_boxes(stream)
            image = _plugin(kind)(stream, "")
            width, height = image.size
            if width * height > int(max_pixels * _SHARES.get(kind, 1.0)):
                raise Refused(too_large(width, height, max_pixels, kind))
            _limit_work(image)
            _limit_tiles(image, max_pixels)
            if kind == "Jpeg":
                _limit_scans(image, stream)
            yield image
    # Pillow raises a dozen unrelated types for files that it cannot read, and documents none of them.
    except Exception as exc:
        raise unreadable(name, exc, kind) from exc


def unreadable(name: Place | str, exc: Exception, kind: str | None = None) -> BadImage:
    """The error to raise for a photo that could not be opened or decoded because of `exc`."""
    if isinstance(exc, FileNotFoundError):
        return BadImage(name, "there is no such file", "check the path")
    if isinstance(exc, OSError) and exc.errno == errno.EISDIR:
        return BadImage(name, "this is a folder", "name a photo in it")
    if isinstance(exc, PermissionError):
        return BadImage(name, reason(exc, kind), "grant yourself access")
    return BadImage(name, reason(exc, kind))


def too_large(width: int, height: int, max_pixels: int, kind: str = "") -> str:
    """The reason why an image of more than `max_pixels` is refused."""
    share = f"{_SHARES[kind]:.0%} (for {kind}) of " if kind in _SHARES else ""
    return (
        f"{width} x {height} pixels, more than {share}image.max_pixels = {max_pixels}; "
        "make it smaller, or raise the limit if you trust it"
    )


@contextlib.contextmanager
def _stream(source: Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with files.open_regular(source) as file:
            yield file
    else:
        yield io.BytesIO(source) if isinstance(source, bytes) else source


def _format(stream: BinaryIO) -> str:
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if head[4:8] == b"ftyp" and (kind := _by_brand(head)):
        return kind
    for pattern, kind in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            return kind
    raise Refused(next(text for pattern, text in _NOT_PHOTOS if re.match(pattern, head, re.DOTALL)))


def _by_brand(head: bytes) -> str | None:
    """The plug-in for a file that begins with the box ``ftyp``: size, "ftyp", brand, version, compatible brands.

    The first known brand counts; a HEIF file may name only the general one (``mif1`` or, for sequences, ``msf1``).
    """
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = [box[start : start + 4] for start in (0, *range(8, len(box), 4))]
    known = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    return known[0] if known else "Heif" if brands[0] in {b"mif1", b"msf1"} else None


def _plugin(kind: str) -> type["ImageFile"]:
    # Not `Image.open`: it tries other formats, and warns of, or refuses, sizes that `max_pixels` allows.
    if kind == "Heif":
        return _heif_plugin()
    if kind == "Tiff":
        _silence_libtiff()
    plugin: type[ImageFile] = getattr(importlib.import_module(f"PIL.{kind}ImagePlugin"), f"{kind}ImageFile")
    return plugin


@functools.cache
def _heif_plugin() -> type["ImageFile"]:
    """What reads HEIF files; imported when the first one is met, since most sets have none."""
    import pillow_heif

    # Only the primary image counts: an embedded thumbnail may show something else.
    options = pillow_heif.options
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    return pillow_heif.HeifImageFile


def _silence_pillow() -> None:
    """Keep Pillow's warnings (odd Exif, odd APNG) from the terminal, and from becoming errors under ``-W error``.

    `warnings.catch_warnings` is not thread-safe, so one filter is put in front for good, and put back when somebody
    else's `catch_warnings` has dropped it.
    """
    _silence_log()
    if not warnings.filters or warnings.filters[0] != _PILLOW_WARNINGS:
        warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _silence_log() -> None:
    """Keep what Pillow logs from the terminal, where Python writes it if nobody has set up logging."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff's C code from printing to the terminal; Pillow raises an exception for the same error.

    Only where the system's loader finds libtiff through Pillow's extension module (Linux and macOS, not Windows).
    """
    from PIL import _imaging

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _limit_work(image: "ImageFile") -> None:
    samples = image.width * image.height * len(image.getbands())
    if samples > _MOST_SLOW_SAMPLES and any(tile.codec_name in _SLOW_CODECS for tile in image.tile):
        raise Refused(
            f"{image.width} x {image.height} pixels of a rare kind of {image.format} that takes too long to decode; "
            "save it as PNG or JPEG"
        )


def _limit_tiles(image: "ImageFile", max_pixels: int) -> None:
    """Refuse a HEIF file whose tiles hold far more pixels than the picture that they make up: all are decoded."""
    tiling = image.info.get("tiling") or {}
    count = tiling.get("num_columns", 0) * tiling.get("num_rows", 0)
    if count * tiling.get("tile_width", 0) * tiling.get("tile_height", 0) > 2 * max_pixels:
        raise Refused(f"{count} tiles for {image.width} x {image.height} pixels would take too long to decode")


def _refuse_cut_boxes(stream: BinaryIO) -> None:
    """Refuse a HEIF file that ends within a box (ISO/IEC 14496-12, 4.2): libheif fills missing tiles up silently."""
    end = stream.seek(0, os.SEEK_END)
    if end > _MOST_HEIF_BYTES:
        raise Refused(f"{end / 1e6:.0f} MB, more than a HEIF photo of the largest size takes; save it as JPEG")
    start = 0
    while start < end:
        stream.seek(start)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        elif size == 0:  # the last box: to the end of the file
            size = end - start
        if len(head) < 8 or size < 8 or start + size > end:
            raise Refused("truncated HEIF file (it ends within a box); copy or download it again")
        start += size
    stream.seek(0)


def _limit_scans(image: "ImageFile", stream: BinaryIO) -> None:
    """Refuse a JPEG file that makes libjpeg go through its pixels very often. `stream` stands behind the first scan's
    header, and is put back there.
    """
    position = stream.tell()
    colours = getattr(image, "layers", 0)
    header = b"\xff\xda\0" + bytes((6 + 2 * colours, colours))
    stream.seek(max(0, position - 8 - 2 * colours))
    # The usual kind of file holds everything in one scan, and libjpeg reads no further.
    one_scan = stream.read(len(header)) == header and not image.info.get("progressive")
    if not one_scan:
        stream.seek(0)
        scans = stream.read(_SCAN_SEARCH_BYTES).count(header[:2])
        if scans * image.width * image.height > _MOST_SCANNED_PIXELS:
            raise Refused(f"{scans} scans of {image.width} x {image.height} pixels would take too long to decode")
    stream.seek(position)


def reason(exc: Exception, kind: str | None = None) -> str:
    """One line for what went wrong, with what to do about it where that is known."""
    if isinstance(exc, Refused | IrregularError):
        return str(exc)
    if isinstance(exc, MemoryError):
        return "not enough memory to decode it"
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"cannot be read: {exc.strerror}"
    text = shown(exc) or type(exc).__name__
    if kind is None:
        return f"cannot be read: {text}"
    if "truncated" in text.lower():
        return f"truncated {kind.upper()} file ({text}); copy or download it again"
    return f"cannot be decoded as {kind.upper()}: {text}"
