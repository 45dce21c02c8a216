"""Odd, broken and hostile files through the bytes signature: each is answered or refused, and the process lives on.

The files go to one process that has TensorFlow and nothing else (`serve_child.py`); after a crash answers are missing.
"""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from paths import PROGRAMS, ROOT
from PIL import Image

CORPUS = ROOT / "bad-images"
LONGEST_SECONDS = 20.0
MOST_MEMORY = 2_500_000_000


@pytest.fixture
def ask(exported, tmp_path):
    """A function: files -> the answers of the SavedModel's process, after checking that it lived and behaved."""

    def run(paths):
        command = [sys.executable, PROGRAMS / "serve_child.py", exported.exports[0].folder]
        lines = "".join(json.dumps(str(path)) + "\n" for path in paths)
        child = subprocess.run(
            command,
            input=lines,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
            cwd=tmp_path,
            errors="replace",
        )
        rows = [json.loads(line) for line in child.stdout.splitlines()][1:]
        assert [row["path"] for row in rows] == [str(path) for path in paths], child.stderr[-2000:]
        assert child.returncode == 0
        assert [row for row in rows if row["seconds"] > LONGEST_SECONDS] == []
        assert [row for row in rows if row["peak"] > MOST_MEMORY] == []
        for row in rows:
            answered = row["status"] == "ok"
            assert np.sum(row["probabilities"]) == pytest.approx(int(answered), abs=1e-4)
            assert bool(row["label"]) == answered
            assert answered or row["status"].startswith(("neither a JPEG nor a PNG", "damaged, or of more than"))
        return ["answered" if row["status"] == "ok" else "refused" for row in rows]

    return run


def encoded(kind, **options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_zeros(side, *chunks):
    """A valid one-bit PNG file of black pixels, made without ever holding them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def hostile_files():
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue")]
    animations = {}
    for kind, options in (("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {})):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=100, **options)
        animations[f"animated.{kind.lower()}"] = buffer.getvalue()
    text = b"comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    return animations | {
        "empty": b"",
        "text.jpg": b"no image at all",
        "start.jpg": b"\xff\xd8\xff",
        "start.png": b"\x89PNG\r\n\x1a\n",
        "bomb.png": png_of_zeros(20_000),
        "largest.png": png_of_zeros(10_000),
        "text-bomb.png": png_of_zeros(100, (b"zTXt", text)),
        "profile-bomb.png": png_of_zeros(100, (b"iCCP", text)),
        "photo.bmp": encoded("BMP"),
        "photo.tif": encoded("TIFF"),
        "photo.webp": encoded("WEBP"),
        "photo.gif": encoded("GIF"),
        "photo.jpg": encoded("JPEG"),
        "photo.png": encoded("PNG"),
    }


def mutations():
    """Valid JPEG and PNG files, cut at many places and with bytes changed at random."""
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (("JPEG", {"exif": exif}), ("JPEG", {"progressive": True}), ("PNG", {})):
        data = encoded(kind, **options)
        for end in np.linspace(0, len(data) - 1, 40).astype(int):
            yield data[:end]
        for _ in range(120):
            changed = bytearray(data)
            for place in rng.integers(0, len(data) if rng.random() < 0.5 else 200, rng.integers(1, 10)):
                changed[place] = rng.choice([0, 255, 127, rng.integers(0, 256)])
            yield bytes(changed)


def test_hostile_files_are_refused_and_good_ones_answered(ask, tmp_path):
    files = hostile_files()
    for i, data in enumerate(mutations()):
        files[f"mutation-{i}"] = data
    paths = [tmp_path / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    results = dict(zip(files, ask(paths), strict=True))
    answered = {name for name, result in results.items() if result == "answered" and "mutation" not in name}
    assert answered >= {"photo.jpg", "photo.png", "animated.png", "largest.png"}
    assert answered <= {"photo.jpg", "photo.png", "animated.png", "largest.png", "text-bomb.png", "profile-bomb.png"}


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_corpus_is_answered_or_refused(ask):
    if not list(CORPUS.glob("pillow-*")):
        pytest.skip("no corpus: run tools/fetch_bad_images.py")
    paths = [path for path in sorted(CORPUS.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    results = ask(paths)
    print(f"{len(paths)} files of the corpus: {results.count('answered')} answered, {results.count('refused')} refused")
    assert min(results.count("answered"), results.count("refused")) > 100
