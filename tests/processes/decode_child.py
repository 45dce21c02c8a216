"""Decodes the files that it is told of, one a line (a JSON string), and answers each with a line of JSON.

Run as a process of its own, under limits, so that a crash, a hang or a word on the terminal belongs to one file. Given
``-``, the answer is about the interpreter itself.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from finetune_cli.errors import BadImage
from finetune_cli.photos import photo
from finetune_cli.photos.decode import ImageSettings, decode

ADDRESS_SPACE = 6 << 30  # more than may be used, so that the peak is measured and not hidden by a `MemoryError`


def peak_memory() -> int:
    """Bytes. Not from getrusage, which counts the memory of the process that this one was forked from, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def outcome(path, settings):
    """`decoded`, or the reason of a refusal, or what is wrong with the decoder."""
    try:
        pixels = decode(path, settings)
    except BadImage as exc:
        fault = "\n" in exc.reason or not exc.reason or exc.path != path
        return f"FAULT: reason {exc.reason!r}" if fault else f"refused: {exc.reason}"
    except BaseException as exc:
        return f"FAULT: {type(exc).__name__}: {exc}"
    if pixels.dtype != np.uint8 or pixels.shape != (settings.size, settings.size, 3):
        return f"FAULT: {pixels.dtype} {pixels.shape}"
    if not np.array_equal(pixels, from_photo_py(path, settings)):
        return "FAULT: photo.py beside an export gives other pixels"
    return "decoded"


def from_photo_py(path, settings):
    """The pixels that `photo.py` gives, which opens files with Pillow alone."""
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        extent = photo.reduced(image, settings.size, settings.resize)
        return photo.square(image, extent, settings.size, settings.resize)


def main():
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    Image.MAX_IMAGE_PIXELS = None
    pillow_heif.register_heif_opener()
    for line in sys.stdin:
        path = Path(json.loads(line))
        started = time.monotonic()
        results = [outcome(path, ImageSettings(resize=resize)) for resize in ("crop", "pad")]
        answer = {
            "path": str(path),
            "result": results[0] if len({result.split(":")[0] for result in results}) == 1 else f"FAULT: {results}",
            "seconds": time.monotonic() - started,
            "peak": peak_memory(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
