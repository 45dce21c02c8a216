"""`train` with fine-tuning and `data.folds`: what chooses is out of fold, and what is saved learned from all photos."""

import csv
import json
import signal

import numpy as np
import pytest
import trainings
from narrow_place import Place, StoppedAfter

from finetune_cli.cli import train as train_command
from finetune_cli.cli.console import Console
from finetune_cli.config.load import load_config
from finetune_cli.errors import Interrupted
from finetune_cli.evaluation import evaluate as evaluation
from finetune_cli.inference import predict
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.progress import Silent
from finetune_cli.report import html, refit_data, tuning
from finetune_cli.runs.run import Run
from finetune_cli.training import pipeline, unknown
from finetune_cli.training.tuning import budget
from finetune_cli.training.tuning.stage import Stage
from finetune_cli.training.tuning.upper import Diverged

FOLDS, EPOCHS, PHOTOS = 3, 14, 49
TUNED = (f"fine_tuning.epochs={EPOCHS}", "unknown.false_rejects=0.1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def frozen(place, tmp_path_factory):
    return place.train(tmp_path_factory.mktemp("frozen"), "fine_tuning=null", folds=FOLDS)


class Watched:
    """A run, its notes, and what was learned from and judged by: [task, photos to learn from, photos that judge]."""

    def __init__(self, place: Place, folder) -> None:
        observer, self.trainings, self.folds = Silent(), [], []
        trained, of_folds = Stage.trained, unknown.of_folds

        def watched(stage, task, trial, model, train, val):
            everything = np.arange(PHOTOS)
            learnt = getattr(train.source, "_photos", everything)
            self.trainings.append((task.folder, learnt, None if val is None else val.source._photos))
            np.testing.assert_array_equal(train.labels, stage.labels[learnt])
            self.of_photo = np.array([sample.fold for sample in stage.train.samples])
            return trained(stage, task, trial, model, train, val)

        def seen(prepared, fitted, folds=()):
            self.folds, self.final = folds, prepared.validating.array[:, 0]
            return of_folds(prepared, fitted, folds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stage, "trained", watched)
            patch.setattr(unknown, "of_folds", seen)
            self.run = place.train(folder, *TUNED, folds=FOLDS, observer=observer)
        self.notes = observer.notes


@pytest.fixture(scope="module")
def watched(place, tmp_path_factory):
    return Watched(place, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def tuned(watched):
    return watched.run


def rows(run: Run, name: str) -> list[dict[str, str]]:
    with run.file(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def history(run: Run) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(run, "tuning.csv")]


def test_no_photo_is_judged_by_what_learned_from_it(watched):
    *in_folds, final = watched.trainings
    assert [task for task, _learnt, _judges in in_folds] == [f"tuning-0-fold-{fold}" for fold in (1, 2, 3)]
    for fold, (_task, learnt, judges) in enumerate(in_folds, 1):
        np.testing.assert_array_equal(judges, np.flatnonzero(watched.of_photo == fold))
        np.testing.assert_array_equal(learnt, np.flatnonzero(watched.of_photo != fold))
    assert (final[0], len(final[1]), final[2]) == ("tuning-final", PHOTOS, None)


def test_it_says_what_it_costs_before_it_begins(watched):
    assert watched.notes[0].startswith("cross-validation of the fine-tuning: 4 trainings, about ")


def test_the_choice_is_made_by_the_predictions_that_are_shown(tuned, frozen):
    facts = tuned.manifest.fine_tuning
    before, after = (each.manifest.metrics["folds"] for each in (frozen, tuned))
    assert facts["kept"] != "frozen"
    assert facts["folds"] == FOLDS
    assert [each["name"] for each in facts["candidates"]] == [
        "frozen", "25 % of the way", "50 % of the way", "75 % of the way", "tuned", "tuned, head fitted again",
    ]  # fmt: skip
    (kept,) = [each for each in facts["candidates"] if each["kept"]]
    assert after.accuracy == kept["accuracy"]
    assert after.document["log_loss"] == pytest.approx(kept["log_loss"], rel=1e-6)
    assert facts["candidates"][0]["log_loss"] == pytest.approx(before.document["log_loss"], rel=1e-6)
    assert tuned.temperature == pytest.approx(kept["temperature"])
    assert facts["compared"]["folds"]["frozen"]["accuracy"] == before.accuracy
    assert facts["compared"]["folds"]["kept"]["accuracy"] == after.accuracy
    assert after.photos == PHOTOS
    assert after.document["log_loss"] < 0.7 * before.document["log_loss"]
    assert tuned.manifest.metrics["test"].document["log_loss"] < frozen.manifest.metrics["test"].document["log_loss"]


def test_what_is_saved_learned_from_all_photos(tuned, frozen):
    trial, final = tuned.manifest.fine_tuning["trainings"]
    assert (trial["folds"], "final" in trial) == (FOLDS, False)
    assert (final["final"], "folds" in final, final["epochs"]) == (True, False, EPOCHS)
    assert tuned.manifest.backbone.tuned
    assert tuned.manifest.parity.photos == 16
    assert tuned.manifest.parity.openvino_against_measured < 1e-4
    table = rows(tuned, "tuning.csv")
    assert [(row["training"], row["epoch"]) for row in table] == [
        (number, str(epoch + 1)) for number in ("0", "1") for epoch in range(EPOCHS)
    ]
    assert all((row["val_loss"] == "") == (row["training"] == "1") for row in table)
    assert tuned.file("tuning_curves.png").stat().st_size > 1000
    # The final model knows its photos; the out-of-fold predictions do not come from it.
    by_name = {row["path"]: row for row in rows(tuned, "predictions.csv") if row["split"] == "folds"}
    assert len(by_name) == PHOTOS
    photos = sorted((tuned.data_roots()["train"] / "bee").iterdir())
    found = [dict(answer.top) for answer in predict.predict(RunPredictor(tuned, 1), photos, 3)]
    told = [float(by_name[f"bee/{photo.name}"]["bee"]) for photo in photos]
    assert np.abs(np.array([answer["bee"] for answer in found]) - told).mean() > 0.01


def test_its_tables_say_what_changed(tuned, frozen):
    before = {(row["split"], row["path"]): row["predicted"] for row in rows(frozen, "predictions.csv")}
    expected = [
        (row["split"], row["path"], before[row["split"], row["path"]], row["predicted"])
        for row in rows(tuned, "predictions.csv")
        if row["predicted"] != before[row["split"], row["path"]]
    ]
    assert {split for split, *_rest in expected} == {"folds", "test"}
    assert [(r["split"], r["path"], r["frozen"], r["kept"]) for r in rows(tuned, "flipped.csv")] == expected


def test_unknown_is_learned_from_the_backbones_that_have_not_seen_a_photo(watched):
    facts = watched.run.manifest.unknown
    assert (facts.held_out, facts.interval, facts.tuned) == (PHOTOS, None, True)
    assert sorted(row for fold in watched.folds for row in fold.rows) == list(range(PHOTOS))
    for fold in watched.folds:
        assert len({*watched.of_photo[fold.rows]}) == 1
        assert not {*watched.of_photo[fold.rows]} & {*watched.of_photo[fold.outside]}
        assert fold.features.shape == (len(fold.rows), 2)
        assert fold.references.shape == (len(fold.outside), 2)
        assert not np.allclose(fold.features, watched.final[fold.rows], rtol=0.01)
    assert not watched.run.manifest.fine_tuning["trainings"][0]["diverged"]


SAME = ("inference/model.bin", "predictions.csv", "flipped.csv", "unknown-references.npy", "unknown-scores.npy")


def assert_same(again: Run, tuned: Run) -> None:
    for name in SAME:
        assert again.manifest.files[name] == tuned.manifest.files[name], name
    assert again.manifest.unknown == tuned.manifest.unknown
    assert history(again) == history(tuned)


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        ("fine-tuning (without fold 2) epoch 3/", (1,)),
        pytest.param("fine-tuning (on all photos) epoch 5/", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("fine-tuning: kept", (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_trains_no_finished_fold_again_and_ends_with_the_same_bits(
    place, tuned, tmp_path, moment, finished
):
    with pytest.raises(Interrupted):
        place.train(tmp_path, *TUNED, folds=FOLDS, observer=StoppedAfter(moment))
    folder, observer = tmp_path / "runs" / "photos-alone-1", Silent()
    for fold in finished:
        kept = folder / "checkpoints" / f"tuning-0-fold-{fold}"
        assert [path.name for path in kept.iterdir()] == [f"epoch-{EPOCHS:04}"]
    again = pipeline.resume(folder, load_config(folder / "config.yaml"), observer)
    assert_same(again, tuned)
    for fold in finished:
        assert f"fine-tuning (without fold {fold}): resuming after epoch {EPOCHS}" in observer.notes
        assert not [note for note in observer.notes if note.startswith(f"fine-tuning (without fold {fold}) epoch")]
    if finished == (1,):
        assert "fine-tuning (without fold 2): resuming after epoch 3" in observer.notes
    assert not (folder / "checkpoints").exists()


def test_the_frozen_model_is_kept_and_nothing_is_tuned_at_the_end(place, frozen, tmp_path):
    observer = Silent()
    fast = ("fine_tuning.learning_rate=1e-9", "fine_tuning.epochs=1")
    run = place.train(tmp_path, *fast, folds=FOLDS, observer=observer)
    assert run.manifest.fine_tuning["kept"] == "frozen"
    assert len(run.manifest.fine_tuning["trainings"]) == 1
    assert not [note for note in observer.notes if "on all photos" in note]
    assert run.manifest.backbone == frozen.manifest.backbone
    for name in ("inference/model.bin", "predictions.csv"):
        assert run.manifest.files[name] == frozen.manifest.files[name]


@pytest.mark.parametrize("where", ["tuning-0-fold-2", "tuning-final"])
def test_a_training_that_diverges_loses_nothing(place, frozen, tuned, tmp_path, monkeypatch, where):
    trained = Stage.trained

    def diverging(stage, task, *arguments):
        if task.folder == where:
            raise Diverged("fine-tuning diverged: the loss is no longer a number", "choose a smaller rate")
        return trained(stage, task, *arguments)

    monkeypatch.setattr(Stage, "trained", diverging)
    observer = Silent()
    run = place.train(tmp_path, *TUNED[:1], folds=FOLDS, observer=observer)
    assert any("diverged" in warning for warning in observer.warnings)
    facts = run.manifest.fine_tuning
    assert facts["kept"] == "frozen"
    assert [each["diverged"] for each in facts["trainings"]] == [where != "tuning-final"]
    assert [each["name"] for each in facts["candidates"] if each["kept"]] == ["frozen"]
    assert run.manifest.files["inference/model.bin"] == frozen.manifest.files["inference/model.bin"]


def test_it_works_with_folds_of_adam(place, tmp_path):
    fast = ("training.solver=adam", "training.epochs=3", "training.l2=0.01", "fine_tuning.epochs=2")
    run = place.train(tmp_path, *fast, folds=2)
    assert {"history.csv", "tuning.csv"} <= set(run.manifest.files)
    assert run.manifest.metrics["folds"].photos == PHOTOS


@pytest.fixture
def without_test(tuned, monkeypatch):
    """The tuned run as if it had no test photos."""
    rest, roots = [row for row in tuned.split() if row.split != "test"], {"train": tuned.data_roots()["train"]}
    monkeypatch.setattr(Run, "split", lambda _run: rest)
    monkeypatch.setattr(Run, "data_roots", lambda _run: roots)
    return tuned


def test_evaluate_reads_the_out_of_fold_predictions(without_test):
    judged = evaluation.judge_photos(without_test, Silent())
    assert judged.photos.source == "training photos of the run, cross-validated in 3 folds"
    assert judged.evaluation.accuracy.value == without_test.manifest.metrics["folds"].accuracy


def test_the_report_shows_what_chose_and_what_was_trained(without_test, frozen, tmp_path):
    tuned = without_test
    judged = evaluation.judge_photos(tuned, Silent())
    text = " ".join(html.report(judged, tmp_path, Silent()).read_text("utf-8").split())
    assert f"Kept: {tuned.manifest.fine_tuning['kept']}." in text
    assert "The out-of-fold predictions chose: each photo was answered by candidates that were tuned without" in text
    assert "without each fold in turn (the curves are means), on 2 views" in text
    assert "on all photos, which leaves none to validate, on 2 views" in text
    assert "validation photos" not in text
    assert "On the features of the frozen backbone, because the tuned one has learned from all of these" in text
    assert "by a backbone and a head that were tuned without its fold" in text
    section = tuning.section(tuned)
    assert section["problem"] == ""
    assert [len(each["charts"]) for each in section["trainings"]] == [2, 2]
    own, other = (
        refit_data.load(run, load_config(run.file("config.yaml")), out_of_fold=True) for run in (tuned, frozen)
    )
    np.testing.assert_array_equal(own.features, other.features)
    assert (own.frozen, other.frozen) == (True, False)


def test_the_screen_names_what_chose(tuned, frozen, capsys):
    train_command._print_result(Console(), tuned)
    text = capsys.readouterr().out
    assert "fine-tuning, by the out-of-fold predictions:" in text
    assert tuned.manifest.fine_tuning["kept"] in text
    train_command._print_result(Console(), frozen)
    text = capsys.readouterr().out.replace("\n", "")
    assert f"{frozen.folder / 'config.yaml'} fine_tuning=auto" in text


def test_a_plan_tells_the_stages_of_all_folds(place, frozen, tmp_path):
    found = budget.budget(place.config(tmp_path, *TUNED, folds=FOLDS), Silent())
    by_name = {row.stage: row for row in found.rows}
    assert list(by_name) == [
        "features", "head", "3 folds", "activations",
        f"fine-tuning, {EPOCHS} epochs of last_stage at 0.02, without each of 3 folds",
        "head again, without each of 3 folds", f"fine-tuning on all photos, {EPOCHS} epochs at most",
        "tuned features", "saving",
    ]  # fmt: skip
    views = {name.split(",")[0]: row.views for name, row in by_name.items()}
    assert views["activations"] == PHOTOS * 2 + PHOTOS
    assert views["fine-tuning"] == 2 * EPOCHS * PHOTOS
    assert views["head again"] == 2 * 2 * PHOTOS
    assert views["fine-tuning on all photos"] == EPOCHS * PHOTOS
    assert found.seconds < 60


def test_the_estimate_counts_the_folds(place, frozen, tmp_path, monkeypatch):
    """Of 26 epochs at 3 passes of the upper half: 2 folds of 49 photos learn and one validates; 20 at the end."""
    monkeypatch.setattr(budget, "share_above", lambda _model, _unfreeze: 0.5)
    config = place.config(tmp_path, "fine_tuning=null", folds=FOLDS)
    counts = budget.Counts(PHOTOS, 2, PHOTOS)

    class Built:
        model = None

    found = budget.rough_seconds(Built(), config, counts, 0.01)
    passes = 2 * 2 + 0.5 * (26 * (3 * 2 + 1) + 2 * 2 + 3 * 20)
    assert found == pytest.approx(PHOTOS * 0.01 * passes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGKILL, -9, "fine-tuning (without fold 2) epoch 3/"),
        (signal.SIGTERM, 143, "fine-tuning (without fold 3) epoch 14/"),
        (signal.SIGKILL, -9, "fine-tuning (on all photos) epoch 5/"),
    ],
)
def test_a_killed_process_is_resumed_to_the_same_bits(place, tuned, tmp_path, number, code, line):
    values = place.config(tmp_path, *TUNED, folds=FOLDS).dump(tmp_path)
    (tmp_path / "tuned.yaml").write_text(json.dumps(values))
    command = trainings.Command(tmp_path, "train", "tuned.yaml")
    assert command.wait_for(line)
    command.send(number)
    assert command.end().code == code
    ended = trainings.Command(tmp_path, "train", "--resume").end()
    assert ended.code == 0, ended.errors
    assert_same(Run.load(tmp_path / "runs" / "photos-alone-1"), tuned)
