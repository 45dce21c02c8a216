"""What a photo costs in an epoch of fine-tuning: the last stage from its activations, and through the whole network.

    python benchmarks/finetuning_epoch.py [BACKBONE] [PHOTOS]

Core-milliseconds (of all threads together, which other programs disturb less than seconds) and milliseconds a photo, of
the second epoch, on drawn photos; the weights of a backbone that is not bundled are random. The whole network is that
of a script: everything above the same cut unfrozen but BatchNorm, `train_on_batch`, AdamW, float32.
"""

import os
import sys
import time

import numpy as np

from finetune_cli.backbones import build
from finetune_cli.backbones.source import Wanted
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.keras_setup import import_keras
from finetune_cli.training.tuning import inputs
from finetune_cli.training.tuning.cuts import cut
from finetune_cli.training.tuning.upper import Labelled, UpperSettings

CLASSES, BATCH = 10, 32


class Held:
    """Activations ``(photos, 1, H, W, C)`` in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def batch(self, photos, views):
        return self.array[photos, views]


def per_photo(epoch, photos: int) -> str:
    epoch()  # the first one builds the graph
    cpu, wall = sum(os.times()[:2]), time.perf_counter()
    epoch()
    cpu, wall = sum(os.times()[:2]) - cpu, time.perf_counter() - wall
    return f"{1000 * cpu / photos:.1f} core-milliseconds, {1000 * wall / photos:.1f} milliseconds"


def main(name: str, photos: int) -> None:
    keras = import_keras()
    rng = np.random.default_rng(0)
    weights = "imagenet" if name == "efficientnet_lite0" else None
    backbone = build.build(Wanted(name, weights, 224, 0))
    part = cut(backbone.model, "last_stage")
    pixels = rng.integers(0, 256, (photos, 224, 224, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, photos)
    head = Head(np.zeros((backbone.width, CLASSES), np.float32), np.zeros(CLASSES, np.float32))
    lower = runtimes.OpenVinoRuntime(runtimes.convert(part.lower), "float32", 2)
    activations = np.concatenate([lower.infer(row[None].astype(np.uint8)) for row in pixels])
    train = Labelled(Held(activations[:, None]), labels, np.ones(photos))
    one = Labelled(Held(activations[:1, None]), labels[:1], np.ones(1))  # a validation that takes no time
    for policy in ("float32", "mixed_bfloat16"):
        upper = inputs.upper(part, head, "cpu")
        states = upper.train(train, one, UpperSettings(2, BATCH, 1e-5, 0.01, 0.0, 0, policy))
        print(f"{name}, from {part.above} on, {policy}: {per_photo(lambda states=states: next(states), photos)}")
    image = keras.Input((224, 224, 3))
    logits = keras.layers.Dense(CLASSES)(part.whole(image, training=False))
    for layer in part.whole.layers:
        layer.trainable = layer in part.upper.layers and not isinstance(layer, keras.layers.BatchNormalization)
    script = keras.Model(image, logits)
    script.compile(keras.optimizers.AdamW(1e-5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def epoch() -> None:
        for start in range(0, photos, BATCH):
            script.train_on_batch(pixels[start : start + BATCH], labels[start : start + BATCH])

    print(f"{name}, through the whole network: {per_photo(epoch, photos)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "efficientnet_lite0", int(sys.argv[2]) if len(sys.argv) > 2 else 96)
