"""Other photos under the same names, sizes and times: the digest cache never gives the old photos' answers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import squashfs

from finetune_cli.cache import mounts
from finetune_cli.cache.digests import Facts
from finetune_cli.config.load import load_config
from finetune_cli.errors import ChangedPhoto
from finetune_cli.photos import dataset, scan
from finetune_cli.progress import Silent
from finetune_cli.training import check as command_check
from finetune_cli.training import pipeline as command_train
from finetune_cli.training import prepare
from finetune_cli.training.requirements import check_settings

PHOTOS = 8
TIME = 1_600_000_000
COLOURS = {"a": (220, 60, 40), "b": (40, 80, 220)}


def photo(label: str, seed: int) -> bytes:
    """A noisy picture in the colour of `label`, as PPM: 64 x 64 pixels always take the same number of bytes."""
    noise = np.random.default_rng(seed).integers(-30, 30, (64, 64, 3))
    pixels = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
    return b"P6 64 64 255\n" + pixels.tobytes()


def photos(wrong: int) -> dict[str, dict[str, bytes]]:
    """Train and validation photos of a and b; the first `wrong` validation photos of each show the other class."""
    shown = {}
    for split, first in (("train", 0), ("val", 100)):
        for label, other in (("a", "b"), ("b", "a")):
            colours = [other if split == "val" and i < wrong else label for i in range(PHOTOS)]
            seed = 1000 * wrong + first + 10 * (label == "b")
            shown[f"{split}-{label}"] = {f"{i}.ppm": photo(colour, seed + i) for i, colour in enumerate(colours)}
    return shown


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    from runs_fixture import tiny_backbone

    path = tmp_path_factory.mktemp("backbone") / "tiny.keras"
    tiny_backbone().save(path)
    return path


@pytest.fixture
def table(tmp_path):
    """A table of the photos below ``photos``, which need not be there yet."""
    lines = [
        f"photos/{folder}/{name},{folder[-1]},{folder[:-2]}" for folder, names in photos(0).items() for name in names
    ]
    (tmp_path / "photos.csv").write_text("\n".join(["image_path,label,split", *lines]))
    return tmp_path / "photos.csv"


def settings(table, backbone):
    folder = table.parent
    return load_config(
        None,
        [
            f"data.train={table}",
            f"model.backbone={backbone}",
            "image.size=64",
            "augmentation=null",
            "training.l2=0.001",
            f"runtime.cache_dir={folder / 'cache'}",
            f"output.directory={folder / 'runs'}",
        ],
    )


def write(folder, wrong: int) -> None:
    for name, files in photos(wrong).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
            os.utime(folder / name / file, (TIME, TIME))


@pytest.fixture
def fixed_ctime(tmp_path, monkeypatch):
    """Files below ``photos`` are on a file system that shows one ctime for all; returns what names its type."""
    real, below = os.stat, f"{tmp_path}/photos/"

    def fake(path, *arguments, **options):
        status = real(path, *arguments, **options)
        if not str(path).startswith(below):
            return status
        times = {"st_atime_ns": TIME * 10**9, "st_mtime_ns": status.st_mtime_ns, "st_ctime_ns": TIME * 10**9}
        return os.stat_result(list(status), times)

    def mounted(kind: str) -> None:
        device = real(tmp_path).st_dev
        line = f"1 0 {os.major(device)}:{os.minor(device)} / / rw,relatime - {kind} /dev/x rw\n"
        (tmp_path / "mountinfo").write_text(line)
        monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")

    monkeypatch.setattr(os, "stat", fake)
    return mounted


def accuracy(run) -> float:
    return run.manifest.metrics["val"].accuracy


@pytest.mark.parametrize("kind", ["vfat", "ext4"])
def test_replaced_photos_train_to_the_right_number(table, backbone, fixed_ctime, kind):
    """On vfat the rows do not count; on ext4, where they do, one that is wrong is found, and all photos read again."""
    fixed_ctime(kind)
    loaded = settings(table, backbone)
    write(table.parent / "photos", 0)
    assert accuracy(command_train.train(loaded, Silent())) == 1.0
    prepare.prepare(check_settings(loaded), Silent())
    write(table.parent / "photos", 6)
    observer = Silent()
    assert accuracy(command_train.train(loaded, observer)) == 0.25
    again = [note for note in observer.notes if "all photos are read again" in note]
    assert len(again) == (kind == "ext4")
    assert len(observer.warnings) == 1  # the accuracy is that of wrong labels
    assert "majority class" in observer.warnings[0]
    observer = Silent()
    prepare.prepare(check_settings(loaded), observer)
    assert not [note for note in observer.notes if "read again" in note], "the wrong rows were replaced"


@pytest.mark.parametrize("kind", ["vfat", "ext4"])
def test_the_cache_is_used_where_ctime_counts(table, backbone, fixed_ctime, kind, monkeypatch):
    fixed_ctime(kind)
    write(table.parent / "photos", 0)
    loaded = settings(table, backbone)
    read = []
    examine = scan.examine
    monkeypatch.setattr("finetune_cli.photos.scan.examine", lambda path: read.append(path) or examine(path))
    wanted = check_settings(loaded)
    first = prepare.index(wanted.photos, wanted.cache, Silent())
    assert len(read) == 4 * PHOTOS
    assert prepare.index(wanted.photos, wanted.cache, Silent()) == first
    assert len(read) == 4 * PHOTOS * (2 if kind == "vfat" else 1)


def test_check_reads_replaced_photos_again(table, backbone, fixed_ctime):
    fixed_ctime("ext4")
    loaded = settings(table, backbone)
    write(table.parent / "photos", 0)
    assert command_check.check(loaded, Silent()).bad == ()
    write(table.parent / "photos", 6)
    path = table.parent / "photos" / "train-a" / "3.ppm"
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, (TIME, TIME))
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"on_bad_image": "skip"})})
    observer = Silent()
    assert [photo.name for photo in command_check.check(loaded, observer).bad] == ["photos/train-a/3.ppm"]
    assert sum("all photos are read again" in note for note in observer.notes) == 1


def test_a_photo_that_keeps_changing_is_an_error(table, backbone, monkeypatch):
    write(table.parent / "photos", 0)
    loaded = settings(table, backbone)
    monkeypatch.setattr("finetune_cli.photos.scan.examine", lambda _path: Facts("ab" * 32, 64, 64))
    monkeypatch.setattr(dataset, "_contradictions", lambda _parts, _classes: [])
    with pytest.raises(ChangedPhoto, match="changed while the command was running\nrun the same command again"):
        command_check.check(loaded, Silent())


@pytest.fixture
def mount(tmp_path):
    """Mounts a squashfs image of photos, with all times alike, at ``photos``; returns what mounts another one there."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts, and on Linux")
    target, mounted = tmp_path / "photos", []
    target.mkdir()

    def image(wrong: int) -> None:
        unmount()
        squashfs.write_image(tmp_path / f"{wrong}.squashfs", photos(wrong), TIME)
        command = ["mount", "-t", "squashfs", "-o", "loop,ro", str(tmp_path / f"{wrong}.squashfs"), str(target)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            pytest.skip(f"squashfs cannot be mounted here: {answer.stderr.strip()}")
        mounted.append(target)

    def unmount() -> None:
        if mounted:
            subprocess.run(["umount", mounted.pop()], check=True)

    yield image
    unmount()


def test_another_image_of_a_real_file_system(table, backbone, mount):
    """Names, sizes, times and inodes are those of the first image; only the photos are others."""
    loaded = settings(table, backbone)

    def statuses():
        paths = sorted((table.parent / "photos").rglob("*.ppm"))
        return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, paths)]

    mount(0)
    first = statuses()
    assert accuracy(command_train.train(loaded, Silent())) == 1.0
    mount(6)
    assert len(first) == 4 * PHOTOS
    assert statuses() == first
    assert accuracy(command_train.train(loaded, Silent())) == 0.25
