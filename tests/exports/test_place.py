"""Where exports go and what is said about them; a fault at any moment leaves the old one whole, or the new one."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import PROGRAMS, SOURCE

from finetune_cli import files
from finetune_cli.errors import StorageError, UsageError, WeightsError
from finetune_cli.exports import manifest, place
from finetune_cli.exports.card import Card
from finetune_cli.exports.openvino import OpenVino
from finetune_cli.photos.decode import ImageSettings

CARD = Card(("ant", "bee", "caf\u00e9 \udcff"), ImageSettings(64, "pad", 5000))


RUN = SimpleNamespace(name="r-1", manifest=SimpleNamespace(files={"model.keras": "ab" * 32}))


def make_export(folder, content="old"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.xml").write_text(content)
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "model.bin").write_text(content)
    manifest.write(folder, OpenVino(), RUN)


def fill(target, force=False, then=lambda _folder: None):
    """Place a folder with a file `x` at `target`; `then` happens while it is being built."""
    with place.placed(target, force) as folder:
        (folder / "x").write_text("x")
        then(folder)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The card


def test_a_card_comes_back_with_names_that_are_not_text(tmp_path):
    CARD.write(tmp_path)
    assert Card.read(tmp_path) == CARD
    assert Card.parse(CARD.text(), tmp_path) == CARD
    CARD.text().encode("ascii")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"classes": ["one"]},
        {"classes": "ab"},
        {"classes": [1, 2]},
        {"image": {}},
        {"image": {"size": 0, "resize": "crop", "max_pixels": 1}},
        {"image": {"size": True, "resize": "crop", "max_pixels": 1}},
        {"image": {"size": 64, "resize": "fold", "max_pixels": 1}},
        {"image": {"size": "64", "resize": "crop", "max_pixels": 1}},
        {"image": None},
    ],
    ids=str,
)
def test_a_damaged_card_is_refused(tmp_path, change):
    with pytest.raises(WeightsError, match="is damaged"):
        Card.parse(json.dumps({**CARD.to_json(), **change}), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000])
def test_what_is_no_card_is_refused(tmp_path, text):
    with pytest.raises(WeightsError, match="is damaged"):
        Card.parse(text, tmp_path)


def test_a_missing_card(tmp_path):
    with pytest.raises(WeightsError, match="cannot be read"):
        Card.read(tmp_path)


# The manifest


def test_what_python_compiles_beside_photo_py_is_no_part_of_an_export(tmp_path):
    make_export(tmp_path / "a")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "photo.cpython-311.pyc").write_bytes(b"x")
    manifest.verify(tmp_path / "a")
    assert manifest.is_export(tmp_path / "a")
    (tmp_path / "a" / "deep" / "__pycache__").mkdir()
    (tmp_path / "a" / "deep" / "__pycache__" / "x.pyc").write_bytes(b"x")
    with pytest.raises(WeightsError, match="is not listed"):
        manifest.verify(tmp_path / "a")


def test_the_manifest_knows_every_file(tmp_path):
    make_export(tmp_path / "a")
    said = manifest.verify(tmp_path / "a")
    assert set(said.files) == {"model.xml", "deep/model.bin"}
    assert said.files["model.xml"] == files.sha256(tmp_path / "a" / "model.xml")
    assert (said.form, said.options, said.run) == ("openvino", {"quantize": "none", "pixels": "fixed"}, "r-1")
    assert said.versions["openvino"]
    assert manifest.is_export(tmp_path / "a")


def test_a_changed_file_is_named(tmp_path):
    make_export(tmp_path)
    (tmp_path / "deep" / "model.bin").write_text("new")
    with pytest.raises(WeightsError, match=r"deep/model\.bin is damaged"):
        manifest.verify(tmp_path)
    (tmp_path / "deep" / "model.bin").unlink()
    with pytest.raises(WeightsError, match=r"deep/model\.bin cannot be read"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9},
        {"form": "zip"},
        {"files": {"../x": "ab" * 32}},
        {"files": {"/x": "ab" * 32}},
        {"files": {"C:x": "ab" * 32}},
        {"files": {"a": 1}},
        {"files": {"a": "ab"}},
        {"files": []},
        {"form": ["onnx"]},
        {"options": {"precision": 32}},
        {"created": None},
        {"run": {}},
        {"run": {"name": "r", "model_sha256": "ab"}},
        {"versions": ["keras"]},
    ],
    ids=str,
)
def test_a_manifest_from_a_stranger_is_checked(tmp_path, change):
    make_export(tmp_path)
    path = tmp_path / manifest.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match="is damaged"):
        manifest.verify(tmp_path)
    assert not manifest.is_export(tmp_path)


def test_a_folder_without_a_manifest_is_no_export(tmp_path):
    with pytest.raises(WeightsError, match="not made by finetune export"):
        manifest.verify(tmp_path)


# The target


def test_one_form_takes_the_folder_and_several_share_it(tmp_path):
    assert place.inner_paths(tmp_path, ["onnx"], None) == {"onnx": Path()}
    assert place.inner_paths(tmp_path, ["savedmodel"], None) == {"savedmodel": Path("1")}
    assert place.inner_paths(tmp_path, ["savedmodel", "onnx"], None) == {
        "savedmodel": Path("savedmodel/1"),
        "onnx": Path("onnx"),
    }
    assert place.inner_paths(tmp_path, ["savedmodel", "onnx"], 7) == {
        "savedmodel": Path("savedmodel/7"),
        "onnx": Path("onnx/7"),
    }
    assert place.inner_paths(tmp_path, ["onnx"], 7) == {"onnx": Path("7")}


def test_the_next_version_is_the_one_after_the_highest(tmp_path):
    for name in ("1", "12", "007", "x", "3.5"):
        (tmp_path / name).mkdir()
    (tmp_path / "99").write_text("a file")
    assert place.inner_paths(tmp_path, ["savedmodel"], None) == {"savedmodel": Path("13")}


def test_a_new_target_with_new_parents(tmp_path):
    fill(tmp_path / "a" / "b" / "c", then=lambda folder: check_equal(folder.resolve().parents[1], tmp_path / "a" / "b"))
    assert content(tmp_path) == {"a/b/c/x": b"x"}


def check_equal(one, other):
    assert one == other


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert content(tmp_path) == {"out/x": b"x"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"x": b"x"}


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "a" / "b", then=lambda _folder: 1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_refused(tmp_path):
    make_export(tmp_path / "out")
    with pytest.raises(UsageError, match="is not empty") as caught:
        fill(tmp_path / "out")
    assert "--force" in caught.value.remedy
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        fill(tmp_path / "file", force=True)


def test_nothing_is_added_to_a_folder_of_other_things(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "onnx").mkdir()
    (tmp_path / ".DS_Store").write_text("")
    place.check_beside(tmp_path, force=False)
    make_export(tmp_path / "old")
    with pytest.raises(UsageError, match="holds old, which is neither a form nor a version"):
        place.check_beside(tmp_path, force=False)
    place.check_beside(tmp_path, force=True)
    for force in (False, True):
        with pytest.raises(UsageError, match="is not empty: it holds an export of its own"):
            place.check_beside(tmp_path / "old", force)


def test_force_on_exports_below_names_them(tmp_path):
    make_export(tmp_path / "out" / "onnx")
    with pytest.raises(UsageError, match="each in a folder of its own") as caught:
        fill(tmp_path / "out", force=True)
    assert str(tmp_path / "out" / "onnx") in caught.value.remedy


def test_force_replaces_an_export_and_nothing_else(tmp_path):
    make_export(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="files that are not an export"):
        fill(tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.txt").unlink()
    fill(tmp_path / "out", force=True)
    assert content(tmp_path) == {"out/x": b"x"}


def test_a_disk_that_is_mounted_at_the_target_is_no_target(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "disk")
    with pytest.raises(StorageError, match="mounted by itself"):
        place.check_replaceable(tmp_path / "disk")
    place.check_replaceable(tmp_path / "disk" / "1")


def test_files_that_appear_meanwhile_are_kept(tmp_path):
    def appear(_folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(UsageError, match="is not empty"):
        fill(tmp_path / "out", then=appear)
    assert content(tmp_path) == {"out/mine": b"mine"}


@pytest.mark.parametrize("fails", [False, True])
def test_where_folders_cannot_change_places_at_once(tmp_path, monkeypatch, fails):
    make_export(tmp_path / "out")
    before = content(tmp_path)
    monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    rename = Path.rename

    def no_rename(self, target):
        if fails and Path(target) == tmp_path / "out" and (self / "x").exists():
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", no_rename)
    if fails:
        with pytest.raises(StorageError, match="broken"):
            fill(tmp_path / "out", force=True)
        assert content(tmp_path) == before
    else:
        fill(tmp_path / "out", force=True)
        assert content(tmp_path) == {"out/x": b"x"}


def test_a_full_disk_is_told_with_the_target(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.onnx"))

    with pytest.raises(StorageError, match=f"no space left to write {tmp_path / 'out'}\n"):
        fill(tmp_path / "out", then=full)
    assert list(tmp_path.iterdir()) == []


def test_old_leftovers_of_a_kill_go_and_young_ones_stay(tmp_path):
    names = [".out-0123abcd.tmp", "..out-0123abcd-0123abcd.tmp.tmp", ".out-0123abce.tmp", ".outer-0123abcd.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_text("half")
    for name in names[:2] + names[3:]:
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    fill(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", names[2], names[3]}


@pytest.mark.parametrize("name", ["x", "a" * 33, "a.b" * 20])
def test_leftovers_are_known_by_the_names_that_they_really_have(tmp_path, name):
    def age(folder):
        building = folder.resolve().parent
        for path in (building, building.with_name(f".{name[:40]}-0123abcd.tmp")):
            shutil.copytree(building, tmp_path / "beside" / path.name)
            os.utime(tmp_path / "beside" / path.name, (time.time() - 4000,) * 2)

    fill(tmp_path / name, then=age)
    assert len(list((tmp_path / "beside").iterdir())) == 2
    fill(tmp_path / "beside" / name)
    assert [path.name for path in (tmp_path / "beside").iterdir()] == [name]


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_export_whole(tmp_path, exchange):
    """A child process does an export and ends, without any clean-up, before its n-th step on the file system."""
    start = tmp_path / "start"
    make_export(start / "out")
    script = PROGRAMS / "export_kills.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, script.parent)))}
    command = [sys.executable, script, start, tmp_path / "work", "exchange" if exchange else "renames"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    steps = int(answer.stdout)
    assert steps > 10
    old, outcomes = content(start / "out"), []
    for step in range(1, steps + 2):
        folder = tmp_path / "work" / str(step)
        exports = [path for path in folder.iterdir() if content(path) == old]
        if (folder / "out").exists():
            manifest.verify(folder / "out")  # the old one or the new one, whole
            outcomes.append((folder / "out" / "model.xml").read_text())
        else:  # between two renames: the old one is whole under another name
            assert not exchange
            assert exports
            outcomes.append("aside")
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert sorted(outcomes, key=["old", "aside", "new"].index) == outcomes
    assert outcomes.count("aside") == (0 if exchange else 1)
    shutil.rmtree(tmp_path / "work")
