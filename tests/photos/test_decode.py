import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageFile, ImageOps

from finetune_cli.errors import BadImage
from finetune_cli.photos import photo
from finetune_cli.photos.decode import EXTENSIONS, Header, ImageSettings, _PixelBudget, decode, from_image, read_header

LIMIT = 10**8
WHITE = [255, 255, 255]


def encode(image, kind, **options):
    buffer = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, **{"quality": -1, "chroma": 444, **options})
    else:
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width=300, height=200):
    """A picture without any symmetry, and without detail that a lossy format or a resize would lose."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 200 + 30).astype(np.uint8))


def flat(mode, colour, size=(40, 30)):
    return Image.new(mode, size, colour)


def png(width, height, depth, colour_type, raw, *chunks):
    """A PNG file by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in raw)
    body = chunk(b"IHDR", header) + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(width, height, bits, data, sample_format=1, photometric=1):
    """A little-endian gray TIFF of one uncompressed strip; 0 is black, or white with `photometric` 0."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else v) for tag, kind, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def decoded(data, size=32, resize="crop"):
    pixels = decode(data, ImageSettings(size, resize))
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    if data[4:8] != b"ftyp" or b"avif" in data[:32]:  # Pillow alone does not read HEIF
        with Image.open(io.BytesIO(data)) as image:  # as `photo.py` beside an export does
            assert (photo.square(image, photo.reduced(image, size, resize), size, resize) == pixels).all()
    return pixels


def colour_of(data):
    """The one colour of a picture that has only one."""
    pixels = decoded(data).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return pixels[0].tolist()


def difference(a, b):
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean()


def refusal(source, settings=ImageSettings(32)):  # noqa: B008 - frozen
    with pytest.raises(BadImage) as caught:
        decode(source, settings)
    assert "\n" not in caught.value.reason
    return caught.value.reason


# Geometry


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (91, 64), (64, 64), (500, 70)])
def test_crop_scales_the_shorter_side_and_takes_the_centre(width, height):
    image = smooth(width, height)
    ratio = 32 / min(width, height)
    scaled = image.resize((round(width * ratio), round(height * ratio)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - 32) / 2, (scaled.height - 32) / 2
    expected = scaled.transform((32, 32), Image.Transform.AFFINE, (1, 0, left, 0, 1, top), Image.Resampling.BILINEAR)
    assert difference(decoded(encode(image, "PNG")), expected) < 1


def test_squash_uses_all_of_the_picture():
    image = smooth(300, 200)
    expected = image.resize((32, 32), Image.Resampling.LANCZOS)
    assert difference(decoded(encode(image, "PNG"), resize="squash"), expected) < 1


@pytest.mark.parametrize(("width", "height"), [(300, 150), (75, 300)])
def test_pad_fits_the_picture_inside_black(width, height):
    image = smooth(width, height)
    expected = ImageOps.pad(image, (32, 32), Image.Resampling.LANCZOS, color="black")
    assert difference(decoded(encode(image, "PNG"), resize="pad"), expected) < 1


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 2000), (2, 3)])
def test_the_smallest_and_the_oddest_sizes(size, resize):
    pixels = decoded(encode(flat("RGB", (10, 200, 30), size), "PNG"), resize=resize)
    assert (pixels == [10, 200, 30]).all(axis=-1).any()


def test_a_picture_of_the_wanted_size_is_not_touched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for resize in ("crop", "squash", "pad"):
        assert (decoded(encode(image, "PNG"), resize=resize) == np.asarray(image)).all()


def test_a_large_jpeg_is_decoded_reduced_and_stays_close_to_the_full_decode():
    noise = np.random.default_rng(0).normal(0, 10, (1500, 2000, 3))
    image = Image.fromarray((np.asarray(smooth(2000, 1500)) + noise).clip(0, 255).astype(np.uint8))
    data = encode(image, "JPEG", quality=90)
    lossless = encode(Image.open(io.BytesIO(data)), "PNG", compress_level=1)
    for resize in ("crop", "squash", "pad"):
        assert difference(decoded(data, 224, resize), decoded(lossless, 224, resize)) < 1


def test_real_photos_agree_with_pillows_plain_recipe(shared_data):
    for path in sorted(shared_data.glob("hymenoptera/val/*/*.jpg"))[::20]:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        expected = ImageOps.fit(image, (224, 224), Image.Resampling.BICUBIC)
        assert difference(decode(path, ImageSettings(224)), expected) < 2.5


# Orientation: how a picture is stored, so that the Exif standard's rule for it gives back the upright one.

STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(kind, orientation):
    upright = smooth()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    data = encode(stored, kind, exif=exif)
    for resize in ("crop", "squash", "pad"):
        assert difference(decoded(data, resize=resize), decoded(encode(upright, "PNG"), resize=resize)) < 1.5


def test_orientation_of_a_jpeg_that_is_decoded_reduced():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(smooth(1200, 800)))))
    assert difference(decoded(encode(stored, "JPEG", exif=exif)), decoded(encode(smooth(1200, 800), "PNG"))) < 1.5


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_photos_with_damaged_exif_are_accepted(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG", "WEBP"):
            assert difference(decoded(encode(smooth(), kind, exif=exif)), decoded(encode(smooth(), "PNG"))) < 1.5


# Pixels of other kinds


def test_16_bit_gray_is_scaled():
    values = np.array([[0, 65535], [32768, 16384]], np.uint16).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(values)
    files = [encode(image, "PNG"), encode(image, "TIFF"), encode(image, "TIFF", compression="tiff_lzw")]
    files.append(b"MM" + b"\0*" + tiff_big_endian(values))
    files.append(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    files.append(tiff(16, 16, 16, values.astype("<u2").tobytes()))
    for data in files:
        assert decoded(data, 16)[4::8, 4::8, 0].tolist() == [[0, 255], [128, 64]]


def tiff_big_endian(values):
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    tags += [(278, 4, 16), (279, 4, values.size * 2)]
    entries = b"".join(
        struct.pack(">HHI", t, k, 1) + struct.pack(">I" if k == 4 else ">HH", *((v,) if k == 4 else (v, 0)))
        for t, k, v in tags
    )
    return struct.pack(">IH", 8, len(tags)) + entries + struct.pack(">I", 0) + values.astype(">u2").tobytes()


def test_12_bit_gray_is_scaled_by_its_own_white():
    packed = bytes.fromhex("fff800") * 32  # two pixels in three bytes: 4095 and 2048
    assert sorted(set(decoded(tiff(8, 8, 12, packed), 8).ravel().tolist())) == [128, 255]


@pytest.mark.parametrize(("photometric", "expected"), [(0, [225, 254, 155, 0]), (1, [30, 1, 100, 255])])
@pytest.mark.parametrize("kind", ["8 bit", "16 bit", "16 bit LZW"])
def test_gray_tiff_whose_white_is_zero_is_not_inverted(kind, photometric, expected):
    levels = np.array([30, 1, 100, 255], np.uint8).repeat(8)[None].repeat(32, 0)
    wide = levels.astype(np.uint16) * 257
    if kind == "16 bit LZW":
        data = encode(Image.fromarray(wide), "TIFF", compression="tiff_lzw", tiffinfo={262: photometric})
        with Image.open(io.BytesIO(data)) as image:
            assert (image.tag_v2[262], image.mode) == (photometric, "I;16")
    elif kind == "16 bit":
        data = tiff(32, 32, 16, wide.astype("<u2").tobytes(), photometric=photometric)
    else:
        data = tiff(32, 32, 8, levels.tobytes(), photometric=photometric)
    assert decoded(data)[4, 4::8, 0].tolist() == expected


def test_16_bit_rgb_is_scaled():
    pixel = struct.pack(">HHH", 65535, 32768, 0)
    assert colour_of(png(4, 4, 16, 2, [pixel * 4] * 4)) == [255, 128, 0]
    assert colour_of(b"P6 4 4 65535\n" + pixel * 16) == [255, 128, 0]


@pytest.mark.parametrize(
    "data",
    [
        tiff(4, 4, 32, np.full(16, 0.5, "<f4").tobytes(), sample_format=3),
        tiff(4, 4, 32, np.full(16, 0.5, "<f4").tobytes(), sample_format=3, photometric=0),
        tiff(4, 4, 32, np.full(16, 70000, "<u4").tobytes()),
        tiff(4, 4, 16, np.full(16, -5, "<i2").tobytes(), sample_format=2),
        b"Pf 4 4 -1.0\n" + np.full(16, 0.5, "<f4").tobytes(),
    ],
)
def test_numbers_without_a_white_are_refused(data):
    assert "the file does not say which is white" in refusal(data)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(flat("1", 1), "PNG"), WHITE),
        (encode(flat("1", 0), "TIFF", compression="group4"), [0, 0, 0]),
        (encode(flat("L", 77), "PNG"), [77, 77, 77]),
        (encode(flat("L", 77), "JPEG"), [77, 77, 77]),
        (encode(flat("RGB", (255, 0, 255)).convert("P"), "PNG"), [255, 0, 255]),
        (encode(flat("RGB", (255, 0, 255)), "GIF"), [255, 0, 255]),
        (encode(flat("RGB", (255, 0, 255)).convert("P"), "BMP"), [255, 0, 255]),
        (encode(flat("CMYK", (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
        (encode(flat("RGB", (10, 20, 30)), "PPM"), [10, 20, 30]),
        (encode(flat("RGB", (10, 20, 30)), "AVIF", quality=100), [10, 20, 30]),
    ],
)
def test_kinds_of_pixels(data, colour):
    assert np.abs(np.subtract(colour_of(data), colour)).max() <= 1


def test_cmyk_jpeg():
    assert np.abs(np.subtract(colour_of(encode(flat("CMYK", (0, 255, 255, 0)), "JPEG")), [255, 0, 0])).max() <= 3


def palette_image(indices_of_transparency):
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    return encode(image, "PNG", transparency=indices_of_transparency)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(flat("RGBA", (200, 0, 0, 255)), "PNG"), [200, 0, 0]),
        (encode(flat("RGBA", (200, 0, 0, 0)), "PNG"), WHITE),
        (encode(flat("RGBA", (200, 0, 0, 51)), "PNG"), [244, 204, 204]),  # 0.2 * 200 + 0.8 * 255, 0.8 * 255
        (encode(flat("RGBA", (200, 0, 0, 51)), "WEBP", lossless=True), [244, 204, 204]),
        (encode(flat("RGBA", (200, 0, 0, 51)), "TIFF"), [244, 204, 204]),
        (encode(flat("LA", (0, 51)), "PNG"), [204, 204, 204]),
        (encode(flat("LA", (9, 0)), "PNG"), WHITE),
        (palette_image(1), WHITE),
        (palette_image(0), [200, 0, 0]),
        (palette_image(b"\xff\x33"), [244, 204, 204]),
        (encode(flat("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), WHITE),
        (encode(flat("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 4)), [1, 2, 3]),
        (encode(flat("L", 7), "PNG", transparency=7), WHITE),
        (encode(flat("1", 0), "PNG", transparency=0), WHITE),
        (png(4, 4, 16, 0, [b"\x12\x34" * 4] * 4, (b"tRNS", b"\x12\x34")), WHITE),
        (png(4, 4, 16, 0, [b"\x12\x34" * 4] * 4, (b"tRNS", b"\x12\x35")), [0x12] * 3),
        (png(4, 4, 16, 2, [b"\x12\x34" * 12] * 4, (b"tRNS", b"\x12\x34" * 3)), WHITE),
        (png(4, 4, 16, 2, [b"\x12\x34" * 12] * 4, (b"tRNS", b"\xff\x34" * 3)), [0x12] * 3),
        (png(4, 4, 16, 4, [b"\0\0\x33\x33" * 4] * 4), [204, 204, 204]),
    ],
)
def test_transparency_becomes_white(data, colour):
    assert np.abs(np.subtract(colour_of(data), colour)).max() <= 1


def test_hidden_colours_do_not_bleed_through_transparency():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 32:] = [255, 0, 0, 0]  # red, but fully transparent
    pixels[:, :32] = [0, 0, 0, 255]
    shown = decoded(encode(Image.fromarray(pixels), "PNG")).astype(int)
    assert np.abs(shown[..., 0] - shown[..., 1]).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("AVIF", {})]
)
def test_the_first_frame_of_an_animation_counts(kind, options):
    frames = [flat("RGB", colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.subtract(colour_of(data), [200, 0, 0])).max() <= 2


def test_the_first_picture_of_an_mpo_counts():
    data = encode(flat("RGB", (200, 0, 0)), "MPO", save_all=True, append_images=[flat("RGB", (0, 200, 0))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(np.subtract(colour_of(data), [200, 0, 0])).max() <= 2


# HEIF


def test_heif_gives_the_pixels_that_were_stored():
    for image in (smooth(), smooth().convert("L"), flat("RGB", (200, 30, 90))):
        assert difference(decoded(encode(image, "HEIF")), decoded(encode(image, "PNG"))) < 1
    for bits, colour in (("RGB;16", [156] * 3), ("RGBA;16", [195] * 3)):  # half of it transparent, on white
        channels = np.full((64, 64, len(bits) - 3), 40000, np.uint16)  # 40000 / 257 = 155.6; alpha is 0.61, too
        buffer = io.BytesIO()
        pillow_heif.from_bytes(bits, (64, 64), channels.tobytes()).save(buffer, quality=-1, chroma=444)
        assert pillow_heif.open_heif(buffer).info["bit_depth"] == 10
        assert np.abs(np.subtract(colour_of(buffer.getvalue()), colour)).max() <= 1


def test_heif_transparency_becomes_white():
    half = Image.new("RGBA", (64, 64), (0, 0, 200, 128))
    assert np.abs(np.subtract(colour_of(encode(half, "HEIF")), [127, 127, 227])).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heif_is_turned_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decoded(encode(smooth(), "HEIF"), resize="squash")
    stored = encode(smooth(), "HEIF", exif=exif.tobytes())
    assert (b"irot" in stored or b"imir" in stored) == (orientation != 1)
    turned = decoded(stored, resize="squash")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(smooth(), "PNG", exif=exif))))
    assert difference(turned, decoded(encode(upright, "PNG"), resize="squash")) < 1.5
    assert (difference(turned, plain) > 5) == (orientation != 1)


def test_the_primary_picture_of_a_heif_file_counts():
    images = [flat("RGB", colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    buffer = io.BytesIO()
    heif = pillow_heif.HeifFile()
    for image in images:
        heif.add_from_pillow(image)
    heif.save(buffer, quality=-1, chroma=444, primary_index=1)
    data = buffer.getvalue()
    assert len(pillow_heif.open_heif(data)) == 3
    assert np.abs(np.subtract(colour_of(data), [0, 200, 0])).max() <= 2


def tiled_heif():
    """Tiles of 64 pixels, as telephones write them (theirs have 512)."""
    return encode(smooth(320, 192), "HEIF", tile_size=64)


def test_heif_in_tiles_is_whole_or_refused():
    data = tiled_heif()
    assert difference(decoded(data), decoded(encode(smooth(320, 192), "PNG"))) < 1.5
    for cut in (len(data) - 1, len(data) - 100, len(data) // 2, 300, 30, 13):
        assert "truncated HEIF file" in refusal(data[:cut])


def test_a_small_heif_picture_of_many_tiles_is_refused():
    data = tiled_heif()
    for name in (bytes((0, 0, 2, 4)), b"ispe" + bytes(4)):
        kind = ">HH" if len(name) == 4 else ">II"
        sizes = name + struct.pack(kind, 320, 192)
        assert data.count(sizes) == 1
        data = data.replace(sizes, name + struct.pack(kind, 8, 8))
    assert "15 tiles for 8 x 8 pixels" in refusal(data, ImageSettings(32, max_pixels=30_000))


def test_heif_headers_that_lie(tmp_path):
    data = encode(smooth(320, 192), "HEIF")
    size = b"ispe" + bytes(4) + struct.pack(">II", 320, 192)
    assert data.count(size) == 1
    for width, height in ((8, 8), (9000, 7000), (320, 193)):
        lie = data.replace(size, b"ispe" + bytes(4) + struct.pack(">II", width, height))
        assert "size" in refusal(lie)
    lie = data.replace(size, b"ispe" + bytes(4) + struct.pack(">II", 20000, 20000))
    assert "20000 x 20000 pixels, more than 70% (for Heif) of image.max_pixels" in refusal(lie)
    with (tmp_path / "hole.heic").open("wb") as file:
        file.write(data)
        file.truncate(1 << 40)
    assert "more than a HEIF photo" in refusal(tmp_path / "hole.heic")


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic 0 mif1 heic", "Heif"),
        (b"mif1 0 mif1 heic miaf", "Heif"),
        (b"mif1 0 mif1 avif miaf", "Avif"),
        (b"avif 0 mif1 heic", "Avif"),
        (b"mif1 0 mif1", "Heif"),
        (b"msf1 0", "Heif"),
        (b"avis 0", "Avif"),
    ],
)
def test_heif_and_avif_are_distinguished_by_their_brands(brands, kind):
    box = b"".join(b"\0\0\0\0" if word == b"0" else word for word in brands.split())
    data = struct.pack(">I", 8 + len(box)) + b"ftyp" + box
    assert f" {kind.upper()}" in refusal(data)


def test_damaged_heif_is_decoded_or_refused(capfd):
    rng = np.random.default_rng(0)
    files = [encode(smooth(96, 64), "HEIF", quality=60), tiled_heif(), encode(flat("RGBA", (1, 2, 3, 99)), "HEIF")]
    outcomes = set()
    for i in range(300):
        data = bytearray(files[i % 3])
        for place in rng.integers(0, len(data) if i % 2 else 400, rng.integers(1, 6)):
            data[place] = rng.integers(256)
        try:
            decoded(bytes(data))
        except BadImage as exc:
            outcomes.add(exc.reason)
        else:
            outcomes.add("")
    assert "" in outcomes
    assert len(outcomes) > 5
    assert capfd.readouterr() == ("", "")


# What is refused


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_a_file_cut_by_two_bytes_is_refused(kind, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(smooth(), kind)[:-2])
    with pytest.raises(BadImage) as caught:
        decode(path, ImageSettings(32))
    assert caught.value.path == path
    assert kind in caught.value.reason
    if kind != "WEBP":
        assert "truncated" in caught.value.reason
        assert "copy or download it again" in caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_file_cut_within_its_pixels_is_refused(kind):
    data = encode(smooth(), kind)
    assert "truncated" in refusal(data[: len(data) // 2])


def huge(kind):
    """A small file whose header promises 20000 x 20000 pixels."""
    side = 20000
    if kind == "PNG":
        return png(side, side, 8, 2, [])
    if kind == "TIFF":
        return tiff(side, side, 8, b"")
    if kind == "PPM":
        return b"P6 20000 20000 255\n"
    data = bytearray(encode(flat("RGB", (1, 2, 3)), kind))
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "JPEG":
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "GIF", "BMP", "JPEG"])
def test_a_huge_header_is_refused_before_any_pixel_is_decoded(kind):
    reason = refusal(huge(kind))
    assert reason.startswith("20000 x 20000 pixels, more than image.max_pixels")
    with pytest.raises(BadImage, match="20000 x 20000"):
        read_header(huge(kind), LIMIT)


def test_max_pixels_is_the_largest_allowed():
    data = encode(flat("RGB", (1, 2, 3), (40, 30)), "PNG")
    assert decode(data, ImageSettings(32, max_pixels=1200)).shape == (32, 32, 3)
    assert "image.max_pixels = 1199" in refusal(data, ImageSettings(32, max_pixels=1199))


def test_a_size_that_only_pillow_would_warn_of_is_decoded(tmp_path):
    data = encode(flat("1", 1, (10000, 9500)), "PNG")
    assert len(data) < 50_000
    assert read_header(data, LIMIT) == Header(10000, 9500, "PNG")
    assert decode(data, ImageSettings(32)).min() == 255


def many_scans(extra, side):
    """A JPEG file with a scan for each colour, and `extra` empty ones behind, each of which libjpeg goes through."""
    gray = encode(flat("L", 128, (side, side)), "JPEG")
    frame, start = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    colours = b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    new_frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, side, side, 3) + colours
    headers = [b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([i, 0]) + b"\0\x3f\0" for i in (1, 2, 3)]
    scans = b"".join(header + gray[start + 10 : -2] for header in headers)
    return gray[:frame] + new_frame + gray[frame + 13 : start] + scans + headers[2] * extra + b"\xff\xd9"


def test_a_jpeg_with_thousands_of_scans_is_refused():
    progressive = encode(flat("L", 128, (2000, 2000)), "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert "scans of 2000 x 2000 pixels" in refusal(progressive[:-2] + last * 2600 + b"\xff\xd9")
    assert colour_of(progressive[:-2] + last * 5 + b"\xff\xd9") == [128, 128, 128]
    assert refusal(many_scans(2600, 2000)).startswith("2603 scans of 2000 x 2000 pixels")
    assert difference(decoded(many_scans(5, 200)), 128) < 2


def run_length_bmp(width, height):
    """A BMP file of a run of one pixel in each row. Fuzzing found that such a file of 17 KB took ten seconds."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + b"\1\0\0\0" * height + b"\0\1"


