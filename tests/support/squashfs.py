"""A writer of squashfs images in which all times are alike, as ``mksquashfs -all-time`` makes them.

Format: Documentation/filesystems/squashfs.rst in the Linux kernel, and https://dr-emann.github.io/squashfs/. Nothing is
compressed; at most 8 KB of inodes and of directories.
"""

import struct
from pathlib import Path

_BLOCK = 1 << 17
_NONE = 0xFFFFFFFF
_NO_TABLE = 0xFFFFFFFFFFFFFFFF
_UNCOMPRESSED_BLOCK, _UNCOMPRESSED_METADATA = 1 << 24, 1 << 15


def write_image(image: Path, folders: dict[str, dict[str, bytes]], time: int) -> None:
    """Write folders of files (name -> bytes) whose times are all `time`, in seconds."""
    data, inodes, directories = bytearray(), bytearray(), bytearray()
    number = 0

    def inode(kind: int, mode: int, rest: bytes) -> int:
        """Append an inode; its offset."""
        nonlocal number
        number += 1
        offset = len(inodes)
        inodes.extend(struct.pack("<HHHHII", kind, mode, 0, 0, time, number) + rest)
        return offset

    def directory(entries: list[tuple[str, int, int, int]]) -> int:
        """Append an inode for a directory of (name, inode's offset and number, type), sorted by name; its offset."""
        start = len(directories)
        directories.extend(struct.pack("<III", len(entries) - 1, 0, entries[0][2]))
        for name, offset, own, kind in entries:
            directories.extend(struct.pack("<HhHH", offset, own - entries[0][2], kind, len(name) - 1) + name.encode())
        size = len(directories) - start + 3
        return inode(1, 0o755, struct.pack("<IIHHI", 0, 2 + len(entries), size, start, 1))

    tops = []
    for folder in sorted(folders):
        entries = []
        for name, content in sorted(folders[folder].items()):
            sizes = [len(content[i : i + _BLOCK]) | _UNCOMPRESSED_BLOCK for i in range(0, len(content), _BLOCK)]
            place = struct.pack("<IIII", 96 + len(data), _NONE, 0, len(content))
            data += content
            entries.append((name, inode(2, 0o644, place + struct.pack(f"<{len(sizes)}I", *sizes)), number, 2))
        tops.append((folder, directory(entries), number, 1))
    root = directory(tops)

    tables = [struct.pack("<H", len(t) | _UNCOMPRESSED_METADATA) + t for t in (inodes, directories, b"\0\0\0\0")]
    inode_table = 96 + len(data)
    directory_table = inode_table + len(tables[0])
    id_block = directory_table + len(tables[1])
    id_table = id_block + len(tables[2])
    used = id_table + 8
    superblock = struct.pack(
        "<IIIIIHHHHHHQQQQQQQQ",
        0x73717368, number, time, _BLOCK, 0, 1, 17, 0, 1, 4, 0,
        root, used, id_table, _NO_TABLE, inode_table, directory_table, _NO_TABLE, _NO_TABLE,
    )  # fmt: skip
    whole = superblock + data + b"".join(tables) + struct.pack("<Q", id_block)
    image.write_bytes(whole + bytes(-len(whole) % 4096))
