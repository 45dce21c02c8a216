"""The commands with `--engine ray`: the same files, rows and exit codes as with threads, from real processes."""

import contextlib
import csv
import importlib.util
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import runs_fixture
import trainings
from PIL import Image
from trainings import Command, contents

pytestmark = [
    pytest.mark.machines,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra test-ray is not installed"),
]
RAY = ("--engine", "ray")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Photos, of which one cannot be decoded, a backbone in the cache, and the run of a training with threads."""
    folder = tmp_path_factory.mktemp("shop")
    runs_fixture.draw_photos(folder / "photos", ("ant", "bee", "wasp"))
    broken = min((folder / "photos" / "train" / "bee").iterdir())
    broken.write_bytes(broken.read_bytes()[:-200])
    trainings.build_backbone(folder / "tiny.keras")
    ended = train(folder, "local")
    assert ended.code == 0, ended.errors
    return folder


def train(folder, name, *options):
    settings = ["data.train=photos/train", "data.val=photos/val", "data.on_bad_image=skip", "model.backbone=tiny.keras"]
    settings += [f"image.size={runs_fixture.SIZE}", "augmentation.horizontal_flip=true", "augmentation.views=2"]
    settings += ["runtime.workers=2", f"runtime.cache_dir={name}-cache"]
    return Command(folder, "train", *settings, "--name", name, *options).end()


def features(cache):
    """Key -> value of a feature cache."""
    with contextlib.closing(sqlite3.connect(cache / "features.sqlite")) as connection:
        return dict(connection.execute("SELECT key, value FROM features"))


@pytest.fixture(scope="module")
def on_ray(shop):
    ended = train(shop, "ray", *RAY)
    assert ended.code == 0, ended.errors
    return ended


def test_a_training_ends_with_the_same_files(shop, on_ray, record_property):
    one, two = (contents(shop / "runs" / name) for name in ("local", "ray"))
    different = {name for name in one if one[name] != two[name]}
    assert different == {"config.yaml"}, "its section runtime says which engine it was"
    texts = [(shop / "runs" / name / "config.yaml").read_text().splitlines() for name in ("local", "ray")]
    changed = {line.strip().split(":")[0] for line in set(texts[0]) ^ set(texts[1])}
    assert changed == {"engine", "cache_dir"}
    assert features(shop / "local-cache") == features(shop / "ray-cache")
    manifests = [json.loads((shop / "runs" / name / "run.json").read_text()) for name in ("local", "ray")]
    for key in ("bad_photos", "views", "metrics", "parity", "photos"):
        assert manifests[0][key] == manifests[1][key], key
    assert len(manifests[1]["bad_photos"]) == 1
    assert "retries" not in manifests[1]
    record_property("tries", 1)


def test_the_terminal_shows_our_lines_alone(on_ray):
    assert "ray::" not in on_ray.errors
    assert "raylet" not in on_ray.errors.lower()
    assert "Ray" not in on_ray.errors


def test_predictions_are_the_same_rows(shop, record_property):
    for name, options in (("local", ()), ("ray", RAY)):
        ended = Command(shop, "predict", "photos", "--run", "local", "--output", f"{name}.csv", *options).end()
        assert ended.code == 3, ended.errors
        assert "1 of " in ended.errors
        assert "could not be read; their rows say why" in ended.errors
    assert (shop / "local.csv").read_bytes() == (shop / "ray.csv").read_bytes()
    record_property("tries", 1)


def test_an_evaluation_is_the_same(shop):
    for name, options in (("a", ()), ("b", RAY)):
        ended = Command(shop, "evaluate", "photos/val", "--run", "local", "--name", name, "--no-report", *options).end()
        assert ended.code == 0, ended.errors
    for file in ("predictions.csv", "metrics.json", "per_class.csv"):
        first, second = ((shop / "runs" / "local" / "evaluations" / name / file).read_bytes() for name in ("a", "b"))
        assert first == second


def test_doctor_finds_the_same(shop):
    for name, options in (("local", ()), ("ray", RAY)):
        settings = ["data.train=photos/train", "data.val=photos/val", "model.backbone=tiny.keras"]
        settings += [f"image.size={runs_fixture.SIZE}", f"runtime.cache_dir={name}-doctor", "runtime.workers=2"]
        (shop / "config.yaml").write_text("data: {train: photos/train}\n")
        ended = Command(shop, "doctor", "config.yaml", *settings, "--output", f"{name}-found", *options).end()
        assert ended.code == 0, ended.errors
    assert (shop / "local-found" / "fixes.csv").read_bytes() == (shop / "ray-found" / "fixes.csv").read_bytes()


@pytest.fixture(scope="module")
def many(shop):
    """3,000 photos, so that there is something to interrupt."""
    rng = np.random.default_rng(0)
    for i in range(3000):
        path = shop / "many" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return shop


def begin(folder, name):
    settings = ["data.train=many", "data.near_duplicates=ignore", "model.backbone=tiny.keras", "augmentation=null"]
    settings += [f"image.size={runs_fixture.SIZE}", "runtime.workers=2", f"runtime.cache_dir={name}-cache"]
    return Command(folder, "train", *settings, "--name", name, *RAY)


def wait_for_rows(cache, least=1):
    """Until the cache has rows, which are stored a thousand at a time."""
    for _ in range(1200):
        with contextlib.suppress(sqlite3.OperationalError):
            if (cache / "features.sqlite").exists() and len(features(cache)) >= least:
                return
        time.sleep(0.1)
    raise AssertionError("no features were stored")


def test_ctrl_c_ends_with_one_line_and_what_was_computed_is_kept(many):
    command = begin(many, "stopped")
    assert command.wait_for("2 workers on 1 machine")
    command.send(signal.SIGINT)
    ended = command.end()
    assert ended.code == 130, ended.errors
    assert "Traceback" not in ended.errors
    assert ended.errors.count("error: interrupted") == 1
    assert "the features so far are in the cache; run the same command again to continue" in ended.errors
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"finetune-ray-*/ray/session_*_{command.process.pid}"))


def test_a_killed_driver_computes_only_what_is_missing(many, record_property):
    command = begin(many, "killed")
    wait_for_rows(many / "killed-cache")
    command.send(signal.SIGKILL)
    assert command.end().code == -signal.SIGKILL
    kept = len(features(many / "killed-cache"))
    assert 0 < kept < 3000
    ended = begin(many, "killed").end()
    assert ended.code == 0, ended.errors
    views = json.loads((many / "runs" / "killed" / "run.json").read_text())["views"]
    assert (views["computed"], views["cached"]) == (3000 - kept, kept)
    assert len(features(many / "killed-cache")) == 3000
    record_property("tries", 1)


def test_a_killed_prediction_continues_with_the_next_partition(many, record_property):
    options = ("--run", "local", "--output", "answers/", "--format", "parquet", "--top-k", "1", *RAY)
    command = Command(many, "predict", "many", "many", "many", "many", *options)
    for _ in range(1200):
        if (many / "answers" / "_finetune" / "part-00000.json").exists():
            break
        time.sleep(0.1)
    command.send(signal.SIGKILL)
    command.end()
    assert not (many / "answers" / "_finetune" / "complete.json").exists()
    ended = Command(many, "predict", "many", "many", "many", "many", *options).end()
    assert ended.code == 0, ended.errors
    assert "10000 rows of these were there already" in ended.errors
    whole = Command(many, "predict", *["many"] * 4, "--run", "local", "--output", "whole.csv", "--top-k", "1").end()
    assert whole.code == 0, whole.errors
    from pyarrow import parquet

    rows = [
        row for path in sorted((many / "answers").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()
    ]
    with (many / "whole.csv").open() as file:
        wanted = list(csv.DictReader(file))
    assert [(row["path"], row["label"], f"{row['probability']:.6g}") for row in rows] == [
        (row["path"], row["label"], row["probability"]) for row in wanted
    ]
    record_property("tries", 1)


def test_no_cluster_at_an_address_is_an_error_in_two_lines(shop):
    ended = Command(
        shop, "predict", "photos", "--run", "local", *RAY, "--ray-address", "auto", variables={"RAY_ADDRESS": ""}
    ).end()
    assert ended.code == 1
    assert "error: there is no Ray cluster at auto" in ended.errors
    assert "try: start one with: ray start --head" in ended.errors
    assert "Traceback" not in ended.errors
