"""`evaluate`: the numbers equal independent ones, nothing of the run is touched, and odd photos cost nothing else."""

import csv
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs_fixture import TinyRun
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as reference
from typer.testing import CliRunner

from finetune_cli import files
from finetune_cli.cli.app import app
from finetune_cli.cli.console import Console
from finetune_cli.cli.evaluate import print_result
from finetune_cli.engines.engine import Local
from finetune_cli.errors import DataError, GateError, StorageError, UsageError
from finetune_cli.evaluation import answers, compare, judge
from finetune_cli.evaluation import evaluate as command
from finetune_cli.evaluation.answers import Answers
from finetune_cli.evaluation.photos import LabelledPhotos
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics import calibration
from finetune_cli.metrics import scores as metrics
from finetune_cli.metrics.folds import group_folds
from finetune_cli.photos.decode import decode
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Silent
from finetune_cli.report import sentences
from finetune_cli.runs import run
from finetune_cli.runs.run import Run
from finetune_cli.training import outputs


@pytest.fixture
def tiny(tiny_run, tmp_path) -> TinyRun:
    """A copy of the tiny run and its photos that a test may change."""
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    # Other tests evaluate the shared run, each in a folder of its own.
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1", ignore=shutil.ignore_patterns("evaluations"))
    return replace(tiny_run, run=Run.load(tmp_path / "runs" / "tiny-1"), photos=tmp_path / "photos")


def without_test(tiny: TinyRun, group: Callable[[str], str] = lambda _path: "") -> Run:
    rows = [replace(row, group=group(row.path)) for row in tiny.run.split() if row.split != "test"]
    run.write_split(tiny.run.folder / "split.csv", rows)
    return run.finish(tiny.run.folder, tiny.run.manifest, tiny.run.manifest.files)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def keras_probabilities(tiny: TinyRun, rows) -> np.ndarray:
    model = import_keras().models.load_model(tiny.run.folder / "model.keras", compile=False)
    photos = np.stack([decode(tiny.photos / "test" / row["path"], tiny.run.image_settings) for row in rows])
    return np.asarray(model(photos.astype(np.float32), training=False))


def test_the_numbers_equal_those_of_keras_and_scikit_learn(tiny):
    result = command.evaluate(tiny.run, Silent())
    rows = table(result.folder / "predictions.csv")
    assert {row["split"] for row in rows} == {"test"}
    assert len(rows) == 25
    classes = list(tiny.run.classes)
    expected = keras_probabilities(tiny, rows)
    ours = np.array([[float(row[name]) for name in classes] for row in rows])
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    true, predicted = ([row[key] for row in rows] for key in ("true", "predicted"))
    assert [Path(row["path"]).parent.name for row in rows] == true
    found = json.loads((result.folder / "metrics.json").read_text())["test"]
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
    assert found["log_loss"] == pytest.approx(reference.log_loss(true, expected, labels=classes), abs=1e-4)
    assert found["confusion_matrix"] == reference.confusion_matrix(true, predicted, labels=classes).tolist()
    assert len(table(result.folder / "per_class.csv")) == 3


def test_the_temperature_is_taken_back_exactly(tiny):
    """On test photos, before = the Keras model without its temperature."""
    result = command.evaluate(tiny.run, Silent())
    rows = table(result.folder / "predictions.csv")
    with_temperature = keras_probabilities(tiny, rows)
    powers = np.log(with_temperature) * tiny.run.temperature
    raw = np.exp(powers) / np.exp(powers).sum(axis=1, keepdims=True)
    calibration = result.judged.calibration
    assert calibration is not None
    assert not calibration.cross_fitted
    true = [row["true"] for row in rows]
    for scores, probabilities in ((calibration.before, raw), (calibration.after, with_temperature)):
        assert scores.log_loss == pytest.approx(reference.log_loss(true, probabilities, labels=["ant", "bee", "wasp"]))


def cross_fitted_log_loss(logits, labels, result) -> float:
    """By SciPy: every photo scaled by the temperature that suits the photos of the other folds best."""
    digests = [sample.digest for sample in result.judged.answers.samples]
    fold = group_folds(labels, np.unique(digests, return_inverse=True)[1], 5)
    own = np.arange(len(labels)), labels
    losses = np.zeros(len(labels))
    for k in range(5):

        def objective(b, rest=fold != k):
            return -log_softmax(logits * b, axis=1)[own][rest].sum() + b - np.log(b)

        best = minimize_scalar(objective, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-10}).x
        losses[fold == k] = -log_softmax(logits * best, axis=1)[own][fold == k]
    return float(losses.mean())


