"""The answer `unknown` in `predict`, `evaluate`, the report and the Python API."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import unknown_run
from command_line import run as command
from PIL import Image

import finetune_cli
from finetune_cli.errors import UsageError
from finetune_cli.runs import run as runs


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return unknown_run.build(tiny_run, tmp_path_factory.mktemp("unknown") / "runs" / "tiny-1")


@pytest.fixture(scope="module")
def photos(tiny_run, tmp_path_factory):
    """A photo of a class that is like the training photos, and one of stripes."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copy(tiny_run.photos / "train" / tiny_run.twin, folder / "known.png")
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[::8] = 255
    Image.fromarray(stripes).save(folder / "stripes.png")
    return folder


def rows(answer):
    assert answer.exit_code == 0, answer.output
    return [json.loads(line) for line in answer.stdout.splitlines()]


def predict(run, photos, *options):
    return command("predict", photos, "--run", run.folder, "--quiet", *options)


def test_a_stranger_is_answered_unknown_and_the_probabilities_stay(run, photos):
    known, stranger = rows(predict(run, photos, "--format", "jsonl"))
    assert known["label"] == known["top"][0]["label"]
    assert known["p_value"] > 0.05
    assert stranger["label"] == "unknown"
    assert stranger["p_value"] == pytest.approx(1 / 31)
    assert stranger["probability"] == stranger["top"][0]["probability"]


def test_unknown_comes_before_unsure(run, photos):
    known, stranger = rows(predict(run, photos, "--format", "jsonl", "--min-confidence", 1))
    assert (known["label"], stranger["label"]) == ("unsure", "unknown")


def test_the_rate_changes_later(run, photos):
    assert {row["label"] for row in rows(predict(run, photos, "--format", "jsonl", "--unknown", 1))} == {"unknown"}
    assert "unknown" not in {row["label"] for row in rows(predict(run, photos, "--format", "jsonl", "--unknown", 0))}


def test_a_rate_that_the_run_cannot_give_names_the_least(run, photos):
    answer = predict(run, photos, "--unknown", 0.01)
    assert answer.exit_code == 2
    assert "needs 99 held-out photos, and this run has 30" in answer.stderr
    assert "choose 0.033 or more" in answer.stderr
    assert rows(predict(run, photos, "--format", "jsonl", "--unknown", 0.033))[1]["label"] == "unknown"


def test_the_other_forms(run, photos, tmp_path):
    lines = predict(run, photos, "--top-k", 1).stdout.splitlines()
    assert lines[1].startswith(f"{photos / 'stripes.png'}: unknown (p = 0.032)")
    found = list(csv.DictReader(predict(run, photos, "--format", "csv").stdout.splitlines()))
    assert float(found[1]["p_value"]) == pytest.approx(1 / 31, rel=1e-4)
    assert predict(run, photos, "--output", tmp_path / "x.parquet").exit_code == 0
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "x.parquet")["p_value"][1].as_py() == pytest.approx(1 / 31)


def test_a_run_that_was_trained_without_says_so(tiny_run, photos):
    answer = predict(tiny_run.run, photos, "--unknown", 0.05)
    assert answer.exit_code == 2
    assert "trained without `unknown`" in answer.stderr
    assert "unknown.false_rejects=0.05" in answer.stderr
    assert [row["p_value"] for row in rows(predict(tiny_run.run, photos, "--format", "jsonl"))] == [None, None]
    assert predict(tiny_run.run, photos, "--unknown", 0).exit_code == 0


def test_a_class_of_that_name_is_not_mixed_up_with_the_answer(run, photos, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    manifest = replace(run.manifest, classes=("ant", "bee", "unknown"))
    named = runs.finish(folder, manifest, run.manifest.files)
    answer = predict(named, photos)
    assert answer.exit_code == 2
    assert "a class named unknown" in answer.stderr
    assert predict(named, photos, "--unknown", 0).exit_code == 0


def test_a_damaged_file_is_no_answer(run, photos, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "unknown-scores.npy").write_bytes(b"")
    answer = command("predict", photos, "--run", folder)
    assert answer.exit_code == 1
    assert "unknown-scores.npy is damaged" in answer.stderr


def test_from_python(run, tiny_run, photos):
    classifier = finetune_cli.load(run)
    known, stranger = classifier.predict([photos / "known.png", photos / "stripes.png"])
    assert known.label == known.top[0][0]
    assert stranger.label == "unknown"
    assert stranger.probability == stranger.top[0][1]
    assert stranger.p_value == pytest.approx(1 / 31)
    assert classifier.predict(photos / "stripes.png", unknown=0).label == stranger.top[0][0]
    assert finetune_cli.load(tiny_run.run).predict(photos / "stripes.png").p_value is None
    for wrong in (0.01, 2, -1):
        with pytest.raises(UsageError):
            classifier.predict(photos / "stripes.png", unknown=wrong)
    with pytest.raises(UsageError, match="trained without"):
        finetune_cli.load(tiny_run.run).predict(photos / "stripes.png", unknown=0.05)


def test_evaluate_measures_the_share_that_is_refused(run, tmp_path):
    answer = command("evaluate", "--run", run.folder, "--output", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert "of 24 photos; promised: at most 5.0% on average" in answer.stdout  # one of 25 was trained on, too
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]["unknown"]
    table = list(csv.DictReader((tmp_path / "out" / "unknown.csv").read_text().splitlines()))
    assert len(table) == 25
    refused = [row for row in table if row["answer"] == "unknown"]
    assert len(refused) == found["refused"]
    assert all((float(row["p_value"]) <= 0.05) == (row["answer"] == "unknown") for row in table)
    assert found["counted"] == 24
    assert found["share_interval"][0] <= found["share"] <= found["share_interval"][1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="unknown"' in page
    assert "Of 24 new photos in this report" in page
    assert "75.0%" in page  # of the class that was left out last


def test_photos_that_set_the_threshold_prove_nothing(run, tiny_run, tmp_path):
    data = tiny_run.photos / "val"
    answer = command("evaluate", data, "--run", run.folder, "--output", tmp_path / "out", "--no-report")
    assert answer.exit_code == 0, answer.output
    assert "proves nothing" in answer.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]["unknown"]["share"] is None


def test_a_run_without_it_writes_nothing_about_it(tiny_run, tmp_path):
    answer = command("evaluate", "--run", tiny_run.run.folder, "--output", tmp_path / "out", "--no-report")
    assert answer.exit_code == 0, answer.output
    assert not (tmp_path / "out" / "unknown.csv").exists()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]["unknown"] is None


def test_an_export_cannot_tell_and_says_so(exported, photos):
    folder = next(each.folder for each in exported.exports if each.form == "openvino")
    answer = command("predict", photos, "--model", folder, "--unknown", 0.05)
    assert answer.exit_code == 2
    assert "an export cannot tell" in answer.stderr
    assert "--run RUN" in answer.stderr
    assert json.loads((folder / "classes.json").read_text())["unknown"].startswith("cannot tell")
