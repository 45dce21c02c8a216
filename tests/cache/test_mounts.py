import os

import pytest

from finetune_cli.cache import mounts
from finetune_cli.cache.mounts import ChangeTimes

DEVICE = os.makedev(8, 1)
ELSEWHERE = os.makedev(0, 77)


@pytest.fixture
def trusted(tmp_path, monkeypatch):
    """Whether the ctime of a file counts, when these are the mounts."""

    def ask(lines, path="/data/a/1.jpg", device=DEVICE):
        (tmp_path / "mountinfo").write_text(lines)
        monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
        return ChangeTimes().trusted(path, device)

    return ask


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ext4", True), ("xfs", True), ("btrfs", True), ("tmpfs", True), ("zfs", True), ("f2fs", True), ("vfat", False),
     ("squashfs", False), ("iso9660", False), ("overlay", False), ("fuse.s3fs", False), ("nfs4", False),
     ("virtiofs", False), ("9p", False), ("unheard-of", False)],
)  # fmt: skip
def test_types(trusted, kind, expected):
    assert (
        trusted(f"25 1 8:1 / /data rw,relatime shared:1 master:2 - {kind} /dev/sda1 rw,errors=continue\n") is expected
    )


def test_what_is_mounted_read_only_may_be_an_image(trusted):
    assert not trusted("25 1 8:1 / /data ro,relatime - ext4 /dev/loop0 ro\n")
    # Others write what this mount only shows: a volume that a container may not change.
    assert trusted("25 1 8:1 / /data ro,relatime - ext4 /dev/sda1 rw\n")


def test_a_device_that_is_not_listed_is_looked_up_by_its_path(trusted):
    """The subvolumes of btrfs have devices of their own; of mounts on one place, the last one is seen."""
    lines = "20 1 8:2 / / rw - ext4 /dev/sda2 rw\n21 20 0:50 /sub /data rw - btrfs /dev/sdb rw\n"
    assert trusted(lines, device=ELSEWHERE)
    assert trusted(lines, path="/database/1.jpg", device=ELSEWHERE)
    assert not trusted(lines.replace("btrfs", "overlay"), device=ELSEWHERE)
    assert trusted(lines.replace("btrfs", "overlay"), path="/database/1.jpg", device=ELSEWHERE)
    hidden = "22 21 0:51 / /data rw - fuse.gcsfuse bucket rw\n"
    assert not trusted(lines + hidden, device=ELSEWHERE)


def test_spaces_and_odd_bytes_in_a_mount_point(trusted):
    lines = "20 1 8:2 / / rw - overlay overlay rw\n21 20 0:50 / /my\\040data rw - btrfs /dev/sdb rw\n"
    assert trusted(lines, path="/my data/1.jpg", device=ELSEWHERE)
    assert not trusted(lines, path="/my/1.jpg", device=ELSEWHERE)


def test_without_the_list_no_ctime_counts(trusted, monkeypatch, tmp_path):
    assert not trusted("")
    assert not trusted("nonsense\n\n1 2 x:y / / rw - ext4 a rw\n1 2 8:1 / / rw - ext4\n")
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "absent")
    assert not ChangeTimes().trusted(tmp_path, DEVICE)