def test_validation_photos_are_judged_cross_fitted(tiny):
    observer = Silent()
    result = command.evaluate(without_test(tiny), observer)
    assert result.judged.photos.part == "val"
    assert any("30 validation photos of the run" in note for note in observer.notes)
    assert result.judged.calibration is not None
    assert result.judged.calibration.cross_fitted
    assert result.folder.name == "val-1"
    found = json.loads((result.folder / "metrics.json").read_text())["val"]
    assert found["calibration"]["cross_fitted"]
    for name in ("log_loss", "brier_score", "expected_calibration_error", "reliability"):
        assert found[name] == found["calibration"]["after"][name]
    logits = tiny.run.temperature * np.log(result.judged.answers.probabilities.astype(np.float64))
    labels = result.judged.answers.labels
    assert found["log_loss"] == pytest.approx(cross_fitted_log_loss(logits, labels, result), abs=1e-6)
    flattered = reference.log_loss(labels, softmax(logits / tiny.run.temperature, axis=1))
    assert found["log_loss"] != pytest.approx(flattered, rel=1e-3)


@pytest.mark.parametrize("from_a_folder", [False, True])
def test_photos_of_a_group_stay_together_in_cross_fitting(tiny, monkeypatch, from_a_folder):
    """Each photo's temperature was fitted without the photos whose number has the same last digit."""
    grouped = without_test(tiny, lambda path: "" if "wasp" in path else path[-5])
    given: list[np.ndarray] = []
    fit = calibration.cross_fitted_calibration
    monkeypatch.setattr(
        judge, "cross_fitted_calibration", lambda z, y, groups: given.append(groups) or fit(z, y, groups)
    )
    result = command.evaluate(
        grouped, Silent(), command.EvaluationRequest(data=tiny.photos / "val" if from_a_folder else None)
    )
    names = [sample.name for sample in result.judged.answers.samples]
    expected = [name if "wasp" in name else name[-5] for name in names]
    assert len(names) == 30
    assert len(set(given[0])) == 20
    assert len(set(zip(given[0], expected, strict=True))) == 20


def test_other_photos_that_hold_validation_ones_are_cross_fitted_too(tiny):
    result = command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos / "val"))
    assert result.judged.calibration is not None
    assert result.judged.calibration.cross_fitted


def test_calibration_leaves_out_the_photos_that_the_temperature_was_fitted_on(tiny, tmp_path):
    own = {row.digest for row in tiny.run.split() if row.split == "val"}
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny.photos / "test", mixed)
    shutil.copytree(tiny.photos / "val", mixed, dirs_exist_ok=True)
    observer = Silent()
    result = command.evaluate(tiny.run, observer, command.EvaluationRequest(data=mixed))
    rows = table(result.folder / "predictions.csv")
    kept = [row for row in rows if files.sha256(mixed / row["path"]) not in own]
    calibration = result.judged.calibration
    assert calibration is not None
    assert not calibration.cross_fitted
    assert calibration.left_out == len(rows) - len(kept) > 0
    classes = ["ant", "bee", "wasp"]
    answers = np.array([[float(row[name]) for name in classes] for row in kept])
    answers /= answers.sum(axis=1, keepdims=True)  # they are rounded in the file
    expected = reference.log_loss([row["true"] for row in kept], answers, labels=classes)
    assert result.judged.evaluation.calibration.log_loss == pytest.approx(expected, abs=1e-4)
    assert any(f"leaves out {calibration.left_out} of these photos" in text for text in observer.notes)


def test_the_run_itself_is_not_touched(tiny):
    before = {name: tiny.run.file(name).read_bytes() for name in tiny.run.manifest.files}
    manifest = (tiny.run.folder / "run.json").read_bytes()
    names = [command.evaluate(tiny.run, Silent()).folder.name for _ in range(2)]
    assert names == ["test-1", "test-2"]
    assert {name: tiny.run.file(name).read_bytes() for name in before} == before
    assert (tiny.run.folder / "run.json").read_bytes() == manifest


