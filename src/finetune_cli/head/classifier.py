"""A head before and after its fit: its initial weights, its growth to new classes, and the finished model.

`build` puts a head on a backbone: raw pixels (N, H, W, 3) in, probabilities (N, C) out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import signals
from finetune_cli.errors import RunError
from finetune_cli.head.lbfgs import Head
from finetune_cli.keras_setup import import_keras
from finetune_cli.untrusted.keras_archive import load_keras_file


def glorot(width: int, n_classes: int, seed: int) -> Head:
    """A head to start from: kernel uniform in +-sqrt(6 / (D + C)) (Glorot and Bengio 2010), bias zero."""
    limit = math.sqrt(6 / (width + n_classes))
    kernel = np.random.default_rng(seed).uniform(-limit, limit, (width, n_classes))
    return Head(kernel.astype(np.float32), np.zeros(n_classes, np.float32))


def grow(
    head: Head, old_classes: Sequence[str], new_classes: Sequence[str], seed: int
) -> tuple[Head, tuple[str, ...], tuple[str, ...]]:
    """`head` for `new_classes`, the names of those that were kept, and of the new ones; other columns are dropped.

    Kept columns are copied bit for bit. A new one is the mean of the kept ones plus a Glorot draw: adding the same
    vector to all columns of a softmax head changes no probability, so a neutral start, from which a new class is
    predicted neither always nor never, exists only relative to the kept columns.
    """
    kept = tuple(name for name in new_classes if name in old_classes)
    grown = glorot(len(head.kernel), len(new_classes), seed)
    kernel, bias = grown.kernel.copy(), grown.bias.copy()
    columns = [list(old_classes).index(name) for name in kept]
    if kept:
        kernel += head.kernel[:, columns].mean(axis=1, keepdims=True)
        bias += head.bias[columns].mean()
    targets = [list(new_classes).index(name) for name in kept]
    kernel[:, targets], bias[targets] = head.kernel[:, columns], head.bias[columns]
    return Head(kernel, bias), kept, tuple(name for name in new_classes if name not in old_classes)


@signals.deferred()
def build(backbone_model: Any, head: Head, temperature: float, classes: Sequence[str]) -> Any:
    """A `keras.Model` from raw pixels 0..255 RGB (N, H, W, 3) to probabilities (N, C) of `classes`.

    The backbone is called with ``training=False``; after it come Dense `logits`, Rescaling `temperature` (1/T) and
    Softmax `probabilities`, in float32: stock layers only, so the file loads without this package. The input is called
    `image`, as in every export; `pixels` in runs of earlier versions.
    """
    if head.kernel.shape != (backbone_model.output_shape[-1], len(classes)):
        raise ValueError(f"a head of shape {head.kernel.shape} does not fit {len(classes)} classes on this backbone")
    keras = import_keras()
    image = keras.Input(backbone_model.input_shape[1:], name="image")
    dense = keras.layers.Dense(len(classes), name="logits", dtype="float32")
    values = dense(backbone_model(image, training=False))
    values = keras.layers.Rescaling(1 / temperature, name="temperature", dtype="float32")(values)
    values = keras.layers.Softmax(name="probabilities", dtype="float32")(values)
    dense.set_weights([head.kernel, head.bias])
    model = keras.Model(image, values, name="classifier")
    model.trainable = False
    return model


def read(path: Path) -> Head:
    """The head inside a `model.keras` that `build` made. Raises `WeightsError` or `RunError` for any other file."""
    model = load_keras_file(path)
    try:
        kernel, bias = model.get_layer("logits").get_weights()
    except ValueError as exc:
        raise RunError(f"{path} has no head to start from", "give a run that `finetune train` made") from exc
    return Head(kernel, bias)
