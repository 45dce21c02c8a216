"""`train` from photos to a finished run, on drawn scenes with the bundled backbone."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trainings
from file_faults import ENVIRONMENT
from paths import ROOT
from PIL import Image

from finetune_cli import files
from finetune_cli.config.load import load_config
from finetune_cli.errors import BadPhotos, DataError, FinetuneError, GateError, Interrupted, RunError, UsageError
from finetune_cli.evaluation import evaluate as command_evaluate
from finetune_cli.inference import predict as command_predict
from finetune_cli.inference import runtimes
from finetune_cli.metrics.scores import evaluate
from finetune_cli.practice import sample
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run, read_split
from finetune_cli.training import check as command_check
from finetune_cli.training import converted, extract, keras_process, keras_tasks, outputs, prepare, resume
from finetune_cli.training import pipeline as command_train
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.requirements import check_settings

# Everything that a run holds besides pictures; each of these names is promised in the README.
FILES = {
    "config.yaml", "environment.json", "split.csv", "metrics.json", "per_class.csv", "predictions.csv",
    "model.keras", "inference/model.xml", "inference/model.bin", "confusion_matrix.png",
}  # fmt: skip


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "photos"
    sample.draw(folder, 16, 0, lambda _n: None)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Overrides that train on a tiny network, which is built and saved in a fifth of the time of the bundled one."""
    path = tmp_path_factory.mktemp("small") / "small.keras"
    trainings.build_backbone(path)
    return f"model.backbone={path}", "image.size=64"


def load(folder: Path, drawn: Path, cache: Path, *overrides: str):
    return load_config(
        None,
        [
            f"data.train={drawn}",
            "data.val_split=0.3",
            "model.backbone=efficientnet_lite0",
            f"output.directory={folder / 'runs'}",
            f"runtime.cache_dir={cache}",
            *overrides,
        ],
    )


ADAM = ("training.solver=adam", "training.epochs=6", "training.batch_size=8", "model.dropout=0.2")
FLIP = ("augmentation.horizontal_flip=true", "augmentation.views=2")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, drawn, cache):
    """A run of the bundled network by L-BFGS with two views per photo."""
    folder = tmp_path_factory.mktemp("finished")
    return command_train.train(load(folder, drawn, cache, *FLIP), Silent())


@pytest.fixture(scope="session")
def finished_small(tmp_path_factory, drawn, cache, small):
    """The same with the tiny network."""
    folder = tmp_path_factory.mktemp("finished-small")
    return command_train.train(load(folder, drawn, cache, *small, *FLIP), Silent())


def weights(run: Run) -> dict[str, np.ndarray]:
    from finetune_cli.keras_setup import import_keras

    model = import_keras().models.load_model(run.file("model.keras"), safe_mode=True, compile=False)
    return {weight.path: np.asarray(weight) for weight in model.get_layer("logits").weights}


def assert_same_weights(one: Run, two: Run) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_run_holds_what_is_promised(finished):
    assert set(finished.manifest.files) >= FILES
    for name in finished.manifest.files:
        finished.file(name)
    assert finished.classes == ("city", "forest")
    assert finished.manifest.photos["train"] + finished.manifest.photos["val"] == 32
    assert finished.manifest.metrics["val"].accuracy >= 0.8
    text = "".join(
        p.read_text("utf-8", "replace")
        for p in finished.folder.rglob("*")
        if p.suffix in {".json", ".yaml", ".csv", ".xml"}
    )
    assert str(Path.home()) not in text
    assert str(finished.folder.parents[1]) not in text


def test_the_split_keeps_the_groups_of_a_table_and_of_the_regex(tmp_path, drawn, cache, small):
    names = sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.jpg"))
    lines = [f"{drawn / name},{name.split('/')[0]},{'roll' * (i < 4)}" for i, name in enumerate(names)]
    (tmp_path / "photos.csv").write_text("\n".join(["image_path,label,group", *lines]))
    loaded = load(tmp_path, tmp_path / "photos.csv", cache, *small, r"data.group_regex=forest-(01)\d")
    prepared = prepare.prepare(check_settings(loaded), Silent())
    (tmp_path / "run").mkdir()
    resume.record_start(tmp_path / "run", tmp_path / "run", prepared)
    groups = {Path(row.path).stem: row.group for row in read_split(tmp_path / "run" / "split.csv")}
    assert len(groups) == 32
    assert {name for name, group in groups.items() if group == "roll"} == {f"city-00{i}" for i in (1, 2, 3, 4)}
    assert {name for name, group in groups.items() if group == "01"} == {f"forest-01{i}" for i in range(7)}
    assert set(groups.values()) == {"roll", "01", ""}


