"""Compares ways to fit the head on real features; prints the table of docs/training.md.

    python benchmarks/heads.py PHOTOS [splits [words]]

PHOTOS is a folder with `hymenoptera/{train,val}` and `scenes/{train,test}`. Features are float32, of the bundled
backbone, through the cache. A fifth of the training photos is held out, five times differently; every way is fitted on
the rest, stops early on the held-out ones if it stops early, and is scored on the test photos. Seconds are those of
the fit alone, without imports and features. With words, only the ways whose name holds them.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_cli.config.load import load_config
from finetune_cli.head.data import HeadData
from finetune_cli.head.keras_fit import KerasSettings, fit_epochs
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.metrics import calibration, scores
from finetune_cli.metrics.folds import group_folds, group_numbers
from finetune_cli.progress import Silent
from finetune_cli.training.fit import labels_of
from finetune_cli.training.prepare import prepare
from finetune_cli.training.requirements import check_settings

SETS = {"hymenoptera": ("train", "val"), "scenes": ("train", "test")}


@dataclass(frozen=True)
class Photos:
    """Features (photos, views, D), labels and groups of the training photos; features (n, D) and labels of the test."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray


Fit = Callable[[Photos, np.ndarray, int, int], Head]  # photos, held out, classes, seed


def load(folder: Path, name: str) -> Photos:
    train, test = (folder / name / part for part in SETS[name])
    overrides = [
        f"data.train={train}",
        f"data.val={test}",
        "data.on_bad_image=skip",
        "model.backbone=efficientnet_lite0",
        "runtime.feature_precision=float32",
        "augmentation.views=4",
        "augmentation.horizontal_flip=true",
        "augmentation.width_shift_range=0.2",
        "augmentation.height_shift_range=0.2",
    ]
    parts = prepare(check_settings(load_config(None, overrides)), Silent()).parts
    return Photos(
        np.array(parts["train"].array),
        labels_of(parts["train"].samples),
        group_numbers((sample.group, sample.digest) for sample in parts["train"].samples),
        np.array(parts["val"].array[:, 0]),
        labels_of(parts["val"].samples),
    )


def keras(optimizer: str, l2: float | str = 0.0, **settings: float | None) -> Fit:
    def fit(photos: Photos, held_out: np.ndarray, classes: int, seed: int) -> Head:
        kept = ~held_out
        penalty = chosen(photos, kept, classes) if l2 == "auto" else l2
        train = HeadData.of(photos.features[kept], photos.labels[kept], classes)
        val = HeadData.of(photos.features[held_out, 0], photos.labels[held_out], classes)
        states = fit_epochs(train, val, KerasSettings(optimizer, l2=penalty, seed=seed, **settings))
        *_, state = states
        return state.best

    return fit


def lbfgs(l2: float | str = "auto", smoothing: float = 0.0) -> Fit:
    def fit(photos: Photos, held_out: np.ndarray, classes: int, seed: int) -> Head:  # noqa: ARG001
        kept = ~held_out
        data = HeadData.of(photos.features[kept], photos.labels[kept], classes).rows()
        penalty = chosen(photos, kept, classes, smoothing) if l2 == "auto" else l2
        return fit_lbfgs(data, penalty, smoothing)

    return fit


def chosen(photos: Photos, kept: np.ndarray, classes: int, smoothing: float = 0.0) -> float:
    data = HeadData.of(photos.features[kept], photos.labels[kept], classes, groups=photos.groups[kept])
    return choose_l2(data.rows(), L2Search(smoothing))[0]


def ways() -> Iterator[tuple[str, Fit]]:
    yield "lbfgs, l2 auto", lbfgs("auto")
    for value in (1.0, 0.1, 0.01, 0.001, 0.0001):
        yield f"lbfgs, l2 {value:g}", lbfgs(value)
    yield "lbfgs, l2 auto, label smoothing 0.1", lbfgs("auto", 0.1)
    for rate in (0.0003, 0.001, 0.003, 0.01):
        for epochs in (20, 30):
            yield f"adam {rate:g}, {epochs} epochs", keras("adam", learning_rate=rate, epochs=epochs)
    for rate in (0.003, 0.01, 0.03, 0.1):
        yield f"sgd {rate:g}, 30 epochs", keras("sgd", learning_rate=rate, epochs=30)
    yield "adam 0.001, 100 epochs", keras("adam", learning_rate=0.001, epochs=100)
    yield "adam 0.001, 30 epochs, l2 auto", keras("adam", "auto", learning_rate=0.001, epochs=30)
    yield "adam 0.003, 30 epochs, l2 auto", keras("adam", "auto", learning_rate=0.003, epochs=30)
    yield "adam 0.003, 30 epochs, dropout 0.3", keras("adam", learning_rate=0.003, epochs=30, dropout=0.3)
    yield "adam 0.003, 30 epochs, patience 10", keras("adam", learning_rate=0.003, epochs=30, patience=10)


def main() -> None:
    folder, seeds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    words = " ".join(sys.argv[3:])
    sets = {name: load(folder, name) for name in SETS}
    print("| way | views | " + " | ".join(f"{name}: accuracy | log loss | seconds" for name in sets) + " |")
    print("| --- | ---: |" + " ---: |" * 3 * len(sets))
    keras("adam", epochs=1)(sets["scenes"], np.arange(len(sets["scenes"].labels)) % 5 == 0, 6, 0)  # Keras's first steps
    for views in (1, 4):
        for name, fit in ((name, fit) for name, fit in ways() if words in name):
            cells = [cell for photos in sets.values() for cell in measured(fit, photos, views, seeds)]
            print(f"| {name} | {views} | " + " | ".join(cells) + " |", flush=True)


def measured(fit: Fit, photos: Photos, views: int, seeds: int) -> tuple[str, str, str]:
    """Mean accuracy with the lowest and the highest, mean log loss, median seconds."""
    seen = Photos(photos.features[:, :views], photos.labels, photos.groups, photos.test_features, photos.test_labels)
    classes = int(photos.labels.max()) + 1
    names = [str(i) for i in range(classes)]
    accuracies, losses, seconds = [], [], []
    for seed in range(seeds):
        held_out = group_folds(photos.labels, photos.groups, 5, seed) == 0
        started = time.perf_counter()
        head = fit(seen, held_out, classes, seed)
        seconds.append(time.perf_counter() - started)
        temperature = calibration.fit_temperature(head.logits(photos.features[held_out, 0]), photos.labels[held_out])
        probabilities = calibration.softmax(head.logits(photos.test_features), temperature)
        found = scores.evaluate(probabilities, photos.test_labels, names)
        accuracies.append(found.accuracy.value)
        losses.append(found.log_loss)
    spread = f"{np.mean(accuracies):.1%} ({min(accuracies):.1%} to {max(accuracies):.1%})"
    return spread, f"{np.mean(losses):.3f}", f"{np.median(seconds):.2f}"


if __name__ == "__main__":
    main()
