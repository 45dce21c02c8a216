"""`finetune runs`: finished, unfinished and damaged runs in one list, for persons and programs."""

import json
from dataclasses import replace

import pytest
from manifest_example import EXAMPLE
from typer.testing import CliRunner

from finetune_cli.cli.app import app
from finetune_cli.runs import run
from finetune_cli.runs.run import SplitRow


def make(folder, **changes):
    folder.mkdir(parents=True)
    run.write_split(
        folder / "split.csv", [SplitRow("train", "ant", "00", "1.jpg"), SplitRow("val", "bee", "01", "2.jpg")]
    )
    run.finish(folder, replace(EXAMPLE, **changes), ["split.csv"])


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "b-1", created="2026-03-01T00:00:00+00:00")
    make(tmp_path / "runs" / "a-1", created="2026-05-01T00:00:00+00:00", metrics={})
    make(tmp_path / "runs" / "begun-1")
    (tmp_path / "runs" / "begun-1" / "run.json").unlink()
    make(tmp_path / "runs" / "broken-1")
    (tmp_path / "runs" / "broken-1" / "run.json").write_text("{")
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path / "runs"


def test_json(directory):
    answer = CliRunner().invoke(app, ["runs", "--format", "json"])
    assert answer.exit_code == 0
    rows = {row["name"]: row for row in json.loads(answer.stdout)}
    assert set(rows) == {"a-1", "b-1", "begun-1", "broken-1"}
    assert [name for name in rows if name in {"a-1", "b-1"}] == ["b-1", "a-1"]
    assert rows["b-1"] == {
        "name": "b-1", "path": "runs/b-1", "state": "finished", "created": "2026-03-01T00:00:00+00:00", "photos": 29,
        "classes": ["ant", "bee"], "accuracy": 0.75, "accuracy_interval": [0.5, 0.9], "split": "val",
        "backbone": "resnet50", "kind": "frozen", "problem": None,
    }  # fmt: skip
    assert rows["a-1"]["accuracy"] is None
    assert (rows["begun-1"]["state"], rows["begun-1"]["photos"]) == ("unfinished", 2)
    assert rows["broken-1"]["state"] == "damaged"
    assert "run.json is damaged" in rows["broken-1"]["problem"]


def test_a_table(directory):
    answer = CliRunner().invoke(app, ["runs", str(directory)])
    assert answer.exit_code == 0
    lines = {line.split()[0]: line.split() for line in answer.stdout.splitlines() if line.strip()}
    assert lines["b-1"] == ["b-1", "2026-03-01", "29", "2", "75.0%", "validation", "resnet50", "frozen"]
    assert lines["begun-1"][-1] == "unfinished"
    assert lines["broken-1"][-1] == "damaged"
    assert "run.json is damaged" in answer.stdout
    assert f"finetune train --resume {directory / 'begun-1'}" in answer.stdout


def test_nothing_to_list(tmp_path):
    answer = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert (answer.exit_code, answer.stdout) == (0, f"there are no runs in {tmp_path}\n")
    assert CliRunner().invoke(app, ["runs", str(tmp_path), "--format", "json"]).stdout == "[]\n"
    answer = CliRunner().invoke(app, ["runs", str(tmp_path / "absent")])
    assert answer.exit_code == 1
    assert "cannot be listed: No such file or directory" in answer.stderr


def test_train_prints_the_path_alone(directory, monkeypatch, tmp_path):
    from finetune_cli.training import pipeline

    monkeypatch.setattr(pipeline, "train", lambda _config, _console: run.Run.load(directory / "b-1"))
    (tmp_path / "photos").mkdir()
    arguments = ["train", f"data.train={tmp_path / 'photos'}", "model.backbone=efficientnet_lite0"]
    answer = CliRunner().invoke(app, [*arguments, "--print-run"])
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout == f"{directory / 'b-1'}\n"
    assert "75.0%" in answer.stderr
    answer = CliRunner().invoke(app, arguments)
    assert "75.0%" in answer.stdout


def test_a_run_that_was_not_named_is_said_with_its_date_and_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "many-1", classes=tuple(f"c{i:02}" for i in range(40)))
    explain = CliRunner().invoke(app, ["explain", "x.jpg", "--class", "none"])
    assert "run: runs/many-1 of 2026-01-01, classes: c00, c01, c02, c03, c04, c05, c06 and 33 others" in explain.stderr
    named = CliRunner().invoke(app, ["explain", "x.jpg", "--class", "none", "--run", "many-1"])
    assert "many-1 has no class 'none'" in named.stderr
    assert "run: " not in named.stderr
    wrong = CliRunner().invoke(app, ["explain", "x.jpg", "--run", "none-1"])
    assert "there is no run none-1" in wrong.stderr
    assert "finetune runs" in wrong.stderr