def test_the_calibration_is_not_that_of_the_photos_it_was_fitted_on(finished):
    """What train writes about validation photos is what evaluate finds: cross-fitted, and so worse than as fitted."""
    with finished.file("predictions.csv").open(encoding="utf-8", newline="") as file:
        probabilities = [float(row[row["true"]]) for row in csv.DictReader(file)]
    recorded = finished.manifest.metrics["val"].document
    assert recorded["log_loss"] > -np.log(probabilities).mean() * 1.001
    found = command_evaluate.evaluate(finished, Silent()).judged
    assert found.photos.part == "val"
    assert recorded["log_loss"] == pytest.approx(found.evaluation.log_loss, rel=1e-3)
    assert json.loads(finished.file("metrics.json").read_text())["val"] == recorded


def test_predictions_equal_what_was_measured(finished, drawn):
    from finetune_cli.tables import read_csv

    header = ("split", "path", "true", "predicted", "city", "forest")
    rows = read_csv(finished.file("predictions.csv"), header)
    predictor = command_predict.RunPredictor(finished, workers=2)
    answers = command_predict.predict(predictor, [drawn / row[1] for row in rows], top_k=2)
    for row, answer in zip(rows, answers, strict=True):
        probability_of = dict(answer.top)
        assert answer.label == row[3]
        assert probability_of["city"] == pytest.approx(float(row[4]), abs=1e-4)
        assert probability_of["forest"] == pytest.approx(float(row[5]), abs=1e-4)


def test_the_saved_graph_ends_as_promised(finished):
    from finetune_cli.keras_setup import import_keras

    model = import_keras().models.load_model(finished.file("model.keras"), safe_mode=True, compile=False)
    assert [layer.name for layer in model.layers[-3:]] == ["logits", "temperature", "probabilities"]
    assert model.get_layer("temperature").scale == pytest.approx(1 / finished.temperature)


def test_two_runs_are_equal_apart_from_times(tmp_path, drawn, finished_small, small):
    again = command_train.train(load(tmp_path, drawn, tmp_path / "own-cache", *small, *FLIP), Silent())
    assert_same_weights(finished_small, again)
    for name in FILES - {"model.keras", "config.yaml"}:  # zip files carry times; the config names another folder
        assert finished_small.file(name).read_bytes() == again.file(name).read_bytes(), name


def test_other_head_settings_run_no_backbone_pass(tmp_path, drawn, cache, finished_small, small, monkeypatch):
    def never(*_args):
        pytest.fail("the backbone was compiled for features that the cache holds")

    monkeypatch.setattr(Extractor, "runtime", never)
    overrides = (*small, *FLIP, *ADAM, "training.learning_rate=0.01")
    run = command_train.train(load(tmp_path, drawn, cache, *overrides), Silent())
    assert run.manifest.views.computed == 0
    views = finished_small.manifest.views
    assert run.manifest.views.cached == views.computed + views.cached


