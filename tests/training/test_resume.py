"""What a resumed training must find unchanged: settings, photos, weights, the run to start from, the environment."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_cli.config.load import load_config
from finetune_cli.errors import RunError
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Silent
from finetune_cli.runs import environment, start
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
        "data": SimpleNamespace(classes=("a", "b"), fixes=None),
        "backbone": SimpleNamespace(fingerprint="f"),
        "device": "cpu",
        "precision": "float32",
        "settings": SimpleNamespace(workers=2),
        "parts": {"train": SimpleNamespace(samples=samples)},
        "start_from": "a" * 64,
        "leaks": (),
    }
    return SimpleNamespace(**{**facts, **changes})


@pytest.fixture(params=["lbfgs", "adam"])
def started(request, tmp_path):
    """The folder of a run that was started, before any checkpoint, and its config."""
    (tmp_path / "photos").mkdir()
    settings = [f"data.train={tmp_path / 'photos'}", f"training.solver={request.param}", "runtime.device=cpu"]
    (tmp_path / "run").mkdir()
    config = load_config(None, settings)
    resume.record_start(tmp_path / "run", tmp_path / "run", prepared(config))
    return tmp_path / "run", config


def check(folder, config=None, observer=None, **changes):
    resume.check_files(folder)
    config = config or load_config(folder / "config.yaml")
    resume.check_inputs(folder, prepared(config, **changes), observer or Silent())


def test_nothing_changed(started):
    folder, _config = started
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    observer = Listening()
    check(folder, observer=observer)
    assert observer.warnings == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_changed_config_is_refused_by_its_keys(started):
    folder, _config = started
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5").replace("size: 224", "size: 160"))
    with pytest.raises(RunError, match="the settings are not those") as caught:
        check(folder)
    assert caught.value.problem.splitlines()[1:] == ["  image.size was 224, is 160", "  training.seed was 0, is 5"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("22", "23"),
        lambda text: text.replace("train,b", "train,a"),
        lambda text: text.replace("train,b", "val,b"),
        lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    ],
    ids=["digest", "class", "split", "row"],
)
def test_a_changed_split_is_refused_because_it_is_taken_as_it_is(started, change):
    folder, _config = started
    path = folder / "split.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(RunError, match=r"split\.csv or leaks\.csv was changed"):
        check(folder)


def test_leaks_that_appear_are_refused(started):
    folder, _config = started
    (folder / "leaks.csv").write_text("split,path,train_path,score\nval,a/1.png,b/2.png,0.9\n")
    with pytest.raises(RunError, match=r"split\.csv or leaks\.csv was changed"):
        check(folder)


def test_a_run_from_before_the_split_was_recorded_resumes(started):
    folder, _config = started
    record = json.loads((folder / start.FILE).read_text())
    del record["photos"]
    (folder / start.FILE).write_text(json.dumps(seal(record)))
    check(folder)


def test_other_photos_are_refused_by_name(started):
    folder, _config = started
    samples = (Sample(Path("a/1.png"), "a/1.png", 0, "11"), Sample(Path("b/2.png"), "b/2.png", 1, "99"))
    with pytest.raises(RunError, match="1 gone, 1 new") as caught:
        check(folder, parts={"train": SimpleNamespace(samples=samples)})
    assert "  gone or changed train/b: b/2.png" in caught.value.problem.splitlines()


def test_other_weights_are_refused(started):
    folder, _config = started
    with pytest.raises(RunError, match="the backbone's weights are not those"):
        check(folder, backbone=SimpleNamespace(fingerprint="g"))
    for other in ("t", None):
        with pytest.raises(RunError, match=r"model\.start_from is not the one"):
            check(folder, start_from=other)


def test_more_epochs_and_moved_photos_are_no_other_run(started):
    folder, config = started
    training_id = start.read(folder).training_id
    moved = folder.parent / "moved"
    (folder.parent / "photos").rename(moved)
    epochs = 77 if config.training.solver == "adam" else config.training.epochs
    training = config.training.model_copy(update={"epochs": epochs})
    data = config.data.model_copy(update={"train": moved})
    check(folder, config.model_copy(update={"training": training, "data": data}))
    check(folder)
    assert load_config(folder / "config.yaml").training.epochs == epochs
    assert start.read(folder).training_id == training_id


def test_another_environment_is_reported_and_recorded(started):
    folder, _config = started
    observer = Listening()
    for workers, precision in ((3, "float32"), (3, "float32"), (4, "bfloat16")):
        check(folder, observer=observer, settings=SimpleNamespace(workers=workers), precision=precision)
        assert len(observer.warnings) == 1
        assert ("(threads)" if workers == 3 else "(feature_precision, threads)") in observer.warnings.pop()
    found = environment.read_environment(folder / "environment.json")
    assert found.facts["threads"] == 2
    assert found.resumed_with == ("threads: 3", "feature_precision: bfloat16", "threads: 4")
    check(folder, observer=observer)
    assert observer.warnings == []
    assert environment.read_environment(folder / "environment.json") == found


def test_a_kill_between_the_record_of_another_environment_and_the_file(started, monkeypatch):
    folder, _config = started
    before = (folder / "environment.json").read_bytes()
    check(folder, settings=SimpleNamespace(workers=3))
    (folder / "environment.json").write_bytes(before)
    check(folder, settings=SimpleNamespace(workers=3))
    (folder / "environment.json").write_bytes(before[:-2])
    with pytest.raises(RunError, match=r"environment\.json is damaged"):
        check(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "2"},
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
def test_a_foreign_record_is_refused(started, change):
    folder, _config = started
    path = folder / "checkpoints" / "start.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), **change})))
    with pytest.raises(RunError, match=rf"start\.json is damaged: {next(iter(change))}") as caught:
        check(folder)
    assert len(caught.value.problem.splitlines()) == 1


def test_a_record_of_a_later_version_asks_for_an_update(started):
    folder, _config = started
    path = folder / "checkpoints" / "start.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), "format": 3})))
    with pytest.raises(RunError, match="has format 3, this version reads 2") as caught:
        check(folder)
    assert "update" in caught.value.remedy


def test_a_recorded_config_that_no_version_wrote_is_refused(started):
    folder, _config = started
    path = folder / "checkpoints" / "start.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), "configs": [{"data": {}}]})))
    with pytest.raises(RunError, match=r"the config recorded in .*start\.json cannot be used: `data\.train`"):
        check(folder)


def test_a_key_that_the_recorded_config_lacks_has_its_default(started):
    folder, _config = started
    record = start.read(folder)
    older = {**record.configs[0], "model": {k: v for k, v in record.configs[0]["model"].items() if k != "dropout"}}
    start.write(folder, start.Start((older,), record.backbone, record.start_from, record.environments))
    check(folder)
