"""Likely groups of photos, found by their names or by the times at which they were taken."""

import random
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from finetune_cli.photos import folders
from finetune_cli.photos.dataset import grouping
from finetune_cli.photos.decode import recorded
from finetune_cli.photos.groups import propose, series

LIMIT = 10**8


def proposed(names, split=lambda name: "train"):
    """The proposal for names of the form class/..., all of them in train unless `split` says otherwise."""
    splits = {}
    for name in names:
        splits.setdefault(split(name), []).append((name, name.split("/")[0]))
    return propose(splits)


def partition(regex, names):
    groups = {}
    for name in names:
        groups.setdefault(grouping(regex)(name), set()).add(name)
    return {frozenset(members) for members in groups.values()}


def same_groups(names, expected):
    """Assert that the proposal for `names` finds the groups of the regex `expected`."""
    found = proposed(names)
    assert found is not None
    assert partition(found.regex, names) == partition(expected, names)
    assert found.groups == len(partition(expected, names))
    first, second = found.example
    assert first != second
    assert grouping(expected)(first) == grouping(expected)(second)
    return found


@pytest.mark.parametrize("folder", ["digits/train", "digits/test"])
def test_persons_of_the_digits_are_found(shared_data, folder):
    names = [photo.name for photo in folders.read(shared_data / folder).photos]
    assert same_groups(names, "p[0-9]+").regex == "(?:^|/)(p[0-9]+)"


@pytest.mark.parametrize("folder", ["hymenoptera/train", "hymenoptera/val", "scenes/train", "scenes/test"])
def test_real_photos_without_groups_have_none(shared_data, folder):
    names = [photo.name for photo in folders.read(shared_data / folder).photos]
    assert len(names) > 100
    assert proposed(names) is None


def names_of(pattern, count=60, classes=("cat", "dog")):
    return [pattern(label, i) for label in classes for i in range(count)]


def hexadecimal(label, i):
    return f"{random.Random(f'{label}{i}').getrandbits(64):016x}"