def test_other_head_settings_need_neither_keras_nor_tensorflow_here(tmp_path, drawn, cache, finished_small, small):
    settings = {
        "data": {"train": str(drawn), "val_split": 0.3},
        "image": {"size": 64},
        "model": {"backbone": small[0].partition("=")[2]},
        "augmentation": {"horizontal_flip": True, "views": 2},
        "training": {"l2": 0.01},
        "output": {"directory": str(tmp_path)},
        "runtime": {"cache_dir": str(cache)},
    }
    program = f"""
import sys
from finetune_cli import api
settings = {settings!r}
run = api.train(settings)
print(sorted({{"tensorflow", "keras"}} & set(sys.modules)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "[]\n", ended.stderr


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, drawn, cache, small):
    whole = command_train.train(load(tmp_path / "whole", drawn, cache, *small, *FLIP, *ADAM), Silent())

    class StopsAfterThree(Silent):
        def note(self, text):
            super().note(text)
            if text.startswith("epoch 3/"):
                raise Interrupted(2)

    with pytest.raises(Interrupted):
        command_train.train(load(tmp_path / "killed", drawn, cache, *small, *FLIP, *ADAM), StopsAfterThree())
    folder = tmp_path / "killed" / "runs" / "photos-1"
    assert not (folder / "run.json").exists()
    # Links in the places of what is still to be written must be replaced, and change nothing.
    (tmp_path / "precious").write_bytes(b"precious")
    for name in {*FILES, "history.csv", "curves.png", ".lock", ".lock-holder", "inference"}:
        if not (folder / name).exists() and "/" not in name:
            (folder / name).symlink_to(tmp_path / "precious")
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "precious")
    observer = Silent()
    resumed = command_train.resume(folder, load_config(folder / "config.yaml"), observer)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert [path for path in folder.rglob("*") if path.is_symlink()] == []
    assert any("epoch 3" in note for note in observer.notes), observer.notes
    assert_same_weights(whole, resumed)
    ours, theirs = (run.file("predictions.csv").read_bytes() for run in (whole, resumed))
    assert ours == theirs
    with pytest.raises(RunError, match="nothing to resume"):
        command_train.resume(folder, load_config(folder / "config.yaml"), Silent())


def test_a_run_is_not_resumed_with_other_photos(tmp_path, drawn, cache, small):
    photos = tmp_path / "photos"
    shutil.copytree(drawn, photos)

    class StopsAtOnce(Silent):
        def note(self, text):
            if text.startswith("epoch 1/"):
                raise Interrupted(15)

    with pytest.raises(Interrupted) as caught:
        command_train.train(load(tmp_path, photos, cache, *small, *ADAM), StopsAtOnce())
    assert caught.value.exit_code == 143
    gone = next((photos / "city").glob("*.jpg"))
    gone.unlink()
    folder = tmp_path / "runs" / "photos-1"
    with pytest.raises(RunError, match="1 gone") as error:
        command_train.resume(folder, load_config(folder / "config.yaml"), Silent())
    assert gone.name in error.value.problem


def test_a_third_class_keeps_the_first_two(tmp_path, drawn, cache, finished_small, small):
    photos = tmp_path / "photos"
    shutil.copytree(drawn, photos)
    rng = np.random.default_rng(0)
    (photos / "beach").mkdir()
    for i in range(12):
        noise = rng.integers(0, 60, (200, 200, 3), dtype=np.uint8) + np.uint8([180, 160, 90])
        Image.fromarray(noise).save(photos / "beach" / f"{i}.jpg")
    observer = Silent()
    overrides = (*small, *FLIP, f"model.start_from={finished_small.folder}")
    grown = command_train.train(load(tmp_path, photos, cache, *overrides), observer)
    assert grown.classes == ("beach", "city", "forest")
    assert any("kept city, forest" in note and "new beach" in note for note in observer.notes)
    assert grown.manifest.metrics["val"].accuracy > 0.8


def test_start_from_wants_the_same_backbone(tmp_path, drawn, cache, finished, small, monkeypatch):
    monkeypatch.setattr(extract, "extract", None)  # it is told before the features are computed
    with pytest.raises(RunError, match="another backbone"):
        command_train.train(load(tmp_path, drawn, cache, *small, f"model.start_from={finished.folder}"), Silent())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=resnet5", "no backbone 'resnet5'"),
        ("model.weights=none", "did you mean null?"),
        ("model.weights=imagnet", "did you mean imagenet?"),
        ("training.class_weights={lake: 2}", "'lake', which is not a class"),
        ("model.start_from=nowhere", "there is no run"),
        ("output.name=taken", "exists already"),
    ],
)
def test_check_reports_what_would_stop_train(tmp_path, drawn, cache, override, message):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    loaded = load(tmp_path, drawn, cache, override)
    for command in (command_check.check, command_train.train):
        with pytest.raises(FinetuneError) as caught:
            command(loaded, Silent())
        assert message in str(caught.value)


def test_one_view_with_transforms_gives_a_warning(tmp_path, drawn, cache, small):
    observer = Silent()
    loaded = load(tmp_path, drawn, cache, *small, "augmentation.horizontal_flip=true", "augmentation.views=1")
    prepare.prepare(check_settings(loaded), observer)
    assert "augmentation.views is 1, the photo itself: no transform is applied" in observer.warnings


@pytest.fixture
def with_bad_photo(tmp_path, drawn):
    photos = tmp_path / "photos"
    shutil.copytree(drawn, photos)
    bad = next((photos / "city").glob("*.jpg"))
    bad.write_bytes(bad.read_bytes()[:-200])
    return photos, bad


def test_a_bad_photo_stops_before_anything_exists(tmp_path, with_bad_photo, cache, small):
    photos, bad = with_bad_photo
    with pytest.raises(DataError, match=bad.name) as caught:
        command_train.train(load(tmp_path, photos, cache, *small), Silent())
    assert "on_bad_image=skip" in caught.value.remedy
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match=bad.name):
        command_check.check(load(tmp_path, photos, cache, *small), Silent())


def test_all_bad_photos_are_reported_at_once_before_the_backbone_is_needed(
    tmp_path, with_bad_photo, cache, monkeypatch
):
    photos, cut = with_bad_photo  # only the decoder finds this one
    (photos / "forest" / "empty.jpg").write_bytes(b"")  # and the header tells this one
    monkeypatch.setattr(prepare.Conversion, "start", None)
    for command in (command_train.train, command_check.check):
        with pytest.raises(BadPhotos) as caught:
            command(load(tmp_path, photos, cache), Silent())
        heading, *lines = caught.value.problem.splitlines()
        assert heading == "2 of 33 photos cannot be used"
        assert [line.split(": ")[0] for line in lines] == [f"  {photos}/forest/empty.jpg", f"  {cut}"]


class _KerasHere:
    """`KerasProcess` without a process: what is asked of it is done when the answer is wanted."""

    def __init__(self, _backend):
        self.asked = []

    def __exit__(self, *_exception):
        pass

    def start(self):
        pass

    def request(self, task, arguments):
        self.asked.append((keras_tasks.TASKS[task], arguments))

    def answer(self):
        task, arguments = self.asked.pop(0)
        return task(**arguments)


def test_a_backbone_that_openvino_computes_otherwise_leaves_no_run_and_no_features(tmp_path, drawn, small, monkeypatch):
    def refuse(*_arguments):
        raise GateError("the features differ", "take another backbone")

    cache = tmp_path / "cache"
    monkeypatch.setattr(converted, "KerasProcess", _KerasHere)
    with monkeypatch.context() as patch:
        patch.setattr(converted, "_compare", refuse)
        with pytest.raises(GateError, match="the features differ"):
            command_train.train(load(tmp_path, drawn, cache, *small), Silent())
    assert not (tmp_path / "runs").exists()
    assert not [path for path in (cache / "backbones").iterdir() if path.is_dir()]
    views = command_train.train(load(tmp_path, drawn, cache, *small), Silent()).manifest.views
    assert views.cached == 0
    assert views.computed >= 32  # where cores have bfloat16, the first look at the validation photos is in that


def test_on_a_gpu_the_backbone_is_not_converted_beside_the_training(tmp_path, drawn, small, monkeypatch):
    monkeypatch.setattr(runtimes, "choose_device", lambda _wanted: "gpu")
    monkeypatch.setattr(keras_process.KerasProcess, "start", None)
    run = command_train.train(load(tmp_path, drawn, tmp_path / "cache", *small), Silent())
    assert (run.manifest.device, run.manifest.feature_precision) == ("gpu", "mixed")
    assert not (tmp_path / "cache" / "backbones").exists()
    assert run.manifest.parity.openvino_against_keras < outputs.PARITY_LIMIT


def test_a_class_that_decoding_leaves_empty_is_refused_by_check_and_train(tmp_path, drawn, cache, small):
    photos = tmp_path / "photos"
    shutil.copytree(drawn, photos)
    (photos / "lake").mkdir()
    cut = photos / "lake" / "1.jpg"
    cut.write_bytes(next((photos / "city").glob("*.jpg")).read_bytes()[:-200])
    loaded = load(tmp_path, photos, cache, *small, "data.on_bad_image=skip")
    for command in (command_train.train, command_check.check):
        with pytest.raises(DataError, match="no good photo of class lake is left") as caught:
            command(loaded, Silent())
        assert f"{cut}: " in caught.value.problem


def test_a_bad_photo_can_be_skipped(tmp_path, with_bad_photo, cache, small):
    photos, bad = with_bad_photo
    before = bad.read_bytes()
    loaded = load(tmp_path, photos, cache, *small, "data.on_bad_image=skip")
    run = command_train.train(loaded, Silent())
    assert [photo.path for photo in run.manifest.bad_photos] == [f"city/{bad.name}"]
    assert bad.read_bytes() == before
    assert sum(run.manifest.photos.values()) == 31
    assert len(command_check.check(loaded, Silent()).bad) == 1


def test_a_model_that_disagrees_is_not_finished(tmp_path, drawn, cache, small, monkeypatch):
    monkeypatch.setattr(outputs, "PARITY_LIMIT", -1.0)
    with pytest.raises(GateError, match="disagrees"):
        command_train.train(load(tmp_path, drawn, cache, *small), Silent())
    assert not (tmp_path / "runs" / "photos-1" / "run.json").exists()


def test_a_taken_name_is_reported_before_the_work(tmp_path, drawn, cache):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="never overwritten"):
        command_train.train(load(tmp_path, drawn, cache, "output.name=mine"), Silent())


def test_the_manifest_names_versions_and_environment(finished):
    environment = json.loads(finished.file("environment.json").read_text())
    assert environment["packages"]["keras"]
    assert environment["cpu"]["flags"]
    assert files.sha256(finished.file("model.keras")) == finished.manifest.files["model.keras"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "resnet50", "text-and-signs"])
def test_every_shipped_config_trains(tmp_path, drawn, cache, name):
    path = ROOT / "configs" / f"{name}.yaml"
    weights = ["model.weights=null", "image.size=64"] if load_config(path).model.backbone == "resnet50" else []
    overrides = [f"data.train={drawn}", f"runtime.cache_dir={cache}", f"output.directory={tmp_path / 'runs'}"]
    run = command_train.train(load_config(path, [*overrides, *weights, f"output.name={name}"]), Silent())
    assert run.name == name
    assert run.manifest.views.per_photo > 1


def test_a_model_that_is_no_better_than_the_majority_class_says_why(tmp_path, cache, small):
    """Labels that have nothing to do with the photos: one warning, and its reason depends on the weights."""
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for i in range(60):
        folder = photos / ("a" if i < 40 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    observer = Silent()
    run = command_train.train(load(tmp_path, photos, cache, *small), observer)
    scores = run.manifest.metrics["val"]
    assert scores.document["accuracy"] <= scores.document["baseline"]["accuracy"]
    (said,) = [text for text in observer.warnings if "majority class" in text]
    assert "is not clearly above that of the majority class 'a'" in said
    assert "look at the labels" in said
    assert "\n" not in said


def test_random_weights_are_named_as_the_reason(tmp_path, drawn, cache):
    part = judged_as(accuracy=0.5, baseline=0.5)
    random = load(tmp_path, drawn, cache, "model.backbone=resnet50", "model.weights=null")
    assert "weights are random (model.weights: null)" in command_train._below_baseline(random, part)
    assert "weights are random" not in command_train._below_baseline(load(tmp_path, drawn, cache), part)
    assert (
        command_train._below_baseline(random, judged_as(accuracy=0.55, baseline=0.5)) is not None
    )  # chance can do that
    assert command_train._below_baseline(load(tmp_path, drawn, cache), judged_as(accuracy=0.51, baseline=0.5)) is None
    assert command_train._below_baseline(random, judged_as(accuracy=0.7, baseline=0.5)) is None
    assert command_train._below_baseline(random, judged_as(accuracy=1.0, baseline=1.0)) is None


def judged_as(accuracy, baseline):
    """100 photos of two classes: `baseline` of them are of the first."""
    labels = np.arange(100) >= 100 * baseline
    answers = labels ^ (np.arange(100) >= 100 * accuracy)
    probabilities = np.eye(2, dtype=np.float32)[answers.astype(int)]
    return outputs.ScoredSplit("val", (), probabilities, evaluate(probabilities, labels.astype(int), ("a", "b")))
