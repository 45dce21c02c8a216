"""The command line: exit codes, formats, errors of one line, nothing sent to the terminal that a name hides."""

import json
import signal
import subprocess
import sys

import pytest
from command_line import run
from typer.testing import CliRunner

from finetune_cli import __version__
from finetune_cli.cli.app import app


def test_version_and_help():
    assert __version__ in run("--version").output
    assert "predict" in run("--help").output
    assert run("no-such-command").exit_code == 2
    assert run("train", "--no-such-option").exit_code == 2


def test_a_wrong_config_is_two_lines_and_exit_2(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: x}\ntraining: {lr: 1}\n")
    answer = run("train", tmp_path / "c.yaml")
    assert answer.exit_code == 2
    assert "c.yaml, line 2" in answer.stderr
    assert "training.learning_rate" in answer.stderr
    assert "Traceback" not in answer.output
    assert run("check", tmp_path / "absent.yaml").exit_code == 2


def test_missing_photos_are_exit_3(tmp_path):
    answer = run("train", f"data.train={tmp_path / 'absent'}", "model.backbone=efficientnet_lite0")
    assert answer.exit_code == 3
    assert "absent" in answer.stderr


@pytest.mark.parametrize("name", ["folder", "picture.jpg"])
def test_an_invalid_name_of_a_picture_is_reported_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for arguments in (
        ["preview", tmp_path / "absent.yaml", "--output"],
        ["explain", tmp_path / "absent.jpg", "--output"],
        ["inspect", tmp_path / "absent", "--filters", "x.jpg"],
    ):
        answer = run(*arguments, tmp_path / name)
        assert answer.exit_code == 2
        assert "is not the name of a PNG file" in answer.stderr


def test_a_folder_that_is_not_a_run_is_called_so(tmp_path):
    answer = run("predict", tmp_path / "x.jpg", "--run", tmp_path)
    assert answer.exit_code == 1
    assert f"{tmp_path} is not a run directory" in answer.stderr
    assert "resume" not in answer.stderr


def test_overrides_without_a_config(tmp_path):
    answer = run("train", "training.seed=minus")
    assert answer.exit_code == 2
    assert "command line: `training.seed`" in answer.stderr
    assert "`data.train` is required" in answer.stderr


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run("predict", "x.jpg")
    assert answer.exit_code == 1
    assert "finetune train" in answer.stderr
    answer = run("train", "--resume")
    assert answer.exit_code == 1
    assert "no unfinished run in runs\n" in answer.stderr
    assert "finetune train --resume runs/NAME" in answer.stderr
    (tmp_path / "config.yaml").write_text("data: {train: x}")
    for name in ("nowhere", "config.yaml"):
        answer = run("train", "--resume", name)
        assert answer.exit_code == 2
        assert (
            f"{name} is not a run directory: it {'is a file' if name == 'config.yaml' else 'does not exist'}"
            in answer.stderr
        )


def test_addresses_are_not_read_and_stay_intact(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    web = "https://host/photos/a.jpg"
    for arguments in (["predict", web], ["explain", web], ["train", web], ["init", web], ["evaluate", web]):
        answer = run(*arguments)
        assert answer.exit_code == 2
        assert answer.stderr.splitlines()[0].startswith(f"error: {web} is an address")
    answer = run("train", "data.train=https://host/photos")
    assert answer.exit_code == 2
    assert "`data.train`: https://host/photos is an address of the web" in answer.stderr
    good = min(photos.glob("a.*"))
    answer = run("predict", "-", "--run", tiny_run.run.folder, "--format", "jsonl", input=f"{web}\n{good}\n")
    assert answer.exit_code == 3
    first, second = (json.loads(line) for line in answer.stdout.splitlines())
    assert (first["path"], "address" in first["error"], second["error"]) == (web, True, None)


def test_a_missing_photo_and_a_folder_are_not_called_broken(tiny_run, photos, tmp_path):
    for path, problem, remedy in (
        (photos, "this is a folder", "name a photo in it"),
        (tmp_path / "absent.jpg", "there is no such file", "check the path"),
    ):
        answer = run("explain", path, "--run", tiny_run.run.folder, "--output", tmp_path / "x.png")
        assert answer.exit_code == 3
        assert answer.stderr == f"error: {path}: {problem}\ntry: {remedy}\n"
    answer = run("predict", tmp_path / "absent.jpg", "--run", tiny_run.run.folder)
    assert "absent.jpg: error: there is no such file" in answer.stdout
    assert "try: correct the path, or repair or remove the file" in answer.stderr


def test_a_bug_is_reported_in_two_lines(monkeypatch, tmp_path):
    def broken(*_args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("finetune_cli.practice.sample.draw", broken)
    answer = run("sample", tmp_path / "x")
    assert answer.exit_code == 1
    assert "unexpected ZeroDivisionError: oops" in answer.stderr
    assert "Traceback" not in answer.output
    assert "Traceback" in run("sample", tmp_path / "x", "--debug").output


def test_a_lack_of_memory_is_reported_in_two_lines(monkeypatch, tmp_path):
    def hungry(*_args):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("finetune_cli.practice.sample.draw", hungry)
    answer = run("sample", tmp_path / "x")
    assert answer.exit_code == 1
    assert answer.stderr.splitlines()[0] == "error: out of memory: Unable to allocate 9 TiB"
    assert "Traceback" in run("sample", tmp_path / "x", "--debug").output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_first_imports_is_reported_in_a_line(number):
    script = f"""
import os, sys
class Kill:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Kill())
from finetune_cli.__main__ import main
main()
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 128 + number
    assert answer.stderr == "error: interrupted\n"


def test_a_bare_except_cannot_swallow_a_signal():
    script = """
import os, signal, sys, time
from finetune_cli.cli.app import app, register
from finetune_cli.cli.console import Console
from finetune_cli import signals

def victim() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except BaseException:
        print("swallowed")
    Console().note("a sign of life")
    print("not stopped")

register(app, victim)
app(["victim"])
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 143
    assert answer.stdout == "swallowed\n"
    assert "interrupted" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "x", "--format", "xml"], "Invalid value for '--format': 'xml' is not one of 'table'"),
        (["predict", "x", "--top-k", "a"], "Invalid value for '--top-k': Input should be a valid integer"),
        (["export", "--output", "x", "--format", "tflit"], "did you mean tflite?"),
    ],
)
def test_a_wrong_value_is_refused_without_pydantics_words(arguments, words):
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert words in answer.stderr
    assert "alue error" not in answer.stderr
