"""Standard streams that are closed, full or of another encoding: a clear line, an exit code, and no result lost."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from paths import SOURCE

pytestmark = pytest.mark.skipif(os.name == "nt", reason="/dev/full and closed descriptors are POSIX")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


def shell(command: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """Run ``finetune`` with `command`, in which a shell handles the redirections."""
    whole = f"{shlex.quote(sys.executable)} -m finetune_cli {command}"
    return subprocess.run(whole, shell=True, capture_output=True, timeout=120, check=False, env=ENVIRONMENT | variables)


@pytest.mark.parametrize("command", ["--version", "cache info --dir {}"])
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", b"No space left on device"), (">&-", b"it is closed")]
)
def test_a_result_that_cannot_be_written(tmp_path, command, redirection, reason):
    answer = shell(f"{command.format(tmp_path)} {redirection}")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[0] == b"error: cannot write to standard output: " + reason
    assert len(answer.stderr.splitlines()) == 2


def test_unbuffered_output_on_a_full_device(tmp_path):
    answer = shell(f"cache info --dir {tmp_path} >/dev/full", PYTHONUNBUFFERED="1")
    assert answer.returncode == 1
    assert answer.stderr.startswith(b"error: cannot write to standard output: No space left on device\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_messages_that_cannot_be_written_do_not_stop_the_work(tmp_path, redirection):
    assert shell(f"sample {tmp_path}/s --photos 2 {redirection}").returncode == 0
    assert len(list((tmp_path / "s").rglob("*.jpg"))) == 4


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    def drawn(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.*")}

    assert shell(f"sample {tmp_path}/open --photos 2").returncode == 0
    assert shell(f"sample {tmp_path}/closed --photos 2 <&- >&- 2>&-").returncode == 1
    assert drawn("closed") == drawn("open")


def test_no_standard_input_is_an_empty_one(tiny_run):
    answer = shell(f"predict - --run {tiny_run.run.folder} <&-")
    assert answer.returncode == 3
    assert b"no photo was found" in answer.stderr


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_names_in_another_encoding(tiny_run, tmp_path, variables):
    if variables.get("LC_ALL"):
        variables = {**variables, "PYTHONCOERCECLOCALE": "0"}
    photo = tmp_path / "ß.png"
    shutil.copy(next((tiny_run.photos / "test").rglob("*.png")), photo)
    common = f"predict {photo} --run {tiny_run.run.folder} --quiet"
    for form, name in (("csv", os.fsencode(photo)), ("jsonl", None), ("table", None)):
        answer = shell(f"{common} --format {form}", **variables)
        assert answer.returncode == 0, answer.stderr
        if form == "jsonl":
            path = json.loads(answer.stdout)["path"]
            assert path.encode("utf-8", "surrogateescape") == os.fsencode(photo)
        elif form == "table":
            assert answer.stdout.isascii()
            assert b"\\x" in answer.stdout
        else:
            assert name in answer.stdout


def test_warnings_as_errors_do_not_reach_libraries():
    script = (
        "import warnings; from finetune_cli import streams; streams.prepare(); warnings.warn('of a library'); print(1)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    answer = subprocess.run(command, capture_output=True, timeout=60, check=True, env=ENVIRONMENT)
    assert answer.stdout == b"1\n"
    assert b"UserWarning: of a library" in answer.stderr


@pytest.mark.slow
def test_training_in_keras_survives_warnings_as_errors(tmp_path):
    assert shell(f"sample {tmp_path}/photos --photos 8").returncode == 0
    keys = "model.backbone=efficientnet_lite0 augmentation=null training.solver=adam training.epochs=2"
    folders = f"data.train={tmp_path}/photos output.directory={tmp_path}/runs runtime.cache_dir={tmp_path}/cache"
    answer = shell(f"train {folders} {keys}", PYTHONWARNINGS="error")
    assert answer.returncode == 0, answer.stderr
