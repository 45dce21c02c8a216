"""`finetune predict`: formats, paths from standard input, and outputs."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pillow_heif
import pytest
from command_line import run
from PIL import Image


def test_predict_answers_in_every_form(tiny_run, photos):
    classes = set(tiny_run.run.classes)
    common = ("--run", tiny_run.run.folder, "--quiet")
    answer = run("predict", photos, *common, "--format", "jsonl")
    assert answer.exit_code == 3, answer.output
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [row["error"] is None for row in rows] == [True, True, False]
    assert rows[0]["label"] in classes
    assert rows[0]["top"][0] == {"label": rows[0]["label"], "probability": rows[0]["probability"]}
    assert {**rows[0], "path": ""} == {**rows[1], "path": ""}
    assert "could not be read" in answer.stderr

    answer = run("predict", photos, *common, "--format", "csv", "--top-k", 2)
    lines = answer.stdout.splitlines()
    assert lines[0] == "path,label,probability,label_2,probability_2,error,p_value"
    assert len(lines) == 4

    answer = run("predict", *sorted(photos.glob("[ab].*")), *common)
    assert answer.exit_code == 0
    assert all("%" in line for line in answer.stdout.splitlines())


def test_predict_reports_ignored_files(tiny_run, photos):
    for name in ("notes.txt", "raw.cr2", "more.cr2", ".hidden.jpg"):
        (photos / name).write_bytes(b"")
    answer = run("predict", photos, "--run", tiny_run.run.folder)
    assert [line for line in answer.stderr.splitlines() if line.startswith("ignored")] == [
        "ignored in the folders: 2 .cr2 files, 1 .txt files, 1 hidden"
    ]
    (photos / "empty").mkdir()
    (photos / "empty" / "clip.mov").write_bytes(b"")
    answer = run("predict", photos / "empty", "--run", tiny_run.run.folder)
    assert answer.exit_code == 3
    assert "ignored in the folders: 1 .mov files" in answer.stderr


def test_heic_photos_are_predicted(tiny_run, tmp_path):
    source = min((tiny_run.photos / "test").rglob("*.*"))
    with Image.open(source) as image:
        pillow_heif.from_pillow(image.convert("RGB")).save(tmp_path / "photo.heic", quality=-1, chroma=444)
    answer = run("predict", source, tmp_path, "--run", tiny_run.run.folder, "--format", "jsonl")
    assert answer.exit_code == 0, answer.output
    stored, heic = (json.loads(line) for line in answer.stdout.splitlines())
    assert heic["label"] == stored["label"]
    assert heic["probability"] == pytest.approx(stored["probability"], abs=0.05)


def test_predict_writes_a_file(tiny_run, photos, tmp_path):
    answer = run("predict", photos, "--run", tiny_run.run.folder, "--format", "jsonl", "--output", tmp_path / "o.jsonl")
    assert answer.exit_code == 3
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 3


def test_predict_reads_paths_from_standard_input(tiny_run, photos):
    paths = "\n".join(str(path) for path in sorted(photos.glob("[ab].*"))) + "\n"
    answer = run("predict", "-", "--run", tiny_run.run.folder, "--format", "jsonl", input=paths)
    assert answer.exit_code == 0, answer.output
    assert len(answer.stdout.splitlines()) == 2


def test_predict_is_unsure_below_the_wanted_confidence(tiny_run, photos):
    photo = next(photos.glob("a.*"))
    answer = run("predict", photo, "--run", tiny_run.run.folder, "--min-confidence", 1, "--format", "jsonl")
    row = json.loads(answer.stdout)
    assert row["label"] == ("unsure" if row["probability"] < 1 else row["top"][0]["label"])


def test_predict_without_a_photo(tiny_run, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = run("predict", tmp_path / "empty", "--run", tiny_run.run.folder)
    assert answer.exit_code == 3
    assert "no photo" in answer.stderr
    answer = run("predict", tmp_path / "absent.jpg", "--run", tiny_run.run.folder)
    assert answer.exit_code == 3


def test_predict_answers_each_path_before_it_waits_for_the_next(tiny_run, photos):
    command = [sys.executable, "-m", "finetune_cli", "predict", "-", "--run", tiny_run.run.folder, "--format", "jsonl"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        for path in [*sorted(photos.glob("[ab].*")), photos / "broken.jpg"]:
            child.stdin.write(os.fsencode(path) + b"\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["path"] == str(path)
        child.send_signal(signal.SIGTERM)  # while it waits for a path
        assert child.wait(30) == 143


@pytest.mark.parametrize("separator", ["\n", "\0", "\r\n"])
def test_predict_reads_names_separated_by_nul_or_line_ends(tiny_run, photos, separator):
    odd = photos / ("line\nend.png" if separator == "\0" else " blank .png")
    shutil.copy(next(photos.glob("a.*")), odd)
    for end in ("", separator):
        paths = separator.join(map(str, [odd, next(photos.glob("b.*"))])) + end
        answer = run("predict", "-", "--run", tiny_run.run.folder, "--format", "jsonl", input=paths)
        assert answer.exit_code == 0, answer.output
        assert json.loads(answer.stdout.splitlines()[0])["path"] == str(odd)
        assert len(answer.stdout.splitlines()) == 2


def test_names_cannot_drive_the_terminal(tiny_run, photos):
    evil = photos / "\x1b[31mred\nline.jpg"
    next(photos.glob("a.*")).rename(evil)
    answer = run("predict", evil, "--run", tiny_run.run.folder)
    assert answer.exit_code == 0
    assert "\x1b" not in answer.output
    assert len(answer.stdout.splitlines()) == 1


def test_a_closed_pipe_is_not_an_error(tiny_run, photos):
    command = (
        f"{sys.executable} -m finetune_cli predict {photos} --run {tiny_run.run.folder} --format jsonl | head -n 1"
    )
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert "Broken" not in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_suffix_chooses_the_format(tiny_run, photos, tmp_path):
    photo = next(photos.glob("a.*"))
    common = ("predict", photo, "--run", tiny_run.run.folder, "--quiet")
    firsts = {"csv": "path,", "json": "[", "jsonl": "{", "ndjson": "{", "CSV": "path,"}
    for suffix, first in firsts.items():
        assert run(*common, "--output", tmp_path / f"o.{suffix}").exit_code == 0
        assert (tmp_path / f"o.{suffix}").read_text().startswith(first)
    (tmp_path / "old.csv").write_text("old")
    assert run(*common, "--output", tmp_path / "old.csv", "--force").exit_code == 0
    assert (tmp_path / "old.csv").read_text().startswith("path,")
    assert run(*common, "--output", tmp_path / "o.txt", "--format", "table").exit_code == 0
    (tmp_path / "none").mkdir()
    assert run("predict", tmp_path / "none", *common[2:], "--output", tmp_path / "no.csv").exit_code == 3
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--output", "x.txt"], "the name x.txt does not say which format to write"),
        (["--output", "x.json", "--format", "csv"], "--format csv contradicts the name x.json"),
        (["--output", "there.csv"], "there.csv already exists"),
        (["--output", "folder.csv"], "folder.csv is a folder"),
        (["--format", "parquet"], "parquet is a binary format, not for the terminal"),
    ],
)
def test_an_output_that_does_not_fit_its_format_is_refused_before_the_work(tmp_path, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    answer = run("predict", "x.jpg", "--run", "absent", *options)
    assert answer.exit_code == 2
    assert f"error: {problem}\n" in answer.stderr
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_an_output_that_is_a_pipe_is_written_to_and_not_replaced(tiny_run, photos, tmp_path):
    """As root, `--output /dev/null` once replaced the device by a regular file."""
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    answer = run("predict", next(photos.glob("a.*")), "--run", tiny_run.run.folder, "--quiet", "--output", pipe)
    assert answer.exit_code == 0, answer.output
    assert os.read(reader, 1 << 16).startswith(b"path,")
    os.close(reader)
    assert pipe.is_fifo()


def test_an_output_that_is_not_a_file_is_not_probed(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("finetune_cli.files.check_writable", lambda folder: pytest.fail(f"probed {folder}"))
    answer = run("predict", "x.jpg", "--run", "absent", "--output", tmp_path / "pipe", "--format", "csv")
    assert "there is no run absent" in answer.stderr