def test_moved_photos_are_found_by_content(tiny):
    expected = command.evaluate(tiny.run, Silent())
    (tiny.photos / "test").rename(tiny.photos / "elsewhere")
    with pytest.raises(DataError, match="none of the 25 test photos") as caught:
        command.evaluate(tiny.run, Silent())
    assert "--data" in caught.value.remedy
    for path in (tiny.photos / "elsewhere").rglob("*.png"):
        path.rename(path.with_name(f"renamed-{path.name}"))
    found = command.evaluate(tiny.run, Silent(), command.EvaluationRequest(root=tiny.photos))
    assert not found.judged.bad
    np.testing.assert_array_equal(found.judged.answers.probabilities, expected.judged.answers.probabilities)


def test_gone_and_changed_photos_are_left_out_and_listed(tiny):
    gone, changed = sorted((tiny.photos / "test" / "wasp").iterdir())[:2]
    gone.unlink()
    Image.new("RGB", (70, 70)).save(changed)
    result = command.evaluate(tiny.run, Silent())
    assert result.judged.evaluation.photos == 23
    reasons = {photo.path: photo.reason for photo in result.judged.bad}
    assert "not found" in reasons[gone]
    assert "changed" in reasons[changed]


def test_photos_with_labels_of_their_own(tiny):
    observer = Silent()
    shutil.rmtree(tiny.photos / "test" / "wasp")
    bad = tiny.photos / "test" / "ant" / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    result = command.evaluate(tiny.run, observer, command.EvaluationRequest(data=tiny.photos / "test"))
    assert any("2 of the 3 classes: ant, bee" in note for note in observer.notes)
    assert [photo.path for photo in result.judged.bad] == [bad]
    assert result.judged.evaluation.confusion[2].sum() == 0


def test_the_folder_above_the_splits_is_explained(tiny):
    with pytest.raises(DataError, match="classes unknown to the run: test, train, val") as caught:
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos))
    assert caught.value.remedy == f"these are splits; name one of them, such as {tiny.photos / 'test'}"


def test_a_long_name_of_photos_makes_a_short_name_of_the_folder(tiny):
    """A file system holds 255 bytes of a name, and temporary names are longer than the last one."""
    folder = tiny.photos / ("ü" * 120)
    shutil.copytree(tiny.photos / "test", folder)
    assert command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=folder)).folder.name == f"{'ü' * 50}-1"


def test_an_unknown_class_is_an_error(tiny):
    (tiny.photos / "test" / "wasp").rename(tiny.photos / "test" / "hornet")
    with pytest.raises(DataError, match="hornet"):
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos / "test"))


def test_no_readable_photo_at_all(tiny, tmp_path):
    (tmp_path / "bad" / "ant").mkdir(parents=True)
    (tmp_path / "bad" / "ant" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 photos can be used.*empty"):
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tmp_path / "bad"))


def test_training_photos_are_told(tiny):
    observer = Silent()
    command.evaluate(tiny.run, observer)
    assert any("was trained on 1 of these photos" in text for text in observer.warnings)
    result = command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos / "train"))
    found = json.loads((result.folder / "metrics.json").read_text())["data"]
    assert found["seen_in_training"] == found["photos"]
    assert f"It was trained on {found['photos']} of these photos" in " ".join(sentences.verdict(result.judged))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 101])
def test_a_name_stays_in_its_folder(tiny, name):
    with pytest.raises(UsageError, match="--name"):
        command.evaluate(tiny.run, Silent(), target=command.Target(name))


def test_a_taken_name_is_reported_before_the_work(tiny, monkeypatch):
    command.evaluate(tiny.run, Silent(), target=command.Target("mine"))
    monkeypatch.setattr(judge, "judge", lambda *_args: pytest.fail("worked in vain"))
    with pytest.raises(UsageError, match="exists already"):
        command.evaluate(tiny.run, Silent(), target=command.Target("mine"))


def test_a_run_that_cannot_be_written_to_is_reported_before_the_work(tiny, monkeypatch):
    """Permission bits do not stop root, who runs the tests in containers; the probe itself is what counts."""
    asked = []

    def refuse(folder, root=None):
        asked.append(folder)
        raise StorageError(f"no permission to write {folder}", "give yourself permission to write there")

    monkeypatch.setattr(files, "check_writable", refuse)
    monkeypatch.setattr(judge, "judge", lambda *_args: pytest.fail("worked in vain"))
    with pytest.raises(StorageError, match="no permission") as caught:
        command.evaluate(tiny.run, Silent())
    assert "--output" in caught.value.remedy
    assert asked == [tiny.run.folder / "evaluations"]