@pytest.mark.parametrize(
    "data", [run_length_bmp(2_000_000, 10), b"P6 5000 1000 65535\n", b"P3 5000 1000 255\n", b"P1 20000 1000\n"]
)
def test_what_pillow_decodes_slowly_has_a_limit(data):
    assert "takes too long to decode" in refusal(data)


def test_small_run_length_bmp():
    assert colour_of(run_length_bmp(40, 30)) == [0, 0, 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\0" * 1000, "not an image"),
        (b"plain text", "not an image"),
        (b"\n <!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1", "git lfs pull"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "TIFF"),
    ],
)
def test_the_reason_names_what_is_not_an_image(data, words):
    assert words in refusal(data)
    with pytest.raises(BadImage):
        read_header(data, LIMIT)


def test_anything_but_a_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert refusal(tmp_path / "pipe.jpg") == "it is a pipe, not a regular file"
    assert "cannot be read" in refusal(tmp_path / "loop.jpg")
    assert refusal(tmp_path) == "this is a folder"
    assert refusal(tmp_path / "none.jpg") == "there is no such file"
    assert refusal(Path("/dev/zero")) == "it is a device, not a regular file"
    assert "cannot be read" in refusal(Path("a\0b"))


def test_reasons_are_safe_to_show(tmp_path):
    assert refusal(b"P6 1\x1b[31m 1 255\n").isprintable()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_a_damaged_tiff_prints_nothing(compression, capfd):
    image = smooth().convert("1") if compression == "group4" else smooth()
    data = bytearray(encode(image, "TIFF", compression=compression))
    for i in range(60, len(data) - 300, 37):
        data[i] ^= 0x5A
    with contextlib.suppress(BadImage):  # libtiff fills up the missing parts of a fax
        decode(bytes(data), ImageSettings(32))
    assert capfd.readouterr() == ("", "")


