"""Photos in S3, by the real commands and a real server (moto) on the loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import runs_fixture
import yaml
from command_line import run
from trainings import ENVIRONMENT, SAME

import stores
from finetune_cli import signals, storage
from finetune_cli.errors import Interrupted, StorageError
from finetune_cli.storage import Patience

pytestmark = pytest.mark.machines

PHOTOS = 2 * (16 + 10) + 1  # of train and val, with the wrong one


@pytest.fixture(scope="module")
def s3():
    """A server with the bucket `photos`, and what commands in this process need to use it."""
    pytest.importorskip("moto.server")
    with stores.s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        storage._file_system.cache_clear()
        server.make_bucket("photos")
        yield server
        storage._file_system.cache_clear()


@pytest.fixture(autouse=True)
def unspoilt(request):
    yield
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3").spoil("", count=0)


@pytest.fixture
def hasty(monkeypatch):
    """Little patience, so that a server that is silent costs seconds."""
    monkeypatch.setattr(storage, "patience", Patience(1.0, 1.0, 10.0, (0.01, 0.02, 0.04, 0.08)))
    storage._file_system.cache_clear()
    yield
    storage._file_system.cache_clear()


# Objects


def test_objects_are_written_read_and_listed(s3):
    for name in ("a/1", "a/b/2 ä?.png", "a/b/3#%41.png"):
        storage.write(f"s3://photos/objects/{name}", name.encode())
        assert storage.read(f"s3://photos/objects/{name}") == name.encode()
    storage.write("s3://photos/objects/empty", b"")
    assert storage.read("s3://photos/objects/empty") == b""
    assert [entry.name for entry in storage.entries("s3://photos/objects")] == ["a/", "empty"]
    below = {entry.name: entry for entry in storage.entries("s3://photos/objects", deep=True)}
    assert list(below) == ["a/1", "a/b/2 ä?.png", "a/b/3#%41.png", "empty"]
    data, version = storage.read_version("s3://photos/objects/a/1")
    assert data == b"a/1"
    assert version == below["a/1"].version == storage.status("s3://photos/objects/a/1").version
    assert storage.exists("s3://photos/objects/a/1")
    assert not storage.exists("s3://photos/objects/a")
    assert storage.is_folder("s3://photos/objects/a")
    with pytest.raises(FileNotFoundError):
        storage.read("s3://photos/objects/a/none")
    with pytest.raises(OSError, match="more than 2 bytes"):
        storage.read("s3://photos/objects/a/1", 2)
    with pytest.raises(StorageError, match="there is no such bucket"):
        storage.write("s3://no-such-bucket/a", b"x")
    with pytest.raises(StorageError, match="there is no bucket"):
        list(storage.entries("s3://no-such-bucket/a"))


def test_many_objects_are_listed_in_pages_and_in_order(s3):
    names = [f"many/{i % 7}/{i:04}.png" for i in range(1050)]
    for name in names:
        s3.put_object("photos", name, b"x")
    asked = int(s3.ask("count/list"))
    listing = storage.entries("s3://photos/many", deep=True)
    first = next(listing)
    assert int(s3.ask("count/list")) == asked + 1  # the second page is not asked for yet
    assert [first.name, *(entry.name for entry in listing)] == sorted(name.removeprefix("many/") for name in names)
    assert int(s3.ask("count/list")) == asked + 2


@pytest.mark.parametrize("status", ["500", "503"])
def test_a_server_that_fails_now_and_then_is_asked_again(s3, hasty, status):
    storage.write("s3://photos/again/1", b"x")
    before = storage.retries()
    s3.spoil(status, every=2)
    for _ in range(4):
        assert storage.read("s3://photos/again/1") == b"x"
        assert storage.read_version("s3://photos/again/1")[0] == b"x"
        storage.write("s3://photos/again/2", b"y")
    assert storage.retries() - before >= 10


@pytest.mark.parametrize("status", ["500", "503", "hang"])
def test_a_server_that_always_fails_is_an_error_in_known_time(s3, hasty, status):
    storage.write("s3://photos/never/1", b"x")
    s3.spoil(status)
    started = time.monotonic()
    with pytest.raises(StorageError, match="s3://photos/never/1 cannot be read, though it was tried again"):
        storage.read("s3://photos/never/1")
    assert time.monotonic() - started < 15


def test_a_signal_is_not_kept_waiting_by_a_silent_server(s3, monkeypatch):
    storage.write("s3://photos/never/3", b"x")
    s3.spoil("hang")
    threading.Timer(1.0, lambda: signals._received.append(signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            storage.read("s3://photos/never/3")
    finally:
        signals._received.clear()
    assert time.monotonic() - started < 5


def test_a_drop_by_drop_answer_ends_with_the_patience(s3, monkeypatch):
    storage.write("s3://photos/never/2", b"x" * 1000)
    monkeypatch.setattr(storage, "patience", Patience(1.0, 5.0, 3.0, (0.01,)))
    storage._file_system.cache_clear()
    s3.spoil("drip")
    started = time.monotonic()
    with pytest.raises(StorageError, match="the store does not answer"):
        storage.read("s3://photos/never/2")
    assert time.monotonic() - started < 6
    storage._file_system.cache_clear()


# Commands


@pytest.fixture(scope="module")
def trained(s3, tmp_path_factory):
    """The same training on photos in S3 and on their files; the S3 one as a process, with its output."""
    folder = tmp_path_factory.mktemp("trained")
    runs_fixture.draw_photos(folder / "set", ("ant", "bee"))
    s3.put(folder / "set", "photos", "set/")
    values = {
        "model": {"backbone": "efficientnet_lite0"},
        "image": {"size": 64},
        "augmentation": {"views": 2, "horizontal_flip": True},
    }
    for name, where in (("s3", "s3://photos/set"), ("local", str(folder / "set"))):
        own = {"data": {"train": where}, "runtime": {"cache_dir": f"cache-{name}"}, "output": {"directory": "runs"}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | own))
    outputs, reads = [], [s3.reads()]
    for arguments in (["s3", "--debug"], ["s3-again"]):
        outputs.append(command(folder, "train", "s3.yaml", "--name", *arguments))
        reads.append(s3.reads())
    command(folder, "train", "local.yaml", "--name", "local")
    return folder, outputs, [after - before for before, after in pairwise(reads)]


def command(folder: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    """What a command of its own process writes to standard output and standard error."""
    ended = subprocess.run(
        [sys.executable, "-m", "finetune_cli", *arguments],
        cwd=folder, env={**ENVIRONMENT, **os.environ, **variables}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


def test_a_run_on_s3_is_that_on_files(trained):
    folder, _outputs, _reads = trained
    for name in set(SAME) - {"config.yaml", "curves.png"}:
        assert (folder / "runs/s3" / name).read_bytes() == (folder / "runs/local" / name).read_bytes(), name
    own, local = (json.loads((folder / "runs" / name / "run.json").read_text()) for name in ("s3", "local"))
    differ = {key for key in own | local if own.get(key) != local.get(key)}
    assert differ <= {"created", "cache_bytes", "roots", "seconds", "files", "sha256", "fine_tuning_seconds"}, differ
    assert own["roots"]["train"] == "s3://photos/set/train"


def test_an_object_is_read_once(trained):
    folder, _outputs, (first, second) = trained
    manifest = json.loads((folder / "runs/s3/run.json").read_text())
    photos = sum(manifest["photos"].values())
    checked = manifest["parity"]["photos"]
    assert first == photos + checked  # those that the saved model answers for are read once more
    assert second == checked
    assert manifest["views"]["cached"] == 0
    again = json.loads((folder / "runs/s3-again/run.json").read_text())
    assert again["views"]["computed"] == 0
    assert "storage_retries" not in manifest


def test_no_secret_is_written_or_shown(trained):
    folder, outputs, _reads = trained
    command(folder, "evaluate", "--run", "runs/s3", "--debug")
    outputs = [
        *outputs,
        command(folder, "train", "s3.yaml", "--debug", code=1, AWS_ENDPOINT_URL="http://a:hush@0.0.0.0:9"),
    ]
    assert "cannot be listed" in outputs[-1]
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for secret in (*stores.SECRETS.values(), "hush"):
        assert not any(secret in output for output in outputs)
        assert not any(secret.encode() in content for content in written)


def test_the_other_commands(trained, tmp_path):
    folder, _outputs, _reads = trained
    run_folder = folder / "runs/s3"
    answers = []
    for where in ("s3://photos/set/test", folder / "set/test"):
        answer = run("predict", where, "--run", run_folder, "--format", "jsonl")
        assert answer.exit_code == 0, answer.stderr
        answers.append([json.loads(line) for line in answer.stdout.splitlines()])
    assert answers[0][0]["path"].startswith("s3://photos/set/test/ant/ant-00.png")
    assert [{**row, "path": ""} for row in answers[0]] == [{**row, "path": ""} for row in answers[1]]
    answer = run("predict", "s3://photos/set/none.png", "s3://photos/none", "--run", run_folder)
    assert answer.exit_code == 3
    assert answer.stdout.count("there is no such file") == 2
    shown = [run("evaluate", where, "--run", run_folder, "--format", "json", "--output", tmp_path / name).stdout
             for where, name in (("s3://photos/set/test", "a"), (folder / "set/test", "b"))]  # fmt: skip
    assert json.loads(shown[0])["accuracy"] == json.loads(shown[1])["accuracy"]
    assert "data:image/jpeg" in (tmp_path / "a/report.html").read_text()
    assert run("evaluate", "--run", run_folder, "--data", "s3://photos/set", "--output", tmp_path / "c").exit_code == 0
    answer = run("doctor", folder / "s3.yaml", "--output", tmp_path)
    assert answer.exit_code == 0, answer.stderr
    local = run("doctor", folder / "local.yaml", "--output", tmp_path / "local")
    assert (tmp_path / "fixes.csv").read_text() == (tmp_path / "local/fixes.csv").read_text(), local.stderr
    for arguments in (["check", folder / "s3.yaml"], ["preview", folder / "s3.yaml", "--output", tmp_path / "p.png"],
                      ["init", "s3://photos/set", "--output", tmp_path / "new.yaml"],
                      ["explain", "s3://photos/set/test/ant/ant-00.png", "--run", run_folder, "--output",
                       tmp_path / "e.png"]):  # fmt: skip
        answer = run(*arguments)
        assert answer.exit_code == 0, answer.stderr
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]["train"] == "s3://photos/set"


def test_a_table_with_an_automatic_split_reads_twice(s3, trained, tmp_path):
    folder, _outputs, _reads = trained
    rows = [f"s3://photos/set/train/{path.parent.name}/{path.name},{path.parent.name}"
            for path in sorted((folder / "set/train").rglob("*.png"))]  # fmt: skip
    s3.put_object("photos", "set/t.csv", "\n".join(["image_path,label", *rows]).encode())
    before = s3.reads()
    output = command(
        tmp_path, "train", str(folder / "s3.yaml"), "data.train=s3://photos/set/t.csv", "--name", "table",
        f"runtime.cache_dir={tmp_path}/cache", f"output.directory={tmp_path}/runs",
    )  # fmt: skip
    assert f"{len(rows)} photos of a store must be read before the split" in output
    manifest = json.loads((tmp_path / "runs/table/run.json").read_text())
    tables = 2
    expected = len(rows) + manifest["photos"]["train"] + manifest["parity"]["photos"] + tables
    assert s3.reads() - before <= expected + manifest["photos"]["val"]


def test_a_training_on_a_server_that_fails_now_and_then(s3, trained, tmp_path):
    folder, _outputs, _reads = trained
    s3.spoil("503", every=9)
    output = command(
        tmp_path, "train", str(folder / "s3.yaml"), "--name", "x", f"output.directory={tmp_path}/runs",
        f"runtime.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    retries = json.loads((tmp_path / "runs/x/run.json").read_text())["storage_retries"]
    assert retries > 0
    assert f"requests to a store that had to be made again: {retries}" in output
    for name in ("predictions.csv", "inference/model.bin", "split.csv"):
        assert (tmp_path / "runs/x" / name).read_bytes() == (folder / "runs/s3" / name).read_bytes()


def test_a_photo_that_is_written_again_is_read_again(s3, trained, tmp_path):
    folder, _outputs, _reads = trained
    changed = folder / "set/train/ant/ant-03.png"
    storage.write("s3://photos/set/train/ant/ant-03.png", (folder / "set/test/ant/ant-03.png").read_bytes())
    try:
        command(folder, "train", "s3.yaml", "--name", "changed")
    finally:
        storage.write("s3://photos/set/train/ant/ant-03.png", changed.read_bytes())
    views = json.loads((folder / "runs/changed/run.json").read_text())["views"]
    assert views["computed"] == 2
