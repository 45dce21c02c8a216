"""The run directory: names, finding, manifest checks, hashes, tables that survive odd names."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from manifest_example import EXAMPLE
from paths import SOURCE

from finetune_cli.errors import RunError, UsageError
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs import run
from finetune_cli.runs.run import Run, SplitRow

MANIFEST = replace(EXAMPLE, image=ImageSettings(max_pixels=100), roots={"train": "../../photos", "val": "../x"})


def finished(folder):
    folder.mkdir(parents=True)
    run.write_split(folder / "split.csv", [SplitRow("train", "ant", "00", "ant/1.jpg")])
    return run.finish(folder, MANIFEST, ["split.csv"])


def test_a_finished_run_comes_back(tmp_path):
    made = finished(tmp_path / "runs" / "a-1")
    loaded = Run.load(tmp_path / "runs" / "a-1")
    assert loaded.manifest == made.manifest
    assert loaded.classes == ("ant", "bee")
    assert loaded.image_settings.max_pixels == 100
    assert loaded.data_roots() == {"train": tmp_path / "photos", "val": tmp_path / "runs" / "x"}
    assert loaded.split() == [SplitRow("train", "ant", "00", "ant/1.jpg")]


def test_a_split_comes_back_also_from_before_there_were_groups(tmp_path):
    rows = [SplitRow("val", "ant", "00", "ant/1.jpg", "roll 1"), SplitRow("val", "=bee", "01", "-2.jpg")]
    run.write_split(tmp_path / "split.csv", rows)
    assert run.read_split(tmp_path / "split.csv") == rows
    (tmp_path / "split.csv").write_text("split,class,digest,path\nval,ant,00,ant/1.jpg\n")
    assert run.read_split(tmp_path / "split.csv") == [SplitRow("val", "ant", "00", "ant/1.jpg", "")]
    for text in (
        "split,class,digest\nval,ant,00\n",
        "split,class,digest,path\nval,ant,00,1.jpg,x\n",
        "split,class,digest,path\nholdout,ant,00,1.jpg\n",
    ):
        (tmp_path / "split.csv").write_text(text)
        with pytest.raises(RunError, match="damaged"):
            run.read_split(tmp_path / "split.csv")


def test_folds_come_back(tmp_path):
    rows = [SplitRow("train", "ant", "00", "1.jpg", "", 3), SplitRow("train", "bee", "01", "2.jpg", "g")]
    run.write_split(tmp_path / "split.csv", rows)
    assert run.read_split(tmp_path / "split.csv") == rows
    for fold in ("0", "-1", "1.5", "x", "101"):
        (tmp_path / "split.csv").write_text(f"split,class,digest,path,group,fold\ntrain,ant,00,1.jpg,,{fold}\n")
        with pytest.raises(RunError, match="damaged"):
            run.read_split(tmp_path / "split.csv")


def fill(temporary, folder):
    assert not folder.exists()
    (temporary / "config.yaml").write_text("of " + folder.name)


def test_a_run_is_there_with_its_first_files_or_not_at_all(tmp_path):
    def fail(temporary, folder):
        fill(temporary, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.create(tmp_path / "runs", None, "pets", fail)
    assert list((tmp_path / "runs").iterdir()) == []
    made = run.create(tmp_path / "runs", None, "pets", fill)
    assert (made / "config.yaml").read_text() == "of pets-1"


_WRITER = """
import sys, time
from pathlib import Path
from finetune_cli.runs import run

def write(temporary, folder):
    (temporary / "config.yaml").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