# The rest


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "HEIF"])
def test_headers(kind, tmp_path):
    path = tmp_path / "photo.anything"
    path.write_bytes(encode(smooth(), kind))
    assert read_header(path, LIMIT) == read_header(path.read_bytes(), LIMIT) == Header(300, 200, kind)
    assert (decode(path, ImageSettings(32)) == decode(path.read_bytes(), ImageSettings(32))).all()


def test_extensions_are_those_that_are_promised():
    names = "jpg jpeg jfif png webp bmp gif tif tiff avif ppm heic heif hif"
    assert {f".{name}" for name in names.split()} == EXTENSIONS


def test_many_threads_give_the_same_pixels():
    kinds = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "HEIF")
    files = [encode(smooth(300 + i, 200), kind) for i in range(3) for kind in kinds]
    files[7] = files[7][:100]

    def work(data):
        try:
            return decode(data, ImageSettings(32)).tobytes()
        except BadImage as exc:
            return exc.reason

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, files * 4)) == [work(data) for data in files] * 4


def test_threads_share_a_budget_of_pixels(monkeypatch):
    monkeypatch.setattr("finetune_cli.photos.decode._BUDGET", _PixelBudget(25_000))
    running, most, lock = [0], [0], threading.Lock()
    load = ImageFile.ImageFile.load

    def change(pixels):
        with lock:
            running[0] += pixels
            most[0] = max(most[0], running[0])

    def counted(image):
        change(image.width * image.height)
        time.sleep(0.01)
        try:
            return load(image)
        finally:
            change(-image.width * image.height)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    files = [encode(flat("RGB", (1, 2, 3), size), "BMP") for size in [(100, 100)] * 12 + [(200, 200)] * 2] * 2
    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(lambda data: decode(data, ImageSettings(32)), files))) == len(files)
    assert most[0] == 40_000  # the larger ones alone; otherwise two at a time
    assert running == [0]


