"""Runs with `data.folds`, on drawn scenes with a tiny network: every photo trains, and every photo validates."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import trainings
from PIL import Image

import finetune_cli
from finetune_cli.cli import train as command_line
from finetune_cli.cli.console import Console
from finetune_cli.config.load import load_config
from finetune_cli.errors import DataError, Interrupted, RunError
from finetune_cli.evaluation import evaluate as evaluation
from finetune_cli.evaluation.evaluate import EvaluationRequest
from finetune_cli.exports import parity
from finetune_cli.head import out_of_fold
from finetune_cli.head.lbfgs import fit_lbfgs
from finetune_cli.metrics.calibration import softmax
from finetune_cli.metrics.scores import wilson
from finetune_cli.practice import sample
from finetune_cli.progress import Silent
from finetune_cli.report import html
from finetune_cli.runs import listing
from finetune_cli.runs.run import Run
from finetune_cli.training import fit, pipeline, prepare
from finetune_cli.training.requirements import check_settings

ADAM = ("training.solver=adam", "training.epochs=4", "training.batch_size=8", "training.l2=0.01")


class Workshop:
    """32 photos of two classes, a backbone, and a cache that all runs share."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.cache, self.backbone = folder / "photos", folder / "cache", folder / "small.keras"
        sample.draw(self.photos, 16, 0, lambda _n: None)
        trainings.build_backbone(self.backbone)

    def config(self, folder: Path, *overrides: str):
        return load_config(
            None,
            [
                f"data.train={self.photos}",
                "data.folds=4",
                f"model.backbone={self.backbone}",
                "image.size=64",
                "augmentation.horizontal_flip=true",
                "augmentation.views=2",
                "runtime.feature_precision=float32",
                f"runtime.cache_dir={self.cache}",
                f"output.directory={folder / 'runs'}",
                *overrides,
            ],
        )

    def train(self, folder: Path, *overrides: str) -> Run:
        return pipeline.train(self.config(folder, *overrides), Silent())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, workshop):
    return workshop.train(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished_by_adam(tmp_path_factory, workshop):
    return workshop.train(tmp_path_factory.mktemp("adam"), *ADAM)


def predictions(run: Run) -> dict[str, np.ndarray]:
    """Photo -> probabilities, as predictions.csv has them."""
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"folds"}
    return {row["path"]: np.array([float(row[name]) for name in run.classes]) for row in rows}


def test_every_photo_trains_and_validates(finished):
    assert finished.manifest.photos == {"train": 32}
    assert set(finished.manifest.metrics) == {"folds"}
    assert finished.manifest.metrics["folds"].photos == 32
    assert sorted((row.split, row.label, row.fold) for row in finished.split()) == sorted(
        ("train", name, fold) for name in finished.classes for fold in (1, 2, 3, 4) * 4
    )
    assert set(predictions(finished)) == {row.path for row in finished.split()}
    assert finished.manifest.parity is not None
    assert finished.manifest.parity.photos == 16
    (row,) = listing.runs(finished.folder.parent)
    assert (row.split, row.accuracy) == ("folds", finished.manifest.metrics["folds"].accuracy)


def test_a_photo_is_predicted_by_a_head_that_was_fitted_without_its_fold(finished, workshop, tmp_path):
    config = workshop.config(tmp_path)
    prepared = prepare.prepare(check_settings(config), Silent())
    data = fit.head_data(config, prepared.parts["train"], finished.classes)
    measured = predictions(finished)
    final = fit_lbfgs(data.rows(), finished.manifest.solver.l2)
    apart = 0.0
    for fold in (1, 2, 3, 4):
        own = np.flatnonzero(data.folds == fold)
        head = fit_lbfgs(data.part(data.folds != fold).rows(), finished.manifest.solver.l2)
        features = prepared.validating.array[own, 0]
        ours = softmax(head.logits(features), finished.temperature)
        theirs = np.stack([measured[prepared.parts["train"].samples[i].name] for i in own])
        np.testing.assert_allclose(ours, theirs, atol=5e-3)
        apart = max(apart, np.abs(softmax(final.logits(features), finished.temperature) - theirs).max())
    assert apart > 0.01


def test_evaluate_reads_the_predictions_and_needs_no_photo(finished, tmp_path):
    moved = shutil.copytree(finished.folder, tmp_path / "far" / "away" / "run")  # its photos are not found from there
    judged = evaluation.judge_photos(Run.load(moved), Silent())
    measured = finished.manifest.metrics["folds"]
    assert judged.photos.source == "training photos of the run, cross-validated in 4 folds"
    assert (judged.evaluation.photos, judged.seen, judged.bad) == (32, 0, ())
    assert judged.evaluation.accuracy.value == measured.accuracy
    assert (judged.evaluation.accuracy.low, judged.evaluation.accuracy.high) == measured.accuracy_interval
    plain = wilson(round(32 * measured.accuracy), 32)
    assert judged.evaluation.accuracy.low < plain.low
    assert judged.evaluation.log_loss == pytest.approx(measured.document["log_loss"], abs=1e-5)


def test_the_api_gives_the_out_of_fold_evaluation(finished):
    found = finetune_cli.load(finished).evaluate()
    assert (found.photos, found.accuracy.value) == (32, finished.manifest.metrics["folds"].accuracy)


def test_the_report_says_what_was_measured_and_how(finished, tmp_path):
    judged = evaluation.judge_photos(finished, Silent())
    text = " ".join(html.report(judged, tmp_path, Silent()).read_text("utf-8").split())
    assert "on 32 training photos of the run, cross-validated in 4 folds" in text
    assert "each photo is predicted by a head that was fitted without its fold" in text
    assert "without each fold in turn, which judges it" in text
    assert "It was trained on" not in text


