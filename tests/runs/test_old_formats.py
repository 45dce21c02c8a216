"""Runs that earlier versions made: a finished one is used, and an unfinished one resumed, as if it was made today.

`tests/data/runs/format-N/` holds both, with their photos and their backbone; `finetune_cli/runs/formats.py` says how to
add one.
"""

import csv
import json
import shutil

import numpy as np
import pytest
from paths import TESTS

from finetune_cli import api
from finetune_cli.config.load import load_config
from finetune_cli.fields import FieldError, Fields
from finetune_cli.head.keras_fit import EpochState
from finetune_cli.progress import Silent
from finetune_cli.runs import formats, start
from finetune_cli.runs.environment import read_environment
from finetune_cli.runs.run import Run
from finetune_cli.training import head_state, pipeline

FORMATS = [f"format-{number}" for number in range(1, formats.FORMAT)]


@pytest.fixture(params=FORMATS)
def old(request, tmp_path):
    """A copy of the runs of an old format, with what they need."""
    return shutil.copytree(TESTS / "data" / "runs" / request.param, tmp_path / request.param)


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_there_are_runs_of_every_old_format():
    assert len(formats._STEPS) == len(FORMATS) == len(list((TESTS / "data" / "runs").iterdir()))


def test_a_finished_run_gives_the_probabilities_that_it_was_finished_with(old):
    run = Run.load(old / "runs" / "tiny")
    assert run.manifest.views.per_photo == 2
    assert read_environment(run.file("environment.json")).facts["seed"] == 0
    recorded = rows(run.file("predictions.csv"))
    photos = [old / "photos" / "val" / row["path"] for row in recorded]
    for row, prediction in zip(recorded, api.load(run).predict(photos), strict=True):
        assert prediction.label == row["predicted"]
        expected = [float(row[name]) for name in run.classes]
        np.testing.assert_allclose(prediction.probabilities, expected, atol=2e-6)


def test_a_finished_run_is_evaluated(old):
    found = api.load(old / "runs" / "tiny").evaluate(old / "photos" / "val")
    recorded = json.loads((old / "runs" / "tiny" / "metrics.json").read_text())["val"]
    assert found.accuracy.value == recorded["accuracy"]
    assert found.confusion.tolist() == recorded["confusion_matrix"]


def test_an_unfinished_run_is_resumed(old):
    folder = old / "runs" / "unfinished"
    before = json.loads((folder / "checkpoints" / "epoch-0007" / "state.json").read_text())["state"]["history"]
    config = load_config(folder / "config.yaml", ["training.epochs=9"], own=True)
    observer = Silent()
    run = pipeline.resume(folder, config, observer)
    assert "resuming after epoch 7" in observer.notes
    history = rows(run.file("history.csv"))
    assert [int(row["epoch"]) for row in history] == list(range(1, 10))
    assert [float(row["val_loss"]) for row in history[:7]] == [row["val_loss"] for row in before]
    # The finished run had the same settings, and more epochs; another processor may round differently.
    uninterrupted = [float(row["val_loss"]) for row in rows(old / "runs" / "tiny" / "history.csv")]
    assert [float(row["val_loss"]) for row in history[7:]] == pytest.approx(uninterrupted[7:9], abs=1e-5)
    assert json.loads((folder / "run.json").read_text())["format"] == formats.FORMAT


def test_a_run_that_is_interrupted_again_has_the_newest_format(old):
    class Stop(Silent):
        def epoch(self, number, total, text):
            raise KeyboardInterrupt

    folder = old / "runs" / "unfinished"
    training_id = start.read(folder).training_id
    config = load_config(folder / "config.yaml", ["training.epochs=9"], own=True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.resume(folder, config, Stop())
    document = json.loads((folder / "checkpoints" / "epoch-0008" / "state.json").read_text())
    assert document["format"] == json.loads((folder / start.FILE).read_text())["format"] == formats.FORMAT
    assert start.read(folder).training_id == training_id == document["state"]["training_id"]
    state, _l2 = head_state.load_latest(folder, ("ant", "bee", "wasp"), training_id, Silent(), EpochState)
    assert state.epoch == 8


def test_a_resumed_environment_of_format_1():
    fields = formats.upgrade("environment.json", Fields({"went_on_with": ["threads: 3"], "threads": 2}))
    assert fields.document == {"resumed_with": ["threads: 3"], "threads": 2, "format": formats.FORMAT}


@pytest.mark.parametrize("file", ["run.json", "state.json"])
def test_a_file_that_always_had_a_format_needs_one(file):
    with pytest.raises(FieldError, match="format is missing"):
        formats.upgrade(file, Fields({}))
