"""Backbones for tests."""

from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import keras_setup
from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.backbones.source import Wanted


def built(
    name: str | Path, weights: str | Path | None, size: int, seed: int = 0, weights_sha256: str | None = None
) -> Backbone:
    """The backbone that `Wanted` describes with these arguments."""
    return build.build(Wanted(str(name), None if weights is None else str(weights), size, seed, weights_sha256))


def answers(model: Any, photos: Any) -> Any:
    """What a Keras model gives for `photos`, operation by operation: `predict` would build a graph first."""
    return keras_setup.import_keras().tree.map_structure(np.asarray, model(photos, training=False))
