"""Look for files that make the decoder crash, hang, raise anything but `BadImage`, print, or eat memory.

    python tools/fuzz_decode.py --minutes 10

Hypothesis mutates valid files of every format (and those of `bad-images`, where present). Rounds run in child
processes, so that a crash or a hang is seen from outside; the last file of such a round, and every slow one, is kept in
`bad-images/findings` under its digest, for a test to be made of it. Ends with figures, and with exit code 1 if anything
was found.
"""

import argparse
import hashlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "bad-images"
FINDINGS = CORPUS / "findings"
EXAMPLES_A_ROUND = 3000
LONGEST_SECONDS = 10.0
MOST_MEMORY = 1_500_000_000
LARGEST_SEED = 20_000
INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80")


def seeds() -> list[bytes]:
    """Small valid files of every format and of many pixel kinds, and the small ones of the corpus."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8).repeat(2, 0))
    files = []

    def add(mode: str, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind, **options)
        files.append(buffer.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "CMYK"):
        add(mode, "JPEG", exif=exif)
        add(mode, "JPEG", progressive=True, quality=95)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        add(mode, "PNG")
    add("RGB", "PNG", transparency=(1, 2, 3), exif=exif)
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma"):
        add("RGB", "TIFF", compression=compression, exif=exif)
    for mode in ("RGBA", "P", "CMYK", "F", "I;16"):
        add(mode, "TIFF")
    for compression in ("group3", "group4", "tiff_ccitt"):
        add("1", "TIFF", compression=compression)
    for mode in ("RGB", "RGBA"):
        add(mode, "WEBP", exif=exif)
        add(mode, "WEBP", lossless=True)
        add(mode, "AVIF")
        add(mode, "BMP")
    add("P", "BMP")
    add("1", "BMP")
    add("P", "GIF")
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        add("RGB", kind, save_all=True, append_images=[picture.transpose(Image.Transpose.ROTATE_180)])
    for mode in ("RGB", "L", "1"):
        add(mode, "PPM")
    files += [b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12\n", b"P1 3 2 1 0 1 0 1 0\n", b"P5 4 2 1000\n" + bytes(16)]
    others = (path for path in sorted(CORPUS.rglob("*")) if path.is_file() and path.suffix != ".go")
    return files + [path.read_bytes() for path in others if path.stat().st_size <= LARGEST_SEED]


def with_valid_checksums(data: bytes) -> bytes:
    """A PNG file with correct checksums of its chunks, so that decoders read their content."""
    out, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + min(length, len(data))]
        out += data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position += 12 + length
    return bytes(out)


def mutated(files: list[bytes], random: Random) -> bytes:
    """One of `files` after one to six changes, many of them near its start, where the headers are."""
    data = bytearray(random.choice(files))
    for _ in range(random.choice([1, 1, 2, 3, 6])):
        reach = min(len(data), random.choice([40, 200, 1000, len(data), len(data)]))
        position = random.randrange(min(2, reach), reach + 1)
        length = random.choice([1, 2, 4, 16, 64, 300])
        change = random.choice(["bit", "bit", "byte", "value", "delete", "repeat", "cut", "insert", "splice"])
        if change == "bit":
            data[position : position + 1] = bytes(b ^ 1 << random.randrange(8) for b in data[position : position + 1])
        elif change == "byte":
            data[position : position + 1] = random.randbytes(1)
        elif change == "value":
            value = random.choice(INTERESTING)
            data[position : position + len(value)] = value
        elif change == "delete":
            del data[position : position + length]
        elif change == "repeat":
            data[position:position] = data[position : position + length] * random.choice([1, 2, 10, 1000])
        elif change == "cut":
            del data[position:]
        elif change == "insert":
            data[position:position] = random.randbytes(random.randrange(1, 8))
        else:
            other = random.choice(files)
            start = random.randrange(len(other) + 1)
            data[position : position + length] = other[start : start + length]
    return with_valid_checksums(bytes(data)) if data[:4] == b"\x89PNG" and random.random() < 0.8 else bytes(data)


def keep(data: bytes) -> str:
    """Write a file that did harm, or nearly so, to the folder of findings; its name there."""
    name = hashlib.sha256(data).hexdigest()[:16]
    (FINDINGS / name).write_bytes(data)
    return name


def child(number: int, current: Path) -> None:
    """One round: decode `EXAMPLES_A_ROUND` mutated files; print the counts, and what was wrong, as JSON."""
    from finetune_cli.errors import BadImage
    from finetune_cli.photos.decode import ImageSettings, decode

    counts: Counter[str] = Counter()
    slowest = 0.0
    files = seeds()

    @seed(number)
    @settings(
        max_examples=EXAMPLES_A_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def round_(choice: int) -> None:
        nonlocal slowest
        data = mutated(files, Random(choice))
        current.write_bytes(data)
        started = time.monotonic()
        try:
            pixels = decode(data, ImageSettings(64))
            counts["decoded"] += 1
            assert pixels.shape == (64, 64, 3)
        except BadImage as exc:
            counts["refused"] += 1
            if not exc.reason.isprintable() or not exc.reason:
                raise AssertionError(f"the reason is {exc.reason!r}") from exc
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        if seconds > LONGEST_SECONDS / 2:
            keep(data)

    round_()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**counts, "slowest": slowest, "peak": peak}))


def watch(process: subprocess.Popen[str], current: Path) -> bool:
    """Wait for a round; whether it had to be killed because one file took too long."""
    while process.poll() is None:
        time.sleep(0.5)
        if current.exists() and time.time() - current.stat().st_mtime > LONGEST_SECONDS + 20:
            process.kill()
            return True
    return False


def play(number: int, current: Path, totals: Counter[str]) -> list[str]:
    """One round in a child process: what was wrong with it, in words."""
    current.unlink(missing_ok=True)
    command = [sys.executable, "-W", "always", __file__, "--child", str(number), "--current", str(current)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        hung = watch(process, current)
        output, errors = process.communicate()
    if hung:
        return [f"hang of more than {LONGEST_SECONDS:.0f} s"]
    if process.returncode:
        return [f"exit {process.returncode}: {errors[-1500:]}"]
    answer = json.loads(output)
    totals["tried"] += answer.get("decoded", 0) + answer.get("refused", 0)
    totals.update({key: answer.get(key, 0) for key in ("decoded", "refused")})
    totals["slowest ms"] = max(totals["slowest ms"], round(answer["slowest"] * 1000))
    totals["peak MB"] = max(totals["peak MB"], answer["peak"] // 1_000_000)
    problems = [f"printed: {errors[:1500]}"] if errors else []
    problems += [f"took {answer['slowest']:.1f} s"] if answer["slowest"] > LONGEST_SECONDS else []
    return problems + ([f"peak of {answer['peak']} bytes"] if answer["peak"] > MOST_MEMORY else [])


def main() -> int:
    """Play rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--current", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.current)
        return 0
    FINDINGS.mkdir(parents=True, exist_ok=True)
    current = FINDINGS / f".current-{os.getpid()}"
    totals: Counter[str] = Counter()
    found = 0
    started = time.monotonic()
    number = arguments.seed
    while time.monotonic() - started < 60 * arguments.minutes:
        for problem in play(number, current, totals):
            found += 1
            last = keep(current.read_bytes()) if current.exists() else "none"
            print(f"round {number}, last file {last}: {problem}", flush=True)
        number += 1
    current.unlink(missing_ok=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes, {number - arguments.seed} rounds, found {found}; {dict(totals)}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
