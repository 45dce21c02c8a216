"""`train` with fine-tuning, from photos to a finished run, with a tiny backbone whose frozen features are poor."""

import csv
import dataclasses
import errno
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import trainings
from narrow_place import EPOCHS, Place, StoppedAfter
from typer.testing import CliRunner

from finetune_cli import files
from finetune_cli.backbones import build
from finetune_cli.cli import train as train_command
from finetune_cli.cli import tuning_output
from finetune_cli.cli.app import app
from finetune_cli.cli.console import Console
from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError, Interrupted, RunError, StorageError
from finetune_cli.evaluation import evaluate as command_evaluate
from finetune_cli.evaluation import explain as command_explain
from finetune_cli.inference import predict as command_predict
from finetune_cli.inference import runtimes
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.keras_setup import import_keras
from finetune_cli.progress import Silent
from finetune_cli.report import html as command_report
from finetune_cli.report import refit_data, tuning
from finetune_cli.runs import manifest
from finetune_cli.runs.run import Run
from finetune_cli.training import pipeline as command_train
from finetune_cli.training.settings import wanted_backbone
from finetune_cli.training.tuning import budget, comparison, plan
from finetune_cli.training.tuning.activations import ScratchFile
from finetune_cli.training.tuning.plan import Trial


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def frozen(place, tmp_path_factory):
    return place.train(tmp_path_factory.mktemp("frozen"), "fine_tuning=null")


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    return place.train(tmp_path_factory.mktemp("tuned"))