def test_its_own_photos_given_as_data_are_called_seen(finished, workshop):
    observer = Silent()
    judged = evaluation.judge_photos(finished, observer, EvaluationRequest(data=workshop.photos))
    assert judged.seen == 32
    assert judged.calibration is None or judged.calibration.cross_fitted


def test_a_second_run_is_compared_by_its_own_out_of_fold_predictions(finished):
    compared = evaluation.judge_photos(finished, Silent(), EvaluationRequest(other=finished)).compared
    assert compared is not None
    assert (compared.out_of_fold, compared.comparison.difference.value) == (True, 0.0)


@pytest.mark.parametrize("damage", ["a row is gone", "not a number", "more than one"])
def test_damaged_predictions_are_refused(finished, tmp_path, damage, monkeypatch):
    lines = (finished.folder / "predictions.csv").read_text().splitlines()
    cells = lines[1].split(",")
    last = {"not a number": "x", "more than one": "7"}.get(damage)
    row = [] if last is None else [",".join([*cells[:-1], last])]
    content = "\n".join([lines[0], *row, *lines[2:]]) + "\n"
    read = Run.read
    changed = {"predictions.csv": content.encode()}
    monkeypatch.setattr(Run, "read", lambda run, name: changed.get(name) or read(run, name))
    with pytest.raises(RunError, match=r"predictions.csv is damaged"):
        evaluation.judge_photos(finished, Silent())


def test_an_export_is_checked_on_the_training_photos_against_the_final_head(finished):
    replay = parity.collect(finished, None, Silent())
    assert (len(replay.photos), replay.missing, replay.measured) == (32, 0, None)


@pytest.mark.parametrize("solver", [(), ADAM], ids=["lbfgs", "adam"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, workshop, solver, request, monkeypatch):
    whole = request.getfixturevalue("finished_by_adam" if solver else "finished")

    def interrupt(*_args, **_options):
        raise Interrupted(2)

    class StopsAfterTwo(Silent):
        def note(self, text):
            if text.startswith("epoch 2/"):
                raise Interrupted(2)

    with monkeypatch.context() as patch:
        if not solver:
            patch.setattr(out_of_fold, "fit_folds", interrupt)
        with pytest.raises(Interrupted):
            pipeline.train(workshop.config(tmp_path / "killed", *solver), StopsAfterTwo())
    folder = tmp_path / "killed" / "runs" / "photos-1"
    with pytest.raises(RunError, match=r"data\.folds was 4, is 3"):
        pipeline.resume(folder, load_config(folder / "config.yaml", ["data.folds=3"]), Silent())
    resumed = pipeline.resume(folder, load_config(folder / "config.yaml"), Silent())
    for name in ("predictions.csv", "metrics.json", "split.csv", "inference/model.bin"):
        assert resumed.read(name) == whole.read(name), name


def test_adam_writes_the_curve_of_the_out_of_fold_predictions(finished_by_adam):
    run = finished_by_adam
    with (run.folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    best = float(min(rows, key=lambda row: float(row["val_loss"]))["val_accuracy"])
    assert best == pytest.approx(run.manifest.metrics["folds"].accuracy)


def test_photos_that_the_run_to_start_from_knows_cannot_be_held_out(tmp_path, workshop, finished):
    start = f"model.start_from={finished.folder}"
    with pytest.raises(DataError, match="has learned from 32 photos of these"):
        workshop.train(tmp_path, *ADAM, start)
    again = workshop.train(tmp_path, start)  # lbfgs: the same minimum from any start
    ours, theirs = predictions(again), predictions(finished)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_held_out_is_float32_whatever_is_trained_on(tmp_path, workshop, finished):
    config = workshop.config(tmp_path, "runtime.feature_precision=bfloat16")
    prepared = prepare.prepare(check_settings(config), Silent())
    exact = prepare.prepare(check_settings(workshop.config(tmp_path)), Silent())
    assert prepared.held_out is not None
    np.testing.assert_array_equal(prepared.held_out.array, exact.validating.array)
    assert not np.array_equal(prepared.parts["train"].array[:, :1], prepared.held_out.array)


def test_a_photo_that_cannot_be_decoded_leaves_its_fold(tmp_path, workshop):
    photos = shutil.copytree(workshop.photos, tmp_path / "photos")
    bad = sorted((photos / "city").glob("*.jpg"))[3]
    bad.write_bytes(bad.read_bytes()[:900])
    run = workshop.train(tmp_path, f"data.train={photos}", "data.on_bad_image=skip")
    assert len(run.split()) == run.manifest.metrics["folds"].photos == 31
    assert {row.fold for row in run.split()} == {1, 2, 3, 4}


def test_near_duplicates_are_in_one_fold(tmp_path, workshop):
    photos = shutil.copytree(workshop.photos, tmp_path / "photos")
    originals = sorted((photos / "city").glob("*.jpg"))[:6]
    for path in originals:
        Image.open(path).save(path.with_name(f"again-{path.stem}.png"))
    observer = Silent()
    run = pipeline.train(workshop.config(tmp_path, f"data.train={photos}"), observer)
    assert any("each group is in one fold" in note for note in observer.notes)
    row = {Path(row.path).name: row for row in run.split()}
    for path in originals:
        original, again = row[path.name], row[f"again-{path.stem}.png"]
        assert original.fold == again.fold
        assert original.group == again.group != ""


def test_the_end_of_train_says_cross_validated_and_how_to_fine_tune(finished, capsys):
    command_line._print_result(Console(), finished)
    out = capsys.readouterr().out
    assert "selection (cross-validated)" in out
    assert (" fine_tuning=auto" in out) == (finished.manifest.metrics["folds"].accuracy < 1)