def test_a_refused_picture_gives_its_pixels_back(monkeypatch):
    monkeypatch.setattr("finetune_cli.photos.decode._BUDGET", _PixelBudget(100))
    for _ in range(3):
        refusal(encode(smooth(), "BMP")[:-50])
    assert decoded(encode(smooth(), "BMP")).any()


def test_webp_may_have_fewer_pixels():
    data = encode(flat("RGB", (1, 2, 3), (40, 25)), "WEBP")
    assert decode(data, ImageSettings(32, max_pixels=1250)).any()
    assert "more than 80% (for WebP) of image.max_pixels = 1249" in refusal(data, ImageSettings(32, max_pixels=1249))


def test_pixels_may_be_written_to():
    decode(encode(smooth(), "PNG"), ImageSettings(32))[0, 0] = 0


def test_importing_the_decoder_imports_no_pillow():
    code = "import sys, finetune_cli.photos.decode; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Pillow images that a program has opened itself


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(
    "data",
    [
        encode(smooth(), "PNG"),
        encode(smooth(60, 40), "JPEG"),  # too small to be decoded at a fraction
        encode(smooth().convert("L"), "PNG"),
        encode(smooth().convert("1"), "PNG"),
        encode(smooth().convert("CMYK"), "TIFF"),
        encode(smooth().convert("P"), "GIF"),
        encode(smooth().convert("P"), "PNG", transparency=3),
        encode(Image.merge("RGBA", (*smooth().split(), smooth().convert("L"))), "PNG"),
        encode(Image.fromarray(np.arange(0, 60000, 50, np.uint16).reshape(30, 40)), "PNG"),
        png(
            40, 30, 16, 2, [struct.pack(">HHH", 40000, 300, 9) * 40] * 30, (b"tRNS", struct.pack(">HHH", 40000, 300, 9))
        ),
    ],
    ids=["png", "jpeg", "gray", "bits", "cmyk", "gif", "palette", "rgba", "gray 16", "transparent 16"],
)
def test_an_opened_image_becomes_what_its_file_does(data, resize):
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(from_image(image, ImageSettings(32, resize)), decoded(data, resize=resize))


