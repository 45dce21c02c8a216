"""Photos decoded and resized by TensorFlow operations are those of `photos/images.py`; strangers' files are refused."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from finetune_cli.exports import tf_photos
from finetune_cli.keras_setup import import_keras
from finetune_cli.photos import codecs
from finetune_cli.photos.decode import ImageSettings, decode

SIZE = 48
LIMIT = 2_000_000
RESIZES = ["crop", "squash", "pad"]


@functools.cache
def graph(resize="crop", size=SIZE):
    """Functions of the three inputs: files, uint8 pixels and float32 pixels."""
    import_keras()
    import tensorflow as tf

    made = tf_photos.PhotoGraph(ImageSettings(size, resize, LIMIT))
    shape = tf.TensorSpec((size, size, 3), tf.float32)
    pixels = (None, None, None, 3)
    return tuple(
        tf.function(function, input_signature=[tf.TensorSpec(lengths, kind)], autograph=False)
        for function, lengths, kind in (
            (lambda files: tf.map_fn(made.decoded, files, fn_output_signature=shape), (None,), tf.string),
            (made.fitted, pixels, tf.uint8),
            (made.fitted, pixels, tf.float32),
        )
    )


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width=150, height=110, seed=0):
    """Coarse noise: detail at every place, and none that a JPEG file loses."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def difference(data, resize="crop", size=SIZE):
    """Mean difference in grey levels between the graph and the decoder of the run."""
    mine = graph(resize, size)[0]([data])[0].numpy()
    assert mine.shape == (size, size, 3)
    assert mine.dtype == np.float32
    return np.abs(mine - decode(data, ImageSettings(size, resize, LIMIT)).astype(np.float32)).mean()


def refusal(data, resize="crop"):
    import_keras()
    import tensorflow as tf

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        graph(resize)[0]([encode(picture(), "PNG"), data])
    return caught.value.message


@pytest.mark.parametrize(("resize", "size"), [("crop", 224), ("squash", SIZE), ("pad", SIZE)])
def test_real_photos(shared_data, resize, size):
    paths = (
        sorted(shared_data.glob("hymenoptera/val/*/*.jpg"))[::12] + sorted(shared_data.glob("scenes/test/*/*"))[::40]
    )
    found = [difference(path.read_bytes(), resize, size) for path in paths]
    assert max(found) < 0.3
    assert np.mean(found) < 0.03


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
    "size",
    [(48, 48), (49, 48), (150, 110), (110, 150), (31, 40), (40, 300), (300, 20), (1, 1), (2, 3), (900, 1), (1000, 700),
     (701, 1203)],
    ids=str,
)  # fmt: skip
def test_every_shape_of_png(size, resize):
    assert difference(encode(picture(*size), "PNG"), resize) < 0.35


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(150, 110), (192, 192), (400, 220), (1001, 701), (1600, 1200), (8, 9)], ids=str)
def test_every_fraction_of_jpeg(size, resize):
    """96 pixels are twice what is wanted: these are decoded at 1/1, 1/2, 1/4 and 1/8 of their size."""
    assert difference(encode(picture(*size), "JPEG", quality=92), resize) < 0.35


