"""docs/json.md names exactly the keys that `--format json` prints."""

import json
import re
import shutil

import pytest
from paths import ROOT
from typer.testing import CliRunner

from finetune_cli.cli.app import app

PAGE = (ROOT / "docs" / "json.md").read_text("utf-8")


def documented(command: str) -> set[str]:
    """The keys in the first column of the table of `command`."""
    section = PAGE.partition(f"## `finetune {command} --format json`")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


@pytest.fixture
def home(tiny_run, tmp_path, monkeypatch):
    """A folder with photos/ and runs/tiny-1."""
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1", ignore=shutil.ignore_patterns("evaluations"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["runs", "evaluate", "inspect"])
def test_the_keys_are_documented(home, command):
    arguments = {
        "runs": ["runs"],
        "evaluate": ["evaluate", "--no-report", "--compare", "tiny-1"],
        "inspect": ["inspect", "tiny-1", "--full"],
    }[command]
    answer = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert answer.exit_code == 0, answer.stderr
    printed = json.loads(answer.stdout)
    found = printed[0] if command == "runs" else printed
    assert set(found) == documented(command)


def test_the_keys_of_a_comparison_are_documented(home):
    answer = CliRunner().invoke(app, ["evaluate", "--no-report", "--compare", "tiny-1", "--format", "json"])
    row = next(line for line in PAGE.splitlines() if line.startswith("| `comparison`"))
    assert set(json.loads(answer.stdout)["comparison"]) == set(re.findall(r"`(\w+)`", row)) - {"comparison"}
