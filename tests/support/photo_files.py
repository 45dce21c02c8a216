"""Small photos for tests that care about files and not about pixels."""

import hashlib
import struct
import zlib
from pathlib import Path


def photo_bytes(content: object) -> bytes:
    """A valid 2 x 2 PNG file whose bytes depend on `content`; written by hand, because it is fast."""
    colour = hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).digest()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + colour[:6] + b"\0" + colour[6:12]))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def write_photo(path: Path, content: object = None) -> Path:
    """Write a photo whose content is that of `content`, by default different for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo_bytes(str(path) if content is None else content))
    return path


def write_photos(folder: Path, names: str) -> None:
    """Write a photo for each of the blank-separated `names` below `folder`."""
    for name in names.split():
        write_photo(folder / name)
