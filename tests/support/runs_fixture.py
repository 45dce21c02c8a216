"""A finished run that takes seconds to make: real photos of colours, a tiny real network, every file that a run has.

Made here, without the package: the photos, the network with its head and temperature layer by layer, history.csv, and
the facts in run.json. Made by the package, but not by `train`: the features and their cache, the fit of the head, the
predictions and metrics, the saved models and their comparison, config.yaml, environment.json, split.csv, and run.json
with its hashes. A test that reads this run proves nothing about how these are made.

Two of the photos are odd on purpose: one is labelled wrongly, one lies in train and in test.
"""

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from finetune_cli.cache.features import FeatureStore
from finetune_cli.config.load import load_config
from finetune_cli.engines.engine import Local
from finetune_cli.fields import Fields
from finetune_cli.head import lbfgs
from finetune_cli.head.data import HeadData
from finetune_cli.inference import runtimes
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics.calibration import softmax
from finetune_cli.metrics.scores import evaluate
from finetune_cli.photos.decode import ImageSettings, decode
from finetune_cli.photos.scan import Sample
from finetune_cli.runs import environment, run
from finetune_cli.runs.manifest import Backbone, Manifest, Solver, SplitMetrics, Views
from finetune_cli.runs.run import Run, SplitRow
from finetune_cli.tables import write_csv
from finetune_cli.training import extract, outputs
from finetune_cli.training import settings as training_settings

SIZE = 64
COUNTS = {"train": 16, "val": 10, "test": 8}
TEMPERATURE = 1.5
COLOURS = np.array([(200, 90, 60), (90, 180, 70), (80, 90, 190), (180, 180, 80), (70, 170, 180), (190, 80, 180)])


@dataclass(frozen=True)
class TinyRun:
    """`photos` holds train, val and test folders; `wrong` is labelled wrongly, `twin` lies in train and test."""

    run: Run
    photos: Path
    cache: Path
    wrong: str
    twin: str


def paint(seed: int, label: int) -> Image.Image:
    """A noisy patch of a class's colour on grey, 90 x 80 pixels; the noise makes some photos hard."""
    rng = np.random.default_rng(seed)
    pixels = np.full((80, 90, 3), 128.0)
    top, left = rng.integers(0, 40), rng.integers(0, 50)
    strength = rng.uniform(0.2, 1.4)
    pixels[top : top + 40, left : left + 40] += strength * (COLOURS[label] - 128.0)
    pixels += rng.normal(0, 25, pixels.shape) + rng.normal(0, 12, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_photos(folder: Path, classes: tuple[str, ...]) -> tuple[str, str]:
    """Write the photos; returns the names, relative to train/, of the wrong one and of the twin."""
    for number, split in enumerate(COUNTS):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(COUNTS[split]):
                paint(10_000 * number + 100 * label + i, label).save(folder / split / name / f"{name}-{i:02}.png")
    wrong = folder / "train" / classes[0] / "wrong.png"
    pixels = np.full((80, 90, 3), 128, np.uint8)
    pixels[10:70, 10:80] = COLOURS[1]
    Image.fromarray(pixels).save(wrong)
    twin = folder / "train" / classes[1] / f"{classes[1]}-00.png"
    (folder / "test" / classes[1] / "twin.png").write_bytes(twin.read_bytes())
    return f"{classes[0]}/{wrong.name}", f"{classes[1]}/{twin.name}"


def samples_of(folder: Path, classes: tuple[str, ...]) -> tuple[Sample, ...]:
    return tuple(
        Sample(path, path.relative_to(folder).as_posix(), label, hashlib.sha256(path.read_bytes()).hexdigest())
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
    )


def tiny_backbone():
    keras = import_keras()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIZE, SIZE, 3), name="photo")
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    x = keras.layers.Conv2D(16, 5, strides=4, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(24, 3, strides=2, padding="same", activation="relu")(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x), name="tiny")


def with_head(backbone, head: lbfgs.Head):
    keras = import_keras()
    logits = keras.layers.Dense(len(head.bias), name="logits")
    x = keras.layers.Rescaling(1 / TEMPERATURE, name="temperature")(logits(backbone.output))
    model = keras.Model(backbone.input, keras.layers.Softmax(name="probabilities")(x))
    logits.set_weights([head.kernel, head.bias])
    return model


