"""Features and labels to fit a head on."""

import numpy as np

from finetune_cli.head.data import HeadData


def blobs(seed=0, photos=200, width=30, classes=3, spread=0.5, dtype=np.float32):
    """Overlapping clouds off the origin, as pooled activations are: features, labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(photos) % classes
    centres = rng.normal(0, spread, (classes, width))
    return (2 + centres[labels] + rng.normal(0, 1, (photos, width))).astype(dtype), labels


def many_classes(classes=60, each=8, width=40):
    x, y = blobs(photos=classes * each, width=width, classes=classes, spread=0.6)
    return HeadData.of(x, y, classes)