def rows(run: Run, name: str) -> list[dict[str, str]]:
    with run.file(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(table: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table]


def test_a_tuned_run_is_better_and_says_what_was_tried(frozen, tuned):
    facts = tuned.manifest.fine_tuning
    assert facts["kept"] != "frozen"
    before, after = (
        {split: metrics.document for split, metrics in each.manifest.metrics.items()} for each in (frozen, tuned)
    )
    assert after["val"]["log_loss"] < 0.6 * before["val"]["log_loss"]
    assert after["test"]["accuracy"] > before["test"]["accuracy"]
    assert [each["name"] for each in facts["candidates"]] == [
        "frozen", "25 % of the way", "50 % of the way", "75 % of the way", "tuned", "tuned, head fitted again",
    ]  # fmt: skip
    assert [each["name"] for each in facts["candidates"] if each["kept"]] == [facts["kept"]]
    lowest = min(facts["candidates"], key=lambda each: each["log_loss"])
    assert lowest["kept"] or facts["kept"] == "tuned, head fitted again"
    (training,) = facts["trainings"]
    assert (training["last_frozen"], training["first_trained"]) == ("lower_conv", "upper_conv")
    assert training["activations"] == [16, 16, 12]
    assert training["scratch_bytes"] == 16 * 16 * 12 * (2 * 2 * 49 + 4 * 30)
    assert training["weights"] == 12 * 12 * 9 + 12 + 24 + 12 * 2 + 2 + 2 * 3 + 3
    for split in ("val", "test"):
        assert facts["compared"][split]["frozen"]["accuracy"] == before[split]["accuracy"]
        assert facts["compared"][split]["kept"]["accuracy"] == after[split]["accuracy"]
    assert json.loads(tuned.file("metrics.json").read_text())["fine_tuning"] == facts


def test_its_tables_agree_with_both_models(frozen, tuned):
    history = rows(tuned, "tuning.csv")
    assert [row["epoch"] for row in history] == [str(i + 1) for i in range(EPOCHS)]
    assert tuned.file("tuning_curves.png").stat().st_size > 1000
    before = {(row["split"], row["path"]): row for row in rows(frozen, "predictions.csv")}
    expected = [
        {"split": row["split"], "path": row["path"], "true": row["true"],
         "frozen": before[row["split"], row["path"]]["predicted"], "kept": row["predicted"]}
        for row in rows(tuned, "predictions.csv")
        if row["predicted"] != before[row["split"], row["path"]]["predicted"]
    ]  # fmt: skip
    assert expected
    assert rows(tuned, "flipped.csv") == expected
    test = tuned.manifest.fine_tuning["compared"]["test"]
    of_test = [row for row in expected if row["split"] == "test"]
    assert test["only_frozen_right"] == sum(row["frozen"] == row["true"] for row in of_test)
    assert test["only_kept_right"] == sum(row["kept"] == row["true"] for row in of_test)


def test_all_commands_work_on_it(tuned, tmp_path):
    assert tuned.manifest.parity.openvino_against_measured < 1e-4
    assert tuned.manifest.parity.openvino_against_keras < 1e-4
    found = command_evaluate.evaluate(tuned, Silent()).judged
    assert found.evaluation.accuracy.value == tuned.manifest.metrics["test"].accuracy
    photo = next((tuned.data_roots()["test"] / "bee").iterdir())
    expected = {row["path"]: row["predicted"] for row in rows(tuned, "predictions.csv") if row["split"] == "test"}
    (answer,) = command_predict.predict(RunPredictor(tuned, 1), [photo], 1)
    assert answer.label == expected[f"bee/{photo.name}"]
    explanation = command_explain.explain(tuned, photo, None, tmp_path / "map.png")
    for row in explanation.evidence:
        assert row.supporting + row.opposing + row.bias == pytest.approx(row.logit, abs=1e-4)


def test_only_the_upper_part_has_changed(place, tuned):
    keras = import_keras()
    before = keras.models.load_model(place.backbone)
    inner = next(
        layer for layer in keras.models.load_model(tuned.file("model.keras")).layers if hasattr(layer, "layers")
    )
    assert not tuned.manifest.fine_tuning["candidates"][0]["kept"]
    pairs = list(zip(before.weights, inner.weights, strict=True))
    same = {a.path for a, b in pairs if np.array_equal(a.numpy(), b.numpy())}
    assert same == {a.path for a, _b in pairs if "lower_conv" in a.path or "moving" in a.path}


def test_its_features_are_in_the_cache_under_their_own_fingerprint(place, frozen, tuned):
    own, old = tuned.manifest.backbone, frozen.manifest.backbone
    assert own.fingerprint != own.original == old.fingerprint == old.original
    found = refit_data.load(tuned, load_config(tuned.file("config.yaml")))
    other = refit_data.load(frozen, load_config(frozen.file("config.yaml")))
    assert found.features.shape == other.features.shape
    assert not np.allclose(found.features, other.features)


def test_the_same_seed_gives_the_same_bits(place, tuned, tmp_path):
    again = place.train(tmp_path)
    for name in ("inference/model.bin", "inference/model.xml", "predictions.csv", "flipped.csv"):
        assert again.manifest.files[name] == tuned.manifest.files[name], name
    assert without_seconds(rows(again, "tuning.csv")) == without_seconds(rows(tuned, "tuning.csv"))


@pytest.mark.parametrize("moment", ["fine-tuning epoch 3/", f"fine-tuning epoch {EPOCHS}/", "fine-tuning: kept"])
def test_a_resumed_run_ends_with_the_same_bits(place, tuned, tmp_path, moment):
    with pytest.raises(Interrupted) as caught:
        place.train(tmp_path, observer=StoppedAfter(moment))
    folder = tmp_path / "runs" / "photos-1"
    assert f"--resume {folder}" in caught.value.remedy
    observer = Silent()
    again = command_train.resume(folder, load_config(folder / "config.yaml"), observer)
    epoch = EPOCHS if moment == "fine-tuning: kept" else int(moment.split()[2].rstrip("/"))
    assert f"fine-tuning: resuming after epoch {epoch}" in observer.notes
    for name in ("inference/model.bin", "predictions.csv", "flipped.csv"):
        assert again.manifest.files[name] == tuned.manifest.files[name], name
    assert without_seconds(rows(again, "tuning.csv")) == without_seconds(rows(tuned, "tuning.csv"))
    assert not (folder / "checkpoints").exists()


# The first learns nothing, so that the second is needed.
SEVERAL = (Trial("last_stage", 1e-9, EPOCHS), Trial("all", 0.02, EPOCHS - 1))


@pytest.fixture(scope="module")
def several(place, tmp_path_factory):
    """A run that tries two cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_LISTS", ((math.inf, SEVERAL),))
        return place.train(tmp_path_factory.mktemp("several"), *BOTH)


BOTH = ("fine_tuning.epochs=auto", "fine_tuning.learning_rate=auto")


def test_several_trainings_are_tried_and_the_best_is_kept(several, capsys):
    facts = several.manifest.fine_tuning
    assert [(each["unfreeze"], each["learning_rate"], each["epochs"]) for each in facts["trainings"]] == [
        ("last_stage", 1e-9, EPOCHS), ("all", 0.02, EPOCHS - 1),
    ]  # fmt: skip
    numbers = [each["training"] for each in facts["candidates"]]
    assert numbers[:6] == [None, 0, 0, 0, 0, 0]
    own = {
        number: min(
            c["log_loss"] for c in facts["candidates"] if c["training"] == number and c["head"] != "fitted again"
        )
        for number in (0, 1)
    }
    assert numbers[6:] == [1] * (5 if own[1] < own[0] else 4)
    (kept,) = [each for each in facts["candidates"] if each["kept"]]
    assert kept["training"] == 1
    # What was measured of the model that is saved is what was measured of the candidate.
    found = several.manifest.metrics["val"]
    assert found.accuracy == kept["accuracy"]
    assert found.document["log_loss"] == pytest.approx(kept["log_loss"], rel=1e-3)
    assert [(row["training"], row["epoch"]) for row in rows(several, "tuning.csv")] == [
        *(("0", str(i + 1)) for i in range(EPOCHS)), *(("1", str(i + 1)) for i in range(EPOCHS - 1)),
    ]  # fmt: skip
    train_command._print_result(Console(), several)
    text = capsys.readouterr().out
    for rate in ("1e-09", "0.02"):
        assert sum(f" {rate} " in line for line in text.splitlines()) >= 4
    section = tuning.section(several)
    assert [each["rate"] for each in section["trainings"]] == ["1e-09", "0.02"]
    assert {each["rate"] for each in section["candidates"]} == {"", "1e-09", "0.02"}


def test_the_list_ends_with_the_first_training_that_is_kept(place, tuned, tmp_path, monkeypatch):
    trials = (Trial("last_stage", 0.02, EPOCHS), Trial("all", 0.02, 99))
    monkeypatch.setattr(plan, "_LISTS", ((math.inf, trials),))
    run = place.train(tmp_path, *BOTH)
    assert len(run.manifest.fine_tuning["trainings"]) == 1
    assert run.manifest.files["inference/model.bin"] == tuned.manifest.files["inference/model.bin"]


def damage(monkeypatch):
    """The scratch file of the second training is cut short while that is read."""
    batch = ScratchFile.batch

    def damaged(file, photos, views):
        if file.shape[2:] == (64, 64, 3):
            os.ftruncate(file._file.fileno(), 100)
        return batch(file, photos, views)

    monkeypatch.setattr(ScratchFile, "batch", damaged)


def no_space(monkeypatch):
    """No disk space for the scratch file of the second training."""
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if size == 64 * 64 * 3 * 2 * 49:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)


@pytest.mark.parametrize(
    "fault",
    [
        StoppedAfter(f"fine-tuning epoch 2/{EPOCHS - 1}"),
        pytest.param(StoppedAfter("fine-tuning: kept"), marks=pytest.mark.slow),
        pytest.param(damage, marks=pytest.mark.slow),
        pytest.param(no_space, marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_the_second_training_costs_no_bit(place, several, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(plan, "_LISTS", ((math.inf, SEVERAL),))
    with monkeypatch.context() as patch:
        if isinstance(fault, StoppedAfter):
            observer: Silent = fault
        else:
            observer = Silent()
            fault(patch)
        with pytest.raises((Interrupted, StorageError)):
            place.train(tmp_path, *BOTH, observer=observer)
    folder = tmp_path / "runs" / "photos-1"
    observer = Silent()
    again = command_train.resume(folder, load_config(folder / "config.yaml"), observer)
    assert f"fine-tuning: resuming after epoch {EPOCHS}" in observer.notes
    for name in ("inference/model.bin", "predictions.csv", "flipped.csv"):
        assert again.manifest.files[name] == several.manifest.files[name], name
    assert without_seconds(rows(again, "tuning.csv")) == without_seconds(rows(several, "tuning.csv"))


def test_the_way_of_a_gpu(place, tmp_path, monkeypatch):
    """The same code as on a GPU, whose memory does not hold a batch; TensorFlow runs it on the CPU."""
    import tensorflow as tf

    keras = import_keras()
    step = keras.Model.train_on_batch

    def limited(model, photos, *arguments):
        if len(photos) > 5:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return step(model, photos, *arguments)

    monkeypatch.setattr(keras.Model, "train_on_batch", limited)
    monkeypatch.setattr(runtimes, "choose_device", lambda _wanted: "gpu")
    monkeypatch.setattr(runtimes, "training_policy", lambda *_: "mixed_bfloat16")
    observer = Silent()
    run = place.train(tmp_path, "fine_tuning.epochs=3", observer=observer)
    (training,) = run.manifest.fine_tuning["trainings"]
    assert {key: training[key] for key in ("storage", "views", "scratch_bytes", "batch_size", "policy")} == {
        "storage": "none", "views": 3, "scratch_bytes": 0, "batch_size": 4, "policy": "mixed_bfloat16",
    }  # fmt: skip
    assert any("going on with batches of 4" in warning for warning in observer.warnings)
    assert not any("scratch_gb" in warning for warning in observer.warnings)
    assert run.manifest.parity.openvino_against_measured < 1e-4
    history = rows(run, "tuning.csv")
    assert float(history[-1]["loss"]) < float(history[0]["loss"])


def test_a_damaged_checkpoint_is_passed_over_and_a_foreign_one_refused(place, tuned, tmp_path):
    with pytest.raises(Interrupted):
        place.train(tmp_path, observer=StoppedAfter("fine-tuning epoch 3/"))
    folder = tmp_path / "runs" / "photos-1"
    newest = folder / "checkpoints" / "tuning-0" / "epoch-0003"
    data = bytearray((newest / "arrays.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "arrays.npz").write_bytes(data)
    observer = Silent()
    again = command_train.resume(folder, load_config(folder / "config.yaml"), observer)
    assert "fine-tuning: resuming after epoch 2" in observer.notes
    assert any("epoch-0003 is damaged" in warning for warning in observer.warnings)
    assert again.manifest.files["inference/model.bin"] == tuned.manifest.files["inference/model.bin"]
    with pytest.raises(Interrupted):
        place.train(tmp_path, "fine_tuning.weight_decay=0.5", observer=StoppedAfter("fine-tuning epoch 3/"))
    other = tmp_path / "runs" / "photos-2"
    for path in sorted((other / "checkpoints" / "tuning-0").iterdir()):
        state = json.loads((path / "state.json").read_text())
        state["state"]["training_id"] = "0" * 64
        (path / "state.json").write_text(json.dumps(state))
        sums = [f"{files.sha256(path / name)}  {name}\n" for name in ("arrays.npz", "state.json")]
        (path / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(RunError, match="belongs to another training"):
        command_train.resume(other, load_config(other / "config.yaml"), Silent())


def test_the_frozen_model_is_kept_when_nothing_is_gained(place, frozen, tmp_path):
    run = place.train(tmp_path, "fine_tuning.learning_rate=1e-9", "fine_tuning.epochs=1")
    facts = run.manifest.fine_tuning
    assert facts["kept"] == "frozen"
    assert facts["compared"]["test"]["only_kept_right"] == facts["compared"]["test"]["only_frozen_right"] == 0
    assert rows(run, "flipped.csv") == []
    assert run.manifest.backbone == frozen.manifest.backbone
    for name in ("inference/model.bin", "predictions.csv"):
        assert run.manifest.files[name] == frozen.manifest.files[name]


@pytest.mark.parametrize("rates", [pytest.param((1e30,), marks=pytest.mark.slow), (1e30, 0.02)])
def test_a_training_that_diverges_loses_nothing(place, frozen, tmp_path, monkeypatch, capsys, rates):
    trials = tuple(Trial("last_stage", rate, 2) for rate in rates)
    monkeypatch.setattr(plan, "_LISTS", ((math.inf, trials),))
    observer = Silent()
    run = place.train(tmp_path, *BOTH, observer=observer)
    facts = run.manifest.fine_tuning
    assert [each["diverged"] for each in facts["trainings"]] == [rate > 1 for rate in rates]
    assert any("diverged" in warning and "smaller" in warning for warning in observer.warnings)
    assert len(facts["candidates"]) == 1 + 5 * (len(rates) - 1)
    assert ("tuning.csv" in run.manifest.files) == (len(rates) > 1)
    if len(rates) == 1:
        assert facts["kept"] == "frozen"
        assert run.manifest.files["inference/model.bin"] == frozen.manifest.files["inference/model.bin"]
    section = tuning.section(run)
    assert section["problem"] == ""
    assert [each["diverged"] for each in section["trainings"]] == [rate > 1 for rate in rates]
    train_command._print_result(Console(), run)
    assert "the training from upper_conv at 1e+30 diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides", [("fine_tuning.scratch_gb=0",), ("fine_tuning.unfreeze=all", "fine_tuning.batch_size=8")]
)
def test_other_ways_to_the_activations_and_other_cuts(place, tmp_path, overrides):
    observer = Silent()
    run = place.train(tmp_path, *overrides, "fine_tuning.epochs=2", observer=observer)
    (training,) = run.manifest.fine_tuning["trainings"]
    if "scratch_gb" in overrides[0]:
        assert training["storage"] == "recomputed"
        assert any("do not fit in fine_tuning.scratch_gb" in warning for warning in observer.warnings)
    else:
        assert (training["storage"], training["activations"]) == ("uint8", [64, 64, 3])


def test_fewer_views_are_stored_when_not_all_fit(place, tmp_path):
    observer = Silent()
    one_view = 16 * 16 * 12 * (2 * 49 + 4 * 30) / 1e9
    run = place.train(tmp_path, f"fine_tuning.scratch_gb={1.1 * one_view}", "fine_tuning.epochs=1", observer=observer)
    assert run.manifest.fine_tuning["trainings"][0]["views"] == 1
    assert any("1 view of 2 fit" in warning for warning in observer.warnings)
    assert run.manifest.views.per_photo == 2


def test_a_tuned_run_is_a_backbone_to_start_from(place, tuned, tmp_path):
    start = f"model.start_from={tuned.folder}"
    run = place.train(tmp_path, "fine_tuning=null", start)
    assert run.manifest.backbone.fingerprint == tuned.manifest.backbone.fingerprint
    assert run.manifest.backbone.original == tuned.manifest.backbone.original
    assert run.manifest.views.computed == 0
    assert run.manifest.metrics["test"].accuracy >= tuned.manifest.metrics["test"].accuracy - 0.1
    further = place.train(tmp_path, start, "fine_tuning.epochs=1")
    assert further.manifest.backbone.original == tuned.manifest.backbone.original


def test_a_start_whose_model_is_another_is_refused(place, tuned, frozen, tmp_path):
    forged = tmp_path / "forged"
    files.make_folder(forged)
    for name in ("model.keras", "split.csv"):
        (forged / name).write_bytes(frozen.file(name).read_bytes())
    sums = {name: files.sha256(forged / name) for name in ("model.keras", "split.csv")}
    files.write_json(forged / manifest.FILE, dataclasses.replace(tuned.manifest, files=sums).to_json())
    with pytest.raises(RunError, match="does not hold the backbone"):
        place.train(tmp_path, f"model.start_from={forged}")


def test_a_wrong_layer_stops_before_anything_exists(place, tmp_path):
    with pytest.raises(ConfigError, match="no layer 'uper_conv'") as caught:
        place.train(tmp_path, "fine_tuning.unfreeze=uper_conv")
    assert "upper_conv" in caught.value.remedy
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_a_disk_without_room_stops_before_anything_exists(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _folder: usage._replace(free=1_600_000))
    with pytest.raises(StorageError, match=r"needs 3\.9 MB of disk space, and 1\.6 MB are free") as caught:
        place.train(tmp_path, "fine_tuning.unfreeze=all", "augmentation.views=4")
    assert "fine_tuning.scratch_gb" in caught.value.remedy
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space on a disk")
def test_a_disk_that_fills_up_stops_the_stage_and_resume_goes_on(place, tuned, tmp_path, monkeypatch):
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if size == 16 * 16 * 12 * 2 * 2 * 49:  # the activations of the training photos, and nothing else
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match="activations: No space left"):
            place.train(tmp_path)
    folder = tmp_path / "runs" / "photos-1"
    again = command_train.resume(folder, load_config(folder / "config.yaml"), Silent())
    assert again.manifest.files["inference/model.bin"] == tuned.manifest.files["inference/model.bin"]


def test_it_works_with_a_head_of_adam(place, tmp_path):
    run = place.train(tmp_path, "training.solver=adam", "training.epochs=3", "fine_tuning.epochs=2")
    assert {"history.csv", "tuning.csv"} <= set(run.manifest.files)


def test_a_plan_tells_stages_and_disk_and_leaves_nothing(place, tmp_path):
    overrides = ("augmentation.views=3", f"runtime.cache_dir={tmp_path / 'cache'}", "fine_tuning.epochs=4")
    found = budget.budget(place.config(tmp_path, *overrides), Silent())
    rows = {row.stage.split(",")[0]: row for row in found.rows}
    assert list(rows) == ["features", "head", "activations", "fine-tuning", "head again", "tuned features", "saving"]
    views = 49 * 3 + 30 + 25
    assert (rows["features"].views, rows["features"].disk) == (views, 4 * 2 * 2 * views)
    assert (rows["activations"].views, rows["activations"].disk) == (49 * 3 + 30, 16 * 16 * 12 * (2 * 49 * 3 + 4 * 30))
    assert rows["fine-tuning"].views == 4 * 49
    assert all(rows[stage].seconds > 0 for stage in ("features", "activations", "fine-tuning", "tuned features"))
    assert found.seconds < 60
    assert not (tmp_path / "runs").exists()
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"digests.sqlite", ".lock"}


def test_a_plan_without_fine_tuning_has_the_features_alone(place, frozen, tmp_path):
    found = budget.budget(place.config(tmp_path, "fine_tuning=null"), Silent())
    assert [row.stage for row in found.rows] == ["features", "head", "saving"]
    assert found.rows[0].views == 0  # all in the cache


def test_inspect_shows_where_the_gradient_stops(place, tuned, frozen):
    from finetune_cli.cli.inspect import _inspected
    from finetune_cli.inspection import graph

    model, *_rest = _inspected(tuned.folder, Silent())
    shown = {node.name.rpartition("/")[2]: node for node in graph.inspect(model).nodes}
    assert not shown["lower_conv"].gradient
    assert shown["upper_conv"].trained == 12 * 12 * 9 + 12
    assert shown["upper_bn"].trained == 24
    assert shown["lower_conv"].activations == 16 * 16 * 12 * 4
    model, *_rest = _inspected(frozen.folder, Silent())
    assert graph.inspect(model).gradient_stops == ("logits",)


def test_a_frozen_run_estimates_what_fine_tuning_would_take(place, tuned, tmp_path):
    own_cache = f"runtime.cache_dir={tmp_path / 'cache'}"  # a cached pass says nothing about seconds
    assert place.train(tmp_path, "fine_tuning=null", own_cache).manifest.fine_tuning_seconds > 0
    assert tuned.manifest.fine_tuning_seconds is None


def test_the_estimate_is_what_the_passes_and_the_epochs_take(place, frozen, tmp_path):
    """49 photos: activations and head again, and the tuned features, of 2 views each; 26 epochs of the upper part."""
    loaded = place.config(tmp_path, "fine_tuning=null")
    backbone = build.build(wanted_backbone(loaded))
    upper = 8 * 8 * (3 * 3 * 12 * 12 + 12 * 2)
    share = upper / (upper + 16 * 16 * 5 * 5 * 3 * 12)
    assert budget.rough_seconds(backbone, loaded, plan.Counts(49, 2, 30), 0.01) == pytest.approx(
        49 * 0.01 * (4 + 26 * 3 * share)
    )


def test_the_report_has_a_section_on_it(tuned, frozen, tmp_path):
    def page(run: Run) -> str:
        result = command_evaluate.evaluate(run, Silent(), target=command_evaluate.Target(tmp_path.name))
        return command_report.report(result.judged, tmp_path / run.folder.name, Silent()).read_text("utf-8")

    (tmp_path / tuned.folder.name).mkdir()
    text = page(tuned)
    facts = tuned.manifest.fine_tuning
    assert f"Kept: {facts['kept']}." in text
    assert "Everything from upper_conv on learned" in text
    for each in facts["candidates"]:
        assert f"<td>{each['log_loss']:.4f}</td>" in text
    won = [row for row in rows(tuned, "flipped.csv") if row["split"] == "test" and row["kept"] == row["true"]]
    assert won
    assert f"only the kept model gets right: {len(won)}" in text
    assert "Fine-tuning</h3>" not in page(frozen)


def test_the_report_knows_photos_whose_names_look_like_formulas(place, tmp_path):
    """Their cells in flipped.csv begin with an apostrophe."""
    photos = shutil.copytree(place.photos, tmp_path / "drawn")
    for split in ("train", "val", "test"):
        (photos / split / "ant").rename(photos / split / "=ant")
    settings = [f"data.{split}={photos / split}" for split in ("train", "val", "test")]
    run = place.train(tmp_path, *settings)
    assert "'=ant/" in run.file("flipped.csv").read_text("utf-8")
    found = tuning.section(run)
    assert found["problem"] == ""
    labels = {figure.lines[0] for figure in (*found["won"], *found["lost"])}
    assert "labelled =ant" in labels


def test_the_screen_shows_what_was_tried_and_what_to_try(tuned, frozen, capsys):
    train_command._print_result(Console(), tuned)
    text = capsys.readouterr().out
    (kept,) = [line for line in text.splitlines() if line.startswith("kept")]
    assert tuned.manifest.fine_tuning["kept"] in kept
    assert "upper_conv" in kept
    assert "see flipped.csv" in text
    assert "fine_tuning=auto" not in text
    train_command._print_result(Console(), frozen)
    text = capsys.readouterr().out
    assert f"finetune train {frozen.folder / 'config.yaml'} fine_tuning=auto" in text.replace("\n", "")
    best = dataclasses.replace(frozen.manifest.metrics["val"], accuracy=1.0)
    perfect = dataclasses.replace(frozen.manifest, metrics={**frozen.manifest.metrics, "val": best})
    train_command._print_result(Console(), Run(frozen.folder, perfect))
    assert "fine_tuning=auto" not in capsys.readouterr().out


def test_a_resumed_run_is_not_planned():
    answer = CliRunner().invoke(app, ["train", "--resume", "--dry-run"])
    assert answer.exit_code == 2
    assert "--dry-run and --resume cannot be combined" in answer.output


def test_the_plan_is_a_table(place, frozen, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_LISTS", ((math.inf, SEVERAL),))
    tuning_output.planned(Console(), budget.budget(place.config(tmp_path, *BOTH), Silent()))
    text = capsys.readouterr().out
    assert f"\nfine-tuning, {EPOCHS} epochs of last_stage at 1e-09" in text
    assert f"\notherwise fine-tuning, {EPOCHS - 1} epochs of all at 0.02" in text
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith(("total", "features"))] == [
        "features", "total, at most",
    ]  # fmt: skip


@pytest.mark.parametrize("facts", [{}, {"kept": 1, "trainings": 2, "candidates": [], "compared": {}}])
def test_a_report_survives_a_manifest_that_makes_no_sense(tuned, facts):
    run = Run(tuned.folder, dataclasses.replace(tuned.manifest, fine_tuning=facts))
    found = tuning.section(run)
    assert found is not None
    assert found["problem"]
    with pytest.raises(RunError, match="does not describe its fine-tuning"):
        comparison.trained_from(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "fine-tuning epoch 3/"),
        (signal.SIGKILL, -9, "fine-tuning epoch 5/"),
        (signal.SIGTERM, 143, "head (lbfgs)"),  # so while the activations are computed
        (signal.SIGKILL, -9, "fine-tuning: kept"),
    ],
)
def test_a_killed_process_is_resumed_to_the_same_bits(place, tuned, tmp_path, number, code, line):
    values = place.config(tmp_path).dump(tmp_path)
    (tmp_path / "tuned.yaml").write_text(json.dumps(values))
    command = trainings.Command(tmp_path, "train", "tuned.yaml")
    assert command.wait_for(line)
    command.send(number)
    assert command.end().code == code
    ended = trainings.Command(tmp_path, "train", "--resume").end()
    assert ended.code == 0, ended.errors
    run = Run.load(tmp_path / "runs" / "photos-1")
    for name in ("inference/model.bin", "predictions.csv", "flipped.csv"):
        assert run.manifest.files[name] == tuned.manifest.files[name], name
    assert without_seconds(rows(run, "tuning.csv")) == without_seconds(rows(tuned, "tuning.csv"))