PERSONS = ("anna", "bob", "carla", "dan", "eve", "finn")
GROUPED = {
    "video frames": (lambda c, i: f"{c}/{c}clip{i // 10}_frame{i % 10:04}.jpg", "[a-z]+clip[0-9]+"),
    "clips of all classes": (lambda c, i: f"{c}/clip{i // 6}_frame{i % 6:04}.jpg", "clip[0-9]+"),
    "frames without a separator": (lambda c, i: f"{c}/clip{i // 6}frame{i % 6}.jpg", "clip[0-9]+"),
    "patients": (lambda c, i: f"{c}/patient-{i // 2}_{('left', 'right')[i % 2]}.png", "patient-[0-9]+"),
    "persons by name": (
        lambda c, i: f"{c}/{PERSONS[i % 6]}_{i // 6}.jpg",
        "/([a-z]+)_",
    ),
    "copies by augmentation": (lambda c, i: f"{c}/{c}{i // 3:03}_jpg.rf.{hexadecimal(c, i)}.jpg", "/([a-z]+[0-9]+)_"),
    "a letter for each view": (lambda c, i: f"{c}/{i // 3 + (c == 'dog') * 20:02}{'abc'[i % 3]}.jpg", "[0-9]+"),
    "a folder for each session": (lambda c, i: f"{c}/session {i // 6}/{i:04}.jpg", "session [0-9]+"),
    "days of recording": (lambda c, i: f"{c}/IMG_201712{i // 6 + 10}_1128{i:02}.jpg", "IMG_[0-9]+"),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_are_found(kind):
    pattern, expected = GROUPED[kind]
    same_groups(names_of(pattern), expected)


UNGROUPED = {
    "running numbers": lambda c, i: f"{c}/{i:04}.jpg",
    "running numbers with a suffix": lambda c, i: f"{c}/{i:04}_small.jpg",
    "running numbers and the class": lambda c, i: f"{c}/{i:04}-{c}.jpg",
    "the class and running numbers": lambda c, i: f"{c}/{c}.{i}.jpg",
    "hashes": lambda c, i: f"{c}/{hexadecimal(c, i)}.jpg",
    "hashes in folders": lambda c, i: f"{c}/{hexadecimal(c, i)[0]}/{hexadecimal(c, i)}.jpg",
    "numbers and hashes": lambda c, i: f"{c}/{random.Random(f'{c}{i}').randrange(10**9)}_{hexadecimal(c, i)[:10]}.jpg",
    "COCO": lambda c, i: f"{c}/COCO_train2014_{random.Random(f'{c}{i}').randrange(10**6):012}.jpg",
    "a camera": lambda c, i: f"{c}/DSC{i + 60 * (c == 'dog'):05}.jpg",
    "a telephone": lambda c, i: f"{c}/IMG_{i + 60 * (c == 'dog'):04}.JPG",
    "ImageNet": lambda c, i: f"{c}/n0{2 + (c == 'dog')}123045_{i * 37}.JPEG",
    "kinds of a class": lambda c, i: f"{c}/{c}{'abcdefg'[i % 7]}{'xyz'[i % 3]}_s_{i:06}.png",
    "renamed by Windows": lambda c, i: f"{c}/{c} ({i}).jpg",
    "a few folders": lambda c, i: f"{c}/part{i % 3}/{i:04}.jpg",
}


@pytest.mark.parametrize("kind", UNGROUPED)
def test_names_that_only_look_like_groups_are_left_alone(kind):
    names = names_of(UNGROUPED[kind])
    assert len(set(names)) == 120
    assert proposed(names) is None


def test_the_proposal_says_what_is_on_both_sides():
    names = names_of(lambda c, i: f"{c}/p{i // 4}-{i % 4}.jpg", classes=("cat", "dog"))

    def split(name):
        person, number = map(int, re.findall("[0-9]+", name))
        return "test" if person < 2 and number == 3 else "val" if person < 5 and number == 0 else "train"

    found = proposed(names, split)
    assert found.groups == 15
    assert found.shared == {"val": 5, "test": 2}
    assert {split(name) for name in found.example} == {"train", "val"}
    assert "5 of them are in both train and val; 2 of them are in both train and test" in str(found)
    whole = proposed(names, lambda name: "val" if "/p1-" in name else "train")
    assert whole.shared == {}
    assert "none of them is on both sides" in str(whole)
    assert propose({"train": []}) is None


def test_a_pattern_reads_the_same_in_a_shell_and_in_yaml():
    for pattern, _expected in GROUPED.values():
        regex = proposed(names_of(pattern)).regex
        assert "\\" not in regex or regex.endswith(r"/(?!\1)[^/]+$")


def write_dated(path: Path, time: datetime | str | None) -> Path:
    exif = Image.Exif()
    if time is not None:
        text = time if isinstance(time, str) else time.strftime("%Y:%m:%d %H:%M:%S")
        exif.get_ifd(0x8769)[0x9003] = text
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


def test_photos_taken_at_nearly_the_same_time_are_a_series(tmp_path):
    start = datetime(2017, 12, 12, 11, 28)
    splits = {"train": [], "val": []}
    for i in range(30):  # series of three, a minute apart, each with its last photo in val
        path = tmp_path / f"{i}.jpg"
        splits["val" if i % 3 == 2 else "train"].append(
            write_dated(path, start + timedelta(minutes=i // 3, seconds=i % 3))
        )
    splits["train"].append(write_dated(tmp_path / "none.jpg", None))
    said = series(splits, LIMIT)
    assert said.startswith("30 of 30 photos with a recording time")
    assert "10 such series are in both train and val" in said
    assert series({"train": splits["train"] + splits["val"]}, LIMIT) is None
    apart = [write_dated(tmp_path / f"apart{i}.jpg", start + timedelta(minutes=i)) for i in range(20)]
    assert series({"train": apart[::2], "val": apart[1::2]}, LIMIT) is None
    same = [write_dated(tmp_path / f"same{i}.jpg", start) for i in range(20)]
    assert series({"train": same[::2], "val": same[1::2]}, LIMIT) is None


def test_recording_times(tmp_path):
    assert recorded(write_dated(tmp_path / "a.jpg", "2017:12:12 11:28:17"), LIMIT) == datetime(2017, 12, 12, 11, 28, 17)
    assert recorded(write_dated(tmp_path / "b.jpg", "0000:00:00 00:00:00"), LIMIT) is None
    assert recorded(write_dated(tmp_path / "c.jpg", None), LIMIT) is None
    assert recorded(tmp_path / "absent.jpg", LIMIT) is None
    (tmp_path / "d.jpg").write_bytes(b"no photo")
    assert recorded(tmp_path / "d.jpg", LIMIT) is None