def test_evaluations_at_the_same_moment_take_different_numbers(tiny, monkeypatch):
    """Eight writers that all saw that number 1 is free: each ends with a whole folder of its own."""
    found = command.evaluate(tiny.run, Silent(), target=command.Target("first")).judged
    write, barrier = outputs.write_tables, threading.Barrier(8)
    attempts: list[Path] = []

    def together(folder, *rest):
        attempts.append(folder)
        if len(attempts) <= 8:
            barrier.wait(60)
        return write(folder, *rest)

    monkeypatch.setattr(outputs, "write_tables", together)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _i: command._write(found, command.Target(), "test"), range(8)))
    assert len(attempts) > 8
    assert {folder.name for folder in folders} == {f"test-{i}" for i in range(1, 9)}
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"metrics.json", "per_class.csv", "predictions.csv"}
    assert len(list((tiny.run.folder / "evaluations").iterdir())) == 9


def test_data_and_root_exclude_each_other(tiny):
    with pytest.raises(UsageError, match="exclude"):
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos / "test", root=tiny.photos))


def second_run(tiny: TinyRun, classes: tuple[str, ...], answers: dict[str, str], monkeypatch) -> Run:
    """A run of `classes` that answers every photo rightly, but those in `answers`: photo -> its answer."""

    def answer(_run, samples, _workers, _advance):
        chosen = np.eye(len(classes), dtype=np.float32) * 0.9 + 0.01
        true = {sample.name: tiny.run.classes[sample.label] for sample in samples}
        rows = [chosen[classes.index(answers.get(name, true[name]))] for name in true]
        return Answers(tuple(samples), np.stack(rows), np.zeros((0, 1)), 1, ())

    monkeypatch.setattr(compare, "answer", answer)
    return Run(tiny.run.folder.with_name("other"), replace(tiny.run.manifest, classes=classes))


def test_comparing_matches_classes_by_name(tiny, monkeypatch):
    """A second run with other class order that is right wherever the first is wrong, and wrong on two others."""
    first = command.evaluate(tiny.run, Silent()).judged
    right = first.answers.predicted == first.answers.labels
    ours = [(sample, tiny.run.classes[sample.label]) for sample in first.answers.samples]
    spoilt = {ours[i][0].name: "ant" if ours[i][1] != "ant" else "bee" for i in np.flatnonzero(right)[:2]}
    other = second_run(tiny, ("wasp", "bee", "ant"), spoilt, monkeypatch)
    compared = compare.compare(tiny.run, first.answers, other, Local(1), lambda _n: None)
    wrong = int((~right).sum())
    assert (compared.comparison.only_first, compared.comparison.only_second) == (2, wrong)
    assert (compared.classes, compared.left_out) == (("ant", "bee", "wasp"), ())
    rows = command.flipped(first, compared)
    assert len(rows) == wrong + 2
    assert {row[0]: row[3] for row in rows if row[0] in spoilt} == spoilt
    assert all((row[1] == row[2]) != (row[1] == row[3]) for row in rows)


def test_runs_with_other_classes_are_compared_on_the_shared_ones(tiny, monkeypatch, capsys):
    """The second run knows no wasp and knows hornets: photos of wasps do not count, and neither do those answers."""
    found = command.evaluate(tiny.run, Silent()).judged
    other = second_run(tiny, ("hornet", "bee", "ant"), {}, monkeypatch)
    compared = compare.compare(tiny.run, found.answers, other, Local(1), lambda _n: None)
    assert compared.classes == ("ant", "bee")
    assert compared.left_out == ("wasp", "hornet")
    ant, bee, wasp = range(3)
    labels, answers = found.answers.labels, found.answers.probabilities
    known = labels != wasp
    assert len(compared.rows) == known.sum() < len(labels)
    # By hand: between ant and bee alone, the first run's answer is the more probable of the two.
    right = np.where(answers[:, ant] >= answers[:, bee], ant, bee)[known] == labels[known]
    assert compared.comparison.both_right == right.sum()
    assert compared.comparison.only_second == (~right).sum()
    both = replace(found, compared=compared)
    print_result(Console(), command.Result(both, tiny.run.folder))
    told = capsys.readouterr().out
    assert f"compared on the {known.sum()} photos of the 2 classes that both runs have" in told
    assert "left out: wasp, hornet" in told
    assert f"on the {known.sum()} photos of the 2 classes that both have" in " ".join(sentences.verdict(both))
    written = command.metrics_json(both)["comparison"]
    assert (written["photos"], written["classes"], written["classes_left_out"]) == (
        known.sum(), ["ant", "bee"], ["wasp", "hornet"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "problem"), [(("ant", "fly"), "1 class in common"), (("fly", "gnat"), "no class in common")]
)
def test_nothing_to_compare_is_reported_before_the_work(tiny, monkeypatch, classes, problem):
    other = Run(tiny.run.folder, replace(tiny.run.manifest, classes=classes))
    monkeypatch.setattr(judge, "judge", lambda *_args: pytest.fail("worked in vain"))
    with pytest.raises(UsageError, match=problem):
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(other=other))