def build(folder: Path, classes: tuple[str, ...] = ("ant", "bee", "wasp")) -> TinyRun:
    """Draw photos in `folder`, fit the tiny network on them and write the finished run `folder/runs/tiny-1`."""
    photos, cache, home = folder / "photos", folder / "cache", folder / "runs" / "tiny-1"
    wrong, twin = draw_photos(photos, classes)
    settings = load_config(
        None,
        [
            f"data.train={photos / 'train'}",
            f"image.size={SIZE}",
            f"runtime.cache_dir={cache}",
            "augmentation.views=2",
            "augmentation.horizontal_flip=true",
            "runtime.feature_precision=float32",
        ],
    )
    home.mkdir(parents=True)
    backbone = tiny_backbone()
    splits = {split: samples_of(photos / split, classes) for split in COUNTS}
    arrays = {}
    with FeatureStore(cache) as store:
        for split, samples in splits.items():
            augmenter = training_settings.augmenter(settings) if split == "train" else None
            request = extract.FeatureRequest(training_settings.image_settings(settings), "tiny", "float32", augmenter)
            runtime = runtimes.OpenVinoRuntime(runtimes.convert(backbone), "float32", 1)
            resources = extract.Resources(store, lambda _p, runtime=runtime: runtime, cache, Local(1), 4)
            arrays[split] = extract.extract(samples, request, 24, resources, lambda _n: None).array
    data = HeadData.of(arrays["train"], np.array([s.label for s in splits["train"]]), len(classes))
    head = lbfgs.fit_lbfgs(data.rows(), 1e-4)
    model = with_head(backbone, head)
    measured = {
        split: softmax(head.logits(arrays[split][:, 0]), TEMPERATURE).astype(np.float32) for split in ("val", "test")
    }
    evaluations = {
        split: evaluate(p, np.array([s.label for s in splits[split]]), classes) for split, p in measured.items()
    }
    scored = [outputs.ScoredSplit(split, splits[split], measured[split], evaluations[split]) for split in measured]
    names = outputs.write_metrics(home, scored) + outputs.write_tables(home, classes, scored)
    pixels = np.stack([decode(s.path, ImageSettings(SIZE)) for s in splits["val"][:4]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # inside Keras
        parity = outputs.save_models(home, model, runtimes.convert(model), pixels, measured["val"][:4])
    (home / "config.yaml").write_text(yaml.safe_dump(settings.dump(home)))
    environment.write_environment(home, settings, "cpu", "float32", 1)
    write_csv(
        home / "history.csv",
        ("epoch", "loss", "accuracy", "val_loss", "val_accuracy"),
        [(i + 1, f"{1.2 * 0.8**i:.4f}", 0.6 + 0.03 * i, f"{1.1 * 0.85**i:.4f}", 0.6 + 0.02 * i) for i in range(12)],
    )
    run.write_split(
        home / "split.csv",
        [SplitRow(split, classes[s.label], s.digest, s.name) for split in COUNTS for s in splits[split]],
    )
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        classes=classes,
        image=ImageSettings(SIZE),
        backbone=Backbone(
            name="tiny", width=24, fingerprint="tiny", original="tiny", weights_sha256=None, feature_map=True
        ),
        start_from=None,
        solver=Solver("lbfgs", 1e-4),
        temperature=TEMPERATURE,
        device="cpu",
        feature_precision="float32",
        photos={split: len(samples) for split, samples in splits.items()},
        views=Views(per_photo=2, computed=0, cached=0),
        cache_bytes=0,
        bad_photos=(),
        roots={split: os.path.relpath(photos / split, home) for split in COUNTS},
        parity=parity,
        seconds={"features": 1.0},
        metrics={split: SplitMetrics.from_json(Fields(each.to_json())) for split, each in evaluations.items()},
        files={},
    )
    names += ["model.keras", "inference/model.xml", "inference/model.bin"]
    names += ["config.yaml", "environment.json", "split.csv", "history.csv"]
    return TinyRun(run.finish(home, manifest, names), photos, cache, wrong, twin)