def test_an_opened_image_is_left_as_it_is():
    colour = struct.pack(">HHH", 40000, 300, 9)
    data = png(40, 30, 16, 2, [colour * 40] * 30, (b"tRNS", colour))
    with Image.open(io.BytesIO(data)) as image:
        info = dict(image.info)
        from_image(image, ImageSettings(32))
        assert (image.size, image.mode, image.info) == ((40, 30), "RGB", info)


def test_a_large_opened_jpeg_stays_close_to_its_file():
    data = encode(smooth(1200, 800), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert 0 < difference(from_image(image, ImageSettings(32)), decoded(data)) < 0.5


def test_the_current_frame_of_an_opened_animation_counts():
    data = encode(flat("RGB", "red"), "GIF", save_all=True, append_images=[flat("RGB", "blue")])
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)
        assert from_image(image, ImageSettings(32))[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("F", (40, 30)), "floating-point"),
        (Image.new("RGB", (0, 30)), "0 x 30"),
        (Image.new("RGB", (101, 100)), "101 x 100 pixels, more than image.max_pixels = 10000"),
    ],
)
def test_opened_images_that_are_refused(image, words):
    with pytest.raises(BadImage) as caught:
        from_image(image, ImageSettings(32, max_pixels=10_000))
    assert words in caught.value.reason
    assert "\n" not in caught.value.reason
