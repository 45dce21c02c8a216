"""The command line: exit codes, formats, errors of one line, nothing sent to the terminal that a name hides."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pillow_heif
import pytest
from photo_files import write_photo
from PIL import Image
from typer.testing import CliRunner

from finetune_cli import __version__
from finetune_cli.cli.app import app
from finetune_cli.config.load import load_config


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="finetune", **options)


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
def test_a_picture_that_cannot_be_called_so_is_told_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for arguments in (
        ["preview", tmp_path / "absent.yaml", "--output"],
        ["explain", tmp_path / "absent.jpg", "--output"],
        ["inspect", tmp_path / "absent", "--filters", "x.jpg"],
    ):
        answer = run(*arguments, tmp_path / name)
        assert answer.exit_code == 2
        assert "is not the name of a PNG file" in answer.stderr


def test_a_folder_that_was_never_a_run_is_told_so(tmp_path):
    answer = run("predict", tmp_path / "x.jpg", "--run", tmp_path)
    assert answer.exit_code == 1
    assert f"{tmp_path} is no run directory" in answer.stderr
    assert "resume" not in answer.stderr


def test_bad_photos_come_with_the_command_that_skips_them(tmp_path):
    photos = tmp_path / "my photos"
    for i in range(30):
        write_photo(photos / ("a" if i % 2 else "b") / f"{i}.png", str(i))
    (photos / "a" / "bad.jpg").write_bytes(b"")
    (tmp_path / "c.yaml").write_text("data: {train: my photos}\nmodel: {backbone: efficientnet_lite0}\n")
    assert run("check", f"data.train={photos}", f"runtime.cache_dir={tmp_path}").exit_code == 3
    for command in ("train", "check"):
        answer = run(command, tmp_path / "c.yaml", "runtime.cache_dir=" + str(tmp_path), "data.val_split=0.3")
        assert answer.exit_code == 3
        assert f"{photos}/a/bad.jpg: the file is empty" in answer.stderr
        words = f"finetune train {tmp_path}/c.yaml runtime.cache_dir={tmp_path} data.val_split=0.3"
        assert f"leave them out: {words} data.on_bad_image=skip\n" in answer.stderr
    assert not (tmp_path / "runs").exists()
    again = run("check", *shlex.split(words)[2:], "data.on_bad_image=skip")
    assert again.exit_code == 0


def test_overrides_without_a_config(tmp_path):
    answer = run("train", "training.seed=minus")
    assert answer.exit_code == 2
    assert "command line: `training.seed`" in answer.stderr
    assert "`data.train` is required" in answer.stderr


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    answer = run("train", f"data.train={tmp_path}", "--name", "../elsewhere")
    assert answer.exit_code == 2
    assert "output.name" in answer.stderr


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


def test_resume_finds_the_newest_in_a_named_folder(tmp_path):
    for i, name in enumerate(("new", "old", "done")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("data: {train: x}")
        (tmp_path / name / "split.csv").write_text("")
        os.utime(tmp_path / name / "split.csv", (9 - i, 9 - i))
    (tmp_path / "done" / "run.json").write_text("{}")
    assert f"resuming {tmp_path / 'new'}\n" in run("train", "--resume", tmp_path).stderr
    assert f"resuming {tmp_path / 'old'}\n" in run("train", "--resume", tmp_path / "old").stderr


def test_resume_refuses_other_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {train: x}")
    answer = run("train", "--resume", tmp_path, "training.learning_rate=1")
    assert answer.exit_code == 2
    assert "cannot change" in answer.stderr


@pytest.fixture
def photos(tiny_run, tmp_path):
    source = min((tiny_run.photos / "test").rglob("*.*"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a" + source.suffix, "b" + source.suffix):
        shutil.copy(source, folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    return folder


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
    assert lines[0] == "path,label,probability,label_2,probability_2,error"
    assert len(lines) == 4

    answer = run("predict", *sorted(photos.glob("[ab].*")), *common)
    assert answer.exit_code == 0
    assert all("%" in line for line in answer.stdout.splitlines())


def test_predict_says_what_it_left_out(tiny_run, photos):
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


def test_addresses_are_not_read_and_stay_intact(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    web = "https://host/photos/a.jpg"
    for arguments in (["predict", web], ["explain", web], ["train", web], ["init", web], ["evaluate", web]):
        answer = run(*arguments)
        assert answer.exit_code == 2
        assert answer.stderr.splitlines()[0] == f"error: {web} is an address, not a path"
    answer = run("train", "data.train=https://host/photos")
    assert answer.exit_code == 3
    assert "https://host/photos is an address, not a path" in answer.stderr
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


def test_names_cannot_drive_the_terminal(tiny_run, photos):
    evil = photos / "\x1b[31mred\nline.jpg"
    next(photos.glob("a.*")).rename(evil)
    answer = run("predict", evil, "--run", tiny_run.run.folder)
    assert answer.exit_code == 0
    assert "\x1b" not in answer.output
    assert len(answer.stdout.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error(tiny_run, photos):
    command = (
        f"{sys.executable} -m finetune_cli predict {photos} --run {tiny_run.run.folder} --format jsonl | head -n 1"
    )
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert "Broken" not in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_bug_is_told_in_a_line(monkeypatch, tmp_path):
    def broken(*_args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("finetune_cli.practice.sample.draw", broken)
    answer = run("sample", tmp_path / "x")
    assert answer.exit_code == 1
    assert "unexpected ZeroDivisionError: oops" in answer.stderr
    assert "Traceback" not in answer.output
    assert "Traceback" in run("sample", tmp_path / "x", "--debug").output


def test_want_of_memory_is_told_in_two_lines(monkeypatch, tmp_path):
    def hungry(*_args):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("finetune_cli.practice.sample.draw", hungry)
    answer = run("sample", tmp_path / "x")
    assert answer.exit_code == 1
    assert answer.stderr.splitlines()[0] == "error: out of memory: Unable to allocate 9 TiB"
    assert "Traceback" in run("sample", tmp_path / "x", "--debug").output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_first_imports_is_told_in_a_line(number):
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


def test_sample_init_check_preview(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("sample", "photos", "--photos", 6).exit_code == 0
    assert run("init", "photos").exit_code == 0
    assert run("init", "photos").exit_code == 2  # the config exists
    (tmp_path / "photos" / "notes.txt").write_text("")
    assert "2 .txt files" in run("init", "photos", "--output", "other.yaml").stderr
    answer = run("check", "config.yaml", f"runtime.cache_dir={tmp_path / 'cache'}")
    assert answer.exit_code == 0, answer.output
    assert "every photo was decoded" in answer.stdout
    answer = run("preview", "config.yaml", f"runtime.cache_dir={tmp_path / 'cache'}", "--photos", 2)
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "preview.png").is_file()


def test_init_and_check_propose_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label in ("cat", "dog"):
        for i in range(40):
            write_photo(tmp_path / "photos" / label / f"p{i // 4}-{i % 4}.png")
    answer = run("check", "data.train=photos", "model.backbone=efficientnet_lite0")
    assert answer.exit_code == 0, answer.output
    assert "warning: photos such as " in answer.stderr
    assert "'data.group_regex=(?:^|/)(p[0-9]+)'" in answer.stderr
    answer = run("init", "photos")
    assert "config.yaml sets data.group_regex" in answer.stderr
    text = (tmp_path / "config.yaml").read_text()
    assert "A guess: photos such as cat/p" in text
    assert load_config(tmp_path / "config.yaml").data.group_regex == "(?:^|/)(p[0-9]+)"
    answer = run("check", "config.yaml")
    assert answer.exit_code == 0, answer.output
    assert "warning" not in answer.stderr


def test_check_and_init_say_that_photos_of_one_moment_are_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(40):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2017:12:12 11:{i // 4:02}:{i % 4:02}"
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path, exif=exif)
    for arguments in (["check", "data.train=photos", "model.backbone=efficientnet_lite0"], ["init", "photos"]):
        answer = run(*arguments)
        assert answer.exit_code == 0, answer.output
        assert "warning: 40 of 40 photos with a recording time (Exif)" in answer.stderr
        assert "are in both train and val; if they show the same thing, name the groups" in answer.stderr
    assert load_config(tmp_path / "config.yaml").data.group_regex is None


def test_inspect_shows_a_run_and_a_config(tiny_run, tmp_path, monkeypatch):
    photo = next((tiny_run.photos / "test").rglob("*.*"))
    answer = run("inspect", tiny_run.run.folder, "--filters", photo, tmp_path / "filters.png")
    assert answer.exit_code == 0, answer.output
    assert "the gradient stops at" in answer.stdout
    assert (tmp_path / "filters.png").is_file()
    answer = run("inspect", tiny_run.run.folder, "--full", "--format", "json", "--batch", 3)
    told = json.loads(answer.stdout)
    with_picture = run(
        "inspect",
        tiny_run.run.folder,
        "--full",
        "--format",
        "json",
        "--batch",
        3,
        "--filters",
        photo,
        tmp_path / "f.png",
    )
    assert json.loads(with_picture.stdout) == told
    assert told["batch"] == 3
    assert told["parameters"] == sum(node["parameters"] for node in told["nodes"])
    assert run("inspect", tmp_path / "absent.yaml").exit_code == 2


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
def test_an_output_that_does_not_go_with_its_format_is_refused_before_the_work(tmp_path, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    answer = run("predict", "x.jpg", "--run", "absent", *options)
    assert answer.exit_code == 2
    assert f"error: {problem}\n" in answer.stderr
    assert (tmp_path / "there.csv").read_text() == "mine"


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


def test_resume_does_not_take_the_folder_of_a_project_for_a_run(tmp_path):
    """Such a folder has a config.yaml, too; it was once called a run that was not begun, and to be removed."""
    (tmp_path / "config.yaml").write_text("data: {train: x}")
    answer = run("train", "--resume", tmp_path)
    assert answer.exit_code == 1
    assert f"there is no unfinished run in {tmp_path}\n" in answer.stderr
    assert "remove" not in answer.stderr
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    assert f"in {tmp_path}; all that are there are finished\n" in run("train", "--resume", tmp_path).stderr


def test_an_output_that_is_not_a_file_is_not_probed(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("finetune_cli.files.check_writable", lambda folder: pytest.fail(f"probed {folder}"))
    answer = run("predict", "x.jpg", "--run", "absent", "--output", tmp_path / "pipe", "--format", "csv")
    assert "there is no run absent" in answer.stderr
