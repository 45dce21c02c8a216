"""What a training that goes on must find as it was: settings, photos, weights, the run to start from, surroundings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_cli.config.load import load_config
from finetune_cli.errors import RunError
from finetune_cli.photos.dataset import Sample
from finetune_cli.progress import Silent
from finetune_cli.runs import environment
from finetune_cli.runs.manifest import seal
from finetune_cli.training import resume


class Listening(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def prepared(config, **changes):
    samples = (Sample(Path("a/1.png"), "a/1.png", 0, "11"), Sample(Path("b/2.png"), "b/2.png", 1, "22"))
    facts = {
        "config": config,
        "data": SimpleNamespace(classes=("a", "b")),
        "backbone": SimpleNamespace(fingerprint="f"),
        "device": "cpu",
        "precision": "float32",
        "workers": 2,
        "parts": {"train": SimpleNamespace(samples=samples)},
        "start_from": "a" * 64,
    }
    return SimpleNamespace(**{**facts, **changes})


@pytest.fixture(params=["lbfgs", "adam"])
def begun(request, tmp_path):
    """The folder of a run that was begun, before any checkpoint, and its config."""
    (tmp_path / "photos").mkdir()
    settings = [f"data.train={tmp_path / 'photos'}", f"training.solver={request.param}", "runtime.device=cpu"]
    (tmp_path / "run").mkdir()
    config = load_config(None, settings)
    resume.begin(tmp_path / "run", prepared(config))
    return tmp_path / "run", config


def go_on(folder, config=None, observer=None, **changes):
    resume.check(folder)
    config = config or load_config(folder / "config.yaml")
    resume.go_on(folder, prepared(config, **changes), observer or Silent())


def test_nothing_changed(begun):
    folder, _config = begun
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    observer = Listening()
    go_on(folder, observer=observer)
    assert observer.warnings == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_changed_config_is_refused_by_its_keys(begun):
    folder, _config = begun
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5").replace("size: 224", "size: 160"))
    with pytest.raises(RunError, match="the settings are not those") as caught:
        go_on(folder)
    assert caught.value.problem.splitlines()[1:] == ["  image.size was 224, is 160", "  training.seed was 0, is 5"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("22", "23"), "gone or changed train/b: b/2.png"),
        (lambda text: text.replace("train,b", "train,a"), "gone or changed train/a: b/2.png"),
        (lambda text: text.replace("train,b", "val,b"), "gone or changed val/b: b/2.png"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "new or changed train/b: b/2.png"),
    ],
    ids=["digest", "class", "split", "row"],
)
def test_a_changed_split_is_refused_by_its_photos(begun, change, told):
    folder, _config = begun
    path = folder / "split.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(RunError, match="the photos are not those") as caught:
        go_on(folder)
    assert f"  {told}" in caught.value.problem.splitlines()


def test_other_photos_are_refused_by_name(begun):
    folder, _config = begun
    samples = (Sample(Path("a/1.png"), "a/1.png", 0, "11"), Sample(Path("b/2.png"), "b/2.png", 1, "99"))
    with pytest.raises(RunError, match="1 gone, 1 new") as caught:
        go_on(folder, parts={"train": SimpleNamespace(samples=samples)})
    assert "  gone or changed train/b: b/2.png" in caught.value.problem.splitlines()


def test_other_weights_are_refused(begun):
    folder, _config = begun
    with pytest.raises(RunError, match="the backbone's weights are not those"):
        go_on(folder, backbone=SimpleNamespace(fingerprint="g"))
    for other in ("t", None):
        with pytest.raises(RunError, match=r"model\.start_from is not the one"):
            go_on(folder, start_from=other)


def test_more_epochs_and_moved_photos_are_no_other_run(begun):
    folder, config = begun
    begun_as = resume.identity(folder)
    moved = folder.parent / "moved"
    (folder.parent / "photos").rename(moved)
    epochs = 77 if config.training.solver == "adam" else config.training.epochs
    training = config.training.model_copy(update={"epochs": epochs})
    data = config.data.model_copy(update={"train": moved})
    go_on(folder, config.model_copy(update={"training": training, "data": data}))
    go_on(folder)
    assert load_config(folder / "config.yaml").training.epochs == epochs
    assert resume.identity(folder) == begun_as


def test_other_surroundings_are_told_and_kept(begun):
    folder, _config = begun
    observer = Listening()
    for workers, precision in ((3, "float32"), (3, "float32"), (4, "bfloat16")):
        go_on(folder, observer=observer, workers=workers, precision=precision)
        assert len(observer.warnings) == 1
        assert ("(threads)" if workers == 3 else "(feature_precision, threads)") in observer.warnings.pop()
    found = environment.read_environment(folder / "environment.json")
    assert found["threads"] == 2
    assert found["went_on_with"] == ["threads: 3", "feature_precision: bfloat16", "threads: 4"]
    go_on(folder, observer=observer)
    assert observer.warnings == []
    assert environment.read_environment(folder / "environment.json") == found


def test_a_kill_between_the_record_of_other_surroundings_and_the_file(begun, monkeypatch):
    folder, _config = begun
    before = (folder / "environment.json").read_bytes()
    go_on(folder, workers=3)
    (folder / "environment.json").write_bytes(before)
    go_on(folder, workers=3)
    (folder / "environment.json").write_bytes(before[:-2])
    with pytest.raises(RunError, match=r"environment\.json is damaged"):
        go_on(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"environments": 5},
        {"environments": []},
        {"environments": ["ab"]},
        {"configs": {}},
        {"configs": []},
        {"configs": "x"},
        {"configs": [5]},
        {"backbone": None},
        {"start_from": "ab"},
        {"start_from": []},
    ],
    ids=str,
)
def test_a_foreign_record_is_refused(begun, change):
    folder, _config = begun
    path = folder / "checkpoints" / "begun.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), **change})))
    with pytest.raises(RunError, match=rf"begun\.json is damaged: {next(iter(change))}") as caught:
        go_on(folder)
    assert len(caught.value.problem.splitlines()) == 1