def test_no_photo_of_a_shared_class_is_reported_before_the_work(tiny, monkeypatch):
    other = Run(tiny.run.folder, replace(tiny.run.manifest, classes=("ant", "bee")))
    for name in ("ant", "bee"):
        shutil.rmtree(tiny.photos / "test" / name)
    monkeypatch.setattr(judge, "judge", lambda *_args: pytest.fail("worked in vain"))
    with pytest.raises(UsageError, match="no photo shows a class"):
        command.evaluate(tiny.run, Silent(), command.EvaluationRequest(data=tiny.photos / "test", other=other))


@pytest.mark.parametrize("target", [command.Target(), command.Target("mine"), command.Target(output=Path("out"))])
def test_a_disk_that_takes_the_tables_but_not_the_report(tiny, monkeypatch, tmp_path, target):
    """Nothing is left of it, and what the message says, the same command again, works."""
    monkeypatch.chdir(tmp_path)

    def full(_judged, folder):
        assert (folder / "predictions.csv").is_file()
        (folder / "report.html").write_text("half")
        raise files.storage_error(OSError(28, "No space left on device"), folder / "report.html")

    with pytest.raises(StorageError, match="no space left to write") as caught:
        command.evaluate(tiny.run, Silent(), target=target, write_report=full)
    expected = target.output or tiny.run.folder / "evaluations" / (target.name or "test-1")
    assert f"{expected / 'report.html'}" in caught.value.problem
    assert ".tmp" not in caught.value.problem
    assert not list((tiny.run.folder / "evaluations").iterdir() if (tiny.run.folder / "evaluations").exists() else [])
    assert not (tmp_path / "out").exists()
    again = command.evaluate(
        tiny.run, Silent(), target=target, write_report=lambda _judged, folder: (folder / "r").touch()
    )
    assert again.folder == expected
    assert {path.name for path in again.folder.iterdir()} == {"metrics.json", "per_class.csv", "predictions.csv", "r"}


def test_another_folder_takes_the_evaluation_of_a_run_that_cannot_be_written_to(tiny, monkeypatch, tmp_path):
    def refuse(folder):
        if folder.is_relative_to(tiny.run.folder):
            raise StorageError(f"no permission to write {folder}", "choose a folder that you can write to")

    monkeypatch.setattr(files, "check_writable", refuse)
    before = sorted(tiny.run.folder.rglob("*"))
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new" / "folder", tmp_path / "empty"):
        result = command.evaluate(tiny.run, Silent(), target=command.Target(output=output))
        assert result.folder == output
        assert (output / "metrics.json").is_file()
    assert sorted(tiny.run.folder.rglob("*")) == before