def png(depth, colour_type, raw, *chunks, size=(2, 2)):
    """A PNG file by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def with_alpha(image):
    image = image.convert("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    return image


KINDS = {
    "gray JPEG": lambda: encode(picture().convert("L"), "JPEG"),
    "CMYK JPEG": lambda: encode(picture().convert("CMYK"), "JPEG"),
    "progressive JPEG": lambda: encode(picture(), "JPEG", progressive=True),
    "4:4:4 JPEG": lambda: encode(picture(), "JPEG", subsampling=0),
    "gray PNG": lambda: encode(picture().convert("L"), "PNG"),
    "one-bit PNG": lambda: encode(picture().convert("1"), "PNG"),
    "palette PNG": lambda: encode(picture().quantize(32), "PNG"),
    "palette PNG, transparent": lambda: encode(with_alpha(picture()).quantize(32), "PNG"),
    "RGBA PNG": lambda: encode(with_alpha(picture()), "PNG"),
    "LA PNG": lambda: encode(with_alpha(picture()).convert("LA"), "PNG"),
    "16-bit gray PNG": lambda: encode(Image.fromarray(np.arange(0, 60000, 4, np.uint16).reshape(100, 150)), "PNG"),
    "16-bit RGB PNG": lambda: png(16, 2, b"\0" + bytes(range(12)) + b"\0" + bytes(range(200, 212))),
    "gray PNG, transparent colour": lambda: png(8, 0, b"\0\7\7\0\7\7", (b"tRNS", b"\0\7")),
    "RGB PNG, transparent colour": lambda: png(8, 2, b"\0\1\2\3\1\2\3\0\1\2\3\1\2\3", (b"tRNS", b"\0\1\0\2\0\3")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel(kind):
    assert difference(KINDS[kind]()) < 1


def test_a_transparent_colour_is_white():
    assert (graph()[0]([KINDS["RGB PNG, transparent colour"]()]).numpy() == 255).all()


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_jpeg_files_are_turned_upright(orientation, endian, resize):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    data = encode(picture(131, 97), "JPEG", exif=exif, quality=95)
    assert (b"MM\0*" in data) == (endian == ">")
    assert difference(data, resize) < 0.35


def test_damaged_exif_data_change_nothing_or_turn_the_photo():
    import_keras()
    import tensorflow as tf

    from finetune_cli.exports import tf_exif

    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(picture(), "JPEG", exif=exif))
    start = data.index(b"Exif\0\0")
    rng = np.random.default_rng(0)
    read = tf.function(lambda b: tf_exif.orientation(tf, b), input_signature=[tf.TensorSpec((), tf.string)])
    for _ in range(500):
        changed = data.copy()
        for place in rng.integers(start, start + 40, rng.integers(1, 8)):
            changed[place] = rng.integers(0, 256)
        assert 1 <= read(bytes(changed)).numpy() <= 8
    for end in range(start, start + 40):
        assert read(bytes(data[:end])).numpy() in {1, 6}


@pytest.mark.parametrize("resize", RESIZES)
def test_pixels_of_any_size_are_resized_as_files_are(resize):
    images = [picture(90, 61, seed) for seed in range(3)]
    batch = np.stack([np.asarray(image) for image in images])
    expected = np.concatenate([graph(resize)[0]([encode(image, "PNG")]).numpy() for image in images])
    assert (graph(resize)[1](batch).numpy() == expected).all()
    assert (graph(resize)[2](batch.astype(np.float32)).numpy() == expected).all()


def test_pixels_of_the_wanted_size_stay_as_they_are():
    photos = np.random.default_rng(0).random((2, SIZE, SIZE, 3), np.float32) * 255
    for resize in RESIZES:
        assert (graph(resize)[2](photos).numpy() == photos).all()


def test_no_photo_at_all():
    assert graph()[0](np.array([], dtype=object).astype(bytes)).shape == (0, SIZE, SIZE, 3)
    assert graph()[1](np.zeros((0, 60, 70, 3), np.uint8)).shape == (0, SIZE, SIZE, 3)


def animated_webp():
    frames = [picture(30, 20, seed) for seed in range(3)]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\x89PNG", b"<html>", b"GIF89a" + bytes(50), encode(picture(), "BMP"), encode(picture(), "GIF"),
     encode(picture(), "WEBP"), animated_webp(), encode(picture(), "TIFF")],
    ids=["empty", "one byte", "PNG's start", "HTML", "GIF header", "BMP", "GIF", "WebP", "animated WebP", "TIFF"],
)  # fmt: skip
def test_other_files_are_refused_by_their_first_bytes(data):
    assert "neither a JPEG nor a PNG" in refusal(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_files_are_refused(kind):
    data = encode(picture(), kind)
    for end in (3, 8, 20, 24, 30, len(data) // 2, len(data) - 20):
        refusal(data[:end])


def test_large_files_are_refused_by_their_header():
    header = png(8, 2, b"", size=(40_000, 40_000))
    assert f"more than {LIMIT} pixels" in refusal(header)
    assert f"more than {LIMIT} pixels" in refusal(png(8, 2, b"", size=(2**31 - 1, 2**31 - 1)))
    assert f"more than {LIMIT} pixels" in refusal(encode(Image.new("L", (2000, 1001)), "JPEG"))
    assert difference(encode(Image.new("L", (2000, 1000)), "PNG")) == 0


def test_a_jpeg_of_a_million_scans_is_refused():
    data = encode(Image.new("RGB", (1000, 1000), "red"), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert "too many scans" in refusal(data[:-2] + scan * 11_000 + data[-2:])
    assert tf_photos.MOST_SCANNED_PIXELS == codecs._MOST_SCANNED_PIXELS