run.create(Path(sys.argv[1]), None, "pets", write)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_the_next_run_removes_what_a_kill_in_the_first_write_left(tmp_path):
    def age():
        (found,) = (path for path in tmp_path.iterdir() if path.name.endswith(".tmp"))
        os.utime(found, (time.time() - 100,) * 2)
        return found

    command = [sys.executable, "-c", _WRITER, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        left = age()
        run.create(tmp_path, None, "pets", fill)
        assert (left / "pets-1" / "config.yaml").read_text() == "half", "of a training that is alive"
        age()
        process.kill()
    assert run.create(tmp_path, None, "other", fill).name == "other-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "pets-1"]


def test_two_trainings_that_begin_at_once_take_different_numbers(tmp_path):
    def write(temporary, folder):
        fill(temporary, folder)
        if folder.name == "pets-1":
            folder.mkdir()  # by the other training, a moment before

    assert run.create(tmp_path, None, "pets", write).name == "pets-2"
    with pytest.raises(UsageError, match="never overwritten"):
        run.create(tmp_path, "pets-3", "pets", lambda temporary, folder: folder.mkdir())


def test_names_are_numbered_and_never_reused(tmp_path):
    assert [run.create(tmp_path, None, "pets", fill).name for _ in range(3)] == ["pets-1", "pets-2", "pets-3"]
    assert run.create(tmp_path, "mine", "pets", fill).name == "mine"
    with pytest.raises(UsageError, match="never overwritten"):
        run.create(tmp_path, "mine", "pets", fill)
    with pytest.raises(UsageError, match="never overwritten"):
        run.check_target(tmp_path, "mine")


def test_the_newest_finished_run_is_found(tmp_path):
    for i, name in enumerate(["b", "c", "a"]):
        finished(tmp_path / name)
        os.utime(tmp_path / name / "run.json", (i, i))
    (tmp_path / "unfinished").mkdir()
    assert run.find(tmp_path).name == "a"


def test_nothing_to_find(tmp_path):
    with pytest.raises(RunError, match="no finished run") as caught:
        run.find(tmp_path)
    assert "finetune train" in caught.value.remedy
    with pytest.raises(RunError, match="no unfinished run in"):
        run.find_unfinished(tmp_path)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunError, match="not a finished run") as caught:
        Run.load(tmp_path)
    assert "--resume" in caught.value.remedy


def test_truncations_and_flipped_bits_of_the_manifest_are_seen(tmp_path):
    made = finished(tmp_path / "a")
    path = made.folder / "run.json"
    whole = path.read_bytes()
    cases = [whole[:length] for length in range(0, len(whole) - 1, 5)]  # the last byte ends the line
    for bit in range(0, 8 * len(whole), 5):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(flipped))
    accepted = []
    for content in cases:
        path.write_bytes(content)
        with contextlib.suppress(RunError):
            accepted.append(Run.load(made.folder).manifest)
    assert len(accepted) < 20, "what JSON does not see, such as another kind of space"
    assert all(manifest == made.manifest for manifest in accepted)


def test_the_digest_of_the_manifest_can_be_made_elsewhere(tmp_path):
    made = finished(tmp_path / "a")
    content = json.loads((made.folder / "run.json").read_text())
    recorded = content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == recorded


def test_a_changed_file_is_never_used(tmp_path):
    made = finished(tmp_path / "a")
    (made.folder / "split.csv").write_text("split,class,digest,path\n")
    with pytest.raises(RunError, match=r"split\.csv is damaged"):
        made.split()
    (made.folder / "split.csv").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        made.split()
    with pytest.raises(RunError, match="lists no file"):
        made.file("model.keras")


@pytest.mark.parametrize(
    ("photos", "name"),
    [
        ("pets", "pets"),
        ("pets/train", "pets"),
        ("pets/Train/", "pets"),
        ("pets/x/../train", "pets"),
        ("pets/labels.csv", "labels"),
        ("pets/train.csv", "pets"),
        ("pets.v2", "pets.v2"),
        ("my pets (old)", "my-pets-old"),
        ("...", "run"),
        ("ü" * 90, "ü" * 50),
        ("/", "run"),
    ],
)
def test_a_run_is_named_after_its_photos(photos, name):
    assert run.stem(Path(photos)) == name


def test_a_name_alone_is_looked_up_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "runs" / "pets-1")
    assert run.located(Path("pets-1")) == Path("runs/pets-1")
    for other in ("pets-2", ".", "..", "./x/pets-1", "runs/pets-1"):
        assert run.located(Path(other)) == Path(other)
    (tmp_path / "pets-1").mkdir()  # a folder that is no run does not hide it
    assert run.located(Path("pets-1")) == Path("runs/pets-1")
    finished(tmp_path / "pets-1" / "x").folder.joinpath("run.json").rename(tmp_path / "pets-1" / "run.json")
    assert run.located(Path("pets-1")) == Path("pets-1")


def test_a_run_keeps_its_name_when_it_is_named_by_dots(tmp_path, monkeypatch):
    made = finished(tmp_path / "runs" / "pets-1")
    monkeypatch.chdir(made.folder)
    assert Run.load(Path()).name == "pets-1"
    (made.folder / "evaluations").mkdir()
    monkeypatch.chdir(made.folder / "evaluations")
    assert Run.load(Path("..")).name == "pets-1"