def test_a_folder_that_holds_something_is_not_replaced(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "judge", lambda *_args: pytest.fail("worked in vain"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for target, problem in (
        (command.Target(output=tmp_path / "full"), "is not empty"),
        (command.Target(output=tmp_path / "full" / "x"), "is a file"),
        (command.Target("name", tmp_path / "new"), "exclude each other"),
        (command.Target(output=Path()), "cannot be replaced"),
        (command.Target(output=tmp_path / ".."), "cannot be replaced"),
    ):
        with pytest.raises(UsageError, match=problem):
            command.evaluate(tiny.run, Silent(), target=target)
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_json_alone_is_on_stdout(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", "--run", "tiny-1", "--format", "json", "--no-report", "--compare", "tiny-1"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.stderr
    found = json.loads(answer.stdout)
    folder = Path("runs/tiny-1/evaluations/test-1")
    assert (found.pop("folder"), found.pop("report"), found.pop("split")) == (str(folder), None, "test")
    assert found == json.loads((folder / "metrics.json").read_text())["test"]


def test_a_run_against_itself(tiny):
    result = command.evaluate(tiny.run, Silent(), command.EvaluationRequest(other=tiny.run))
    comparison = json.loads((result.folder / "metrics.json").read_text())["test"]["comparison"]
    assert (comparison["only_first"], comparison["only_second"], comparison["p_value"]) == (0, 0, 1.0)
    assert table(result.folder / "flipped.csv") == []


def test_stored_features_are_spread_over_all_photos(tiny, monkeypatch):
    everything = command.evaluate(tiny.run, Silent()).judged.answers
    monkeypatch.setattr(answers, "_FEATURE_ROWS", 9)
    some = command.evaluate(tiny.run, Silent()).judged.answers
    assert (everything.stride, some.stride) == (1, 3)
    np.testing.assert_array_equal(some.features, everything.features[::3])


def test_the_gate(tiny):
    result = command.evaluate(tiny.run, Silent())
    accuracy = result.judged.evaluation.accuracy.value
    command.gate(result, accuracy)
    with pytest.raises(GateError):
        command.gate(result, accuracy + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 0), (["--fail-under", "0.99"], 4), (["--fail-under", "0.1"], 0), (["nowhere"], 3)]
)
def test_exit_codes(tiny, monkeypatch, arguments, code):
    monkeypatch.chdir(tiny.run.folder.parents[1])
    answer = CliRunner().invoke(app, ["evaluate", *arguments])
    assert answer.exit_code == code, answer.output


def test_the_command_line_tells_all(tiny, monkeypatch):
    monkeypatch.chdir(tiny.run.folder.parents[1])
    next((tiny.photos / "test" / "wasp").iterdir()).write_bytes(b"GIF89a")
    answer = CliRunner().invoke(app, ["evaluate", "--compare", "runs/tiny-1", "--name", "one"])
    assert answer.exit_code == 3
    for text in (
        "95 % interval",
        "majority-class baseline: bee",
        "recall",
        "true \\ predicted",
        "target accuracy",
        "McNemar",
        "left out",
    ):
        assert text in answer.output
    assert "1 of 25 photos were left out" in answer.output
    assert (tiny.run.folder / "evaluations" / "one" / "predictions.csv").is_file()


def test_the_screen_says_how_many_rows_it_leaves_out(tiny, capsys):
    """60 classes, of which 50 occur; each is taken for its successor once and for the one after that half the time."""
    labels = np.repeat(np.arange(50), 4)
    predicted = (labels + np.tile([0, 1, 1, 2], 50)) % 50
    classes = [f"class {i}" for i in range(60)]
    probabilities = np.eye(60)[predicted]
    samples = tuple(Sample(Path("x"), "x", int(label), "00") for label in labels)
    bad = tuple(BadPhoto(Path(f"{i}.jpg"), f"{i}.jpg", "empty") for i in range(23))
    found = judge.Judgement(
        tiny.run,
        LabelledPhotos("data", "photos", samples, bad),
        Answers(samples, probabilities.astype(np.float32), np.zeros((0, 1), np.float32), 1, ()),
        metrics.evaluate(probabilities, labels, classes),
        None,
    )
    print_result(Console(), command.Result(found, tiny.run.folder))
    told = capsys.readouterr().out
    assert "the 20 classes with the lowest F1, and 30 more in per_class.csv" in told
    assert "classes with neither photos nor predictions here: 10" in told
    assert "... and 80 more pairs; all photos are in predictions.csv" in told  # 50 x 2 pairs
    assert "... and 3 more; all are in metrics.json" in told


def test_no_training_package_is_loaded(tiny):
    code = (
        "import sys; from pathlib import Path\n"
        "from finetune_cli.evaluation import evaluate; from finetune_cli.progress import Silent\n"
        "from finetune_cli.runs.run import Run\n"
        "evaluate.evaluate(Run.load(Path(sys.argv[1])), Silent())\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tiny.run.folder)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    for package in ("tensorflow", "keras", "scipy", "matplotlib"):
        assert f"'{package}'" not in answer.stdout
