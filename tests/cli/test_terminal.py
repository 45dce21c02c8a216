"""A terminal of 60 columns, completion, and the time until the first line."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from paths import SOURCE
from typer.testing import CliRunner

from finetune_cli.cli.app import app

COLUMNS = 60
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}
NAMES = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def in_terminal(*arguments: object, **variables: str) -> list[str]:
    """The lines that `finetune` writes to a terminal of 60 columns, without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw_in_terminal(*arguments, **variables)).splitlines()


def raw_in_terminal(*arguments: object, **variables: str) -> str:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "finetune_cli", *map(str, arguments)]
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    environment |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"} | variables
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as child:
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # Linux answers EIO when the other side has closed
            while data := os.read(master, 1 << 16):
                written += data
        os.close(master)
        assert child.wait(60) == 0, written
    return written.decode()


@pytest.mark.parametrize("name", NAMES)
def test_help_fits(name):
    answer = CliRunner().invoke(app, [name, "--help"], terminal_width=COLUMNS)
    assert answer.exit_code == 0
    for line in answer.output.splitlines():
        assert len(line) <= COLUMNS or len(line.split()) <= 2, line  # an option and its choices cannot be folded


def test_tables_fit(tiny_run, tmp_path):
    photo = next((tiny_run.photos / "test").rglob("*.png"))
    run = ("--run", tiny_run.run.folder)
    for arguments in (
        ["inspect", tiny_run.run.folder],
        ["explain", photo, *run, "--output", tmp_path / "x.png"],
        ["backbones"],
    ):
        lines = in_terminal(*arguments)
        assert len(lines) > 5
        tables = [line for line in lines if re.search(r"\S  +\S", line)]
        assert all(len(line.rstrip()) <= COLUMNS for line in tables)
        words = {word for line in lines for word in re.split(r"[\s:]+", line)}
        assert (
            words
            >= {"inspect": {"parameters"}, "explain": {"probability"}, "backbones": {"inceptionresnetv2"}}[arguments[0]]
        )


def test_no_color_in_a_terminal(tiny_run):
    check = ("check", f"data.train={tiny_run.photos}", f"runtime.cache_dir={tiny_run.cache}")
    assert "\x1b" not in raw_in_terminal(*check, NO_COLOR="1")
    assert "\x1b" in raw_in_terminal(*check)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(monkeypatch, shell):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    answer = CliRunner().invoke(app, ["--show-completion"], prog_name="finetune")
    assert answer.exit_code == 0
    assert "_FINETUNE_COMPLETE" in answer.stdout


def test_commands_are_completed():
    variables = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": "finetune pre", "COMP_CWORD": "1"}
    answer = CliRunner().invoke(app, [], env=variables, prog_name="finetune")
    assert answer.stdout.split() == ["predict", "preview"]
