"""The figures of `export --benchmark`: those of all test photos, beside the run's own."""

import csv
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from finetune_cli.cli.app import app
from finetune_cli.exports.benchmark import Benchmark
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.progress import Silent


@pytest.fixture(scope="module")
def benchmark(tiny_run):
    return Benchmark(tiny_run.run, None, Silent())


def test_the_run_has_the_accuracy_that_was_measured(benchmark, tiny_run):
    with (tiny_run.run.folder / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    figures = benchmark.run_figures
    assert figures.photos == len(rows) == 25
    assert figures.accuracy.value == sum(row["true"] == row["predicted"] for row in rows) / len(rows)
    assert figures.accuracy.low < figures.accuracy.value < figures.accuracy.high
    assert (figures.agreement.value, figures.largest, figures.mean) == (1, 0, 0)
    assert figures.source == "test photos of the run"
    assert figures.milliseconds > 0


def test_another_model_is_compared_with_the_run(benchmark, tiny_run):
    class Shifted(RunPredictor):
        """Gives the answer of the next class."""

        def probabilities(self, photos):
            return np.roll(super().probabilities(photos), 1, axis=1)

    steps = []
    figures = benchmark.measure(Shifted(tiny_run.run, 1), steps.append)
    assert sum(steps) == 25
    assert figures.agreement.value == 0
    assert figures.accuracy.value < benchmark.run_figures.accuracy.value
    assert 0 < figures.mean < figures.largest <= 1


def test_the_table_and_the_file(tiny_run, tmp_path):
    arguments = ["export", "--run", tiny_run.run.folder, "--format", "openvino", "--output", tmp_path / "x"]
    answer = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--benchmark"]])
    assert answer.exit_code == 0, answer.output
    assert "25 test photos of the run, one at a time" in answer.stdout
    assert [line.split()[0] for line in answer.stdout.splitlines() if "100.0%" in line and " to " in line][-2:] == [
        "run",
        "openvino",
    ]
    said = json.loads((tmp_path / "x" / "parity.json").read_text())["benchmark"]
    assert said["photos"] == 25
    assert said["top1_agreement"] == 1
    assert said["accuracy_interval"][0] < said["accuracy"] < said["accuracy_interval"][1]


def test_photos_that_cannot_be_read_are_left_out(tiny_run, tmp_path):
    photos = shutil.copytree(tiny_run.photos, tmp_path / "photos")
    min((photos / "test" / "bee").iterdir()).write_bytes(b"no photo")
    observer = Silent()
    request = ExportRequest(("openvino",), tmp_path / "x", root=photos, benchmark=True)
    (one,) = export(tiny_run.run, request, observer).exports
    assert one.figures is not None
    assert one.figures.photos == 24
    assert any(warning.startswith("1 of the test photos") for warning in observer.warnings)
