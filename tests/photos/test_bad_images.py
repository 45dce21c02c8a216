"""Odd, broken and hostile files: each is decoded or refused with a reason, and does no harm.

Files are decoded in a child process (`decode_child.py`), so that a crash, a hang or a word on the terminal is seen.
"""

import io
import json
import os
import queue
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter

import pytest
from paths import PROGRAMS, ROOT, SOURCE
from photo_files import write_photo
from PIL import Image

from finetune_cli.cache.digests import DigestCache
from finetune_cli.errors import DataError
from finetune_cli.photos.dataset import DataSettings, iter_photos, load
from finetune_cli.photos.scan import refuse_bad
from finetune_cli.progress import ignore_progress

CORPUS = ROOT / "bad-images"
LONGEST_SECONDS = 10.0
MOST_MEMORY = 1_500_000_000


class Child:
    """The decoding process; `ask` gives its answer about a file, and starts another one when it died or hangs."""

    def __init__(self, stderr):
        self.stderr = stderr
        self._start()

    def _start(self):
        command = [sys.executable, "-W", "always", str(PROGRAMS / "decode_child.py")]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=environment
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def ask(self, path):
        self.process.stdin.write(json.dumps(str(path)) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=5 * LONGEST_SECONDS)
        except queue.Empty:
            line = None
        if line:
            return json.loads(line)
        self.close()
        code = self.process.returncode
        self._start()
        return {"path": str(path), "result": "FAULT: hangs" if line is None else f"FAULT: died with {code}"}

    def close(self):
        self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def answers(tmp_path):
    """A function: files -> their answers, after checking that nothing went wrong with any of them."""
    with (tmp_path / "stderr").open("w+b") as stderr:
        child = Child(stderr)

        def ask(paths):
            rows = [child.ask(path) for path in paths]
            assert [row for row in rows if row["result"].startswith("FAULT")] == []
            assert [row for row in rows if row["seconds"] > LONGEST_SECONDS] == []
            assert [row for row in rows if row["peak"] > MOST_MEMORY] == []
            stderr.seek(0)
            assert stderr.read() == b""
            return [row["result"] for row in rows]

        yield ask
        child.close()


@pytest.mark.timeout(900)
def test_the_corpus_is_decoded_or_refused(answers, record_property):
    if not list(CORPUS.glob("pillow-*")):
        pytest.skip("no corpus: run tools/fetch_bad_images.py")
    files = [path for path in sorted(CORPUS.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    results = answers(files)
    counts = Counter(result.split(":")[0] for result in results)
    record_property("bad images", dict(counts))
    print(f"{len(files)} files of the corpus: {dict(counts)}")
    assert set(counts) == {"decoded", "refused"}
    assert counts["decoded"] > counts["refused"] > 100
    by_name = dict(zip((path.name for path in files), results, strict=True))
    assert {by_name[f"hopper.{suffix}"] for suffix in ("jpg", "png", "gif", "bmp", "webp", "ppm", "tif")} == {"decoded"}


def opaque_animated_webp():
    """Three opaque frames; TensorFlow's decoder aborted the process on such a file."""
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 3
    return buffer.getvalue()


def png_of_zeros(side, depth):
    """A valid PNG file of side x side black pixels, made without ever holding them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side * depth + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_generated_hostile_files(answers, tmp_path):
    bomb = png_of_zeros(20_000, 1)
    assert len(bomb) < 50_000
    files = {
        "animation.webp": opaque_animated_webp(),
        "bomb.png": bomb,
        "largest.png": png_of_zeros(10_000, 1),
        "samples.tif": b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 277, 3, 1, 65535) + bytes(4),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    results = dict(zip(files, answers([tmp_path / name for name in files]), strict=True))
    assert results["animation.webp"] == results["largest.png"] == "decoded"
    assert results["bomb.png"].startswith("refused: 20000 x 20000 pixels, more than")
    assert results["samples.tif"].startswith("refused: ")


ODD_NAMES = [
    b"two\nlines.png",
    b"carriage\rreturn.png",
    b"'single' \"double\".png",
    b"=1+1.png",
    b"<b>bold.png",
    b"caf\xe9 \xff\xfe.png",
    b"\x1b[31mred.png",
    b" leading and trailing .png",
    b"-rf.png",
    b"$(reboot);`reboot`.png",
    b"a" * 250 + b".png",
    "日本語 \u202egnp.png".encode(),
]


def test_odd_names_pipes_and_loops(answers, tmp_path):
    for label in (b"=cmd|'/c calc'!A0", b"\xfc\n<i>"):
        for name in ODD_NAMES:
            write_photo(tmp_path / "data" / os.fsdecode(label) / os.fsdecode(name))
        os.mkfifo(tmp_path / "data" / os.fsdecode(label) / "pipe.png")
        (tmp_path / "data" / os.fsdecode(label) / "loop").symlink_to("..")
        (tmp_path / "data" / os.fsdecode(label) / "self.png").symlink_to("self.png")
    with DigestCache(tmp_path / "digests.sqlite") as memory:
        data = load(DataSettings(tmp_path / "data", val_split=0.2), memory, ignore_progress)
    assert memory.warnings == []
    assert len(data.train) + len(data.val) == 2 * len(ODD_NAMES)
    assert {os.fsencode(sample.path.name) for sample in data.train + data.val} == set(ODD_NAMES)
    (note,) = [note for note in data.notes if note.startswith("ignored in")]
    assert all(part in note for part in ("2 pipes", "2 broken links", "2 links to folders"))
    found = list(iter_photos([tmp_path / "data"]))
    assert sorted(found) == sorted(sample.path for sample in data.train + data.val)
    assert set(answers(found)) == {"decoded"}


def test_odd_names_of_bad_photos_stay_on_one_line(tmp_path):
    for name in ODD_NAMES:
        write_photo(tmp_path / "a" / os.fsdecode(name)).write_bytes(b"no photo")
        write_photo(tmp_path / "b" / os.fsdecode(name))
    data = load(DataSettings(tmp_path, val_split=0.2), DigestCache(None), ignore_progress)
    with pytest.raises(DataError) as caught:
        refuse_bad(data.bad, data.photos, "error")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(ODD_NAMES) + 2
    assert all(line.isprintable() for line in lines)
