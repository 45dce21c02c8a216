"""Which file systems keep a file's ctime, so that an unchanged one means an unchanged file.

A program can set a file's mtime back; its ctime is set by the file system at every change of the content. But an image
of a file system (squashfs, ISO) holds whatever times its author chose, FAT has no ctime, and a network or FUSE file
system passes on what its server reports. There, other photos under the same names can look unchanged.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Not overlayfs: it shows the times of its lower layers, which may be images. Not NFS, SMB, 9p, virtiofs or FUSE.
_KEEP_CTIME = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "zfs", "bcachefs", "jfs"))
_ESCAPE = re.compile(r"\\([0-7]{3})")
MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class _Mount:
    """A line of `MOUNTINFO`; `keeps_ctime` is False also where nothing can be written, as on a mounted image."""

    device: int
    point: str
    keeps_ctime: bool


class ChangeTimes:
    """Whether a file's ctime can be trusted. Where the mounts cannot be read (not on Linux), none can."""

    def __init__(self) -> None:
        try:
            # Bytes that are not UTF-8 are kept, as in all paths.
            lines = os.fsdecode(MOUNTINFO.read_bytes()).splitlines()
        except OSError:
            lines = []
        self._mounts = [mount for line in lines if (mount := _parse(line)) is not None]
        self._known: dict[int, bool] = {}

    def trusted(self, path: Path, device: int) -> bool:
        """Whether the ctime of the file at `path`, on `device` (its ``st_dev``), changes with every change of it."""
        if device not in self._known:
            self._known[device] = self._find(path, device)
        return self._known[device]

    def _find(self, path: Path, device: int) -> bool:
        found = [mount for mount in self._mounts if mount.device == device]
        if not found:
            # The subvolumes of btrfs and the layers of overlayfs have devices of their own, which are not listed.
            real = os.path.realpath(path)
            above = [mount for mount in self._mounts if os.path.commonpath((mount.point, real)) == mount.point]
            longest = max((len(mount.point) for mount in above), default=0)
            found = [mount for mount in above if len(mount.point) == longest][-1:]  # the last one hides the others
        return bool(found) and all(mount.keeps_ctime for mount in found)


def _parse(line: str) -> _Mount | None:
    """The mount that a line describes, see proc_pid_mountinfo(5): fields, a hyphen, then type, source and options."""
    fields, _, rest = line.partition(" - ")
    try:
        _number, _parent, device, _root, point = fields.split(" ")[:5]
        kind, _source, options = rest.split(" ")[:3]
        major, minor = map(int, device.split(":"))
    except ValueError:
        return None
    point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), point)
    writable = "rw" in options.split(",")
    return _Mount(os.makedev(major, minor), point, kind in _KEEP_CTIME and writable)
