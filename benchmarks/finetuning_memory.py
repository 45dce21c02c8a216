"""The peak memory of fine-tuning with 30,000 photos of 8 views, whose activations and features are drawn.

    python benchmarks/finetuning_memory.py [last_stage|last_two_stages|all]

Some steps of the upper part, on a scratch file of as many views as fit in 10 GB, and the fit of the head on as many
views as it is fitted on again.
"""

import math
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from finetune_cli.backbones import build
from finetune_cli.backbones.source import Wanted
from finetune_cli.head.data import HeadData
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.training.extract import release, scratch_array
from finetune_cli.training.tuning import plan
from finetune_cli.training.tuning.activations import ScratchFile
from finetune_cli.training.tuning.cuts import cut
from finetune_cli.training.tuning.upper import Labelled, Upper, UpperSettings

PHOTOS, VIEWS, CLASSES, STEPS, LIMIT = 30_000, 8, 10, 100, 10**10


class Enough(Exception):
    """All steps were taken."""


class Drawn:
    """Activations in `file`, of which a batch is drawn and written when it is asked for."""

    def __init__(self, file: ScratchFile, rng: np.random.Generator) -> None:
        self.file, self.shape, self.rng, self.left = file, file.shape, rng, STEPS

    def batch(self, photos, views):
        if not self.left:
            raise Enough
        self.left -= 1
        for photo, view in zip(photos, views, strict=True):
            self.file.write(photo, view, self.rng.uniform(0, 3, self.shape[2:]).astype(np.float32))
        return self.file.batch(photos, views)


def report(what: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{peak:.0f} MB at most until the end of {what}", flush=True)


def main(unfreeze: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, PHOTOS)
    backbone = build.build(Wanted("efficientnet_lite0", None, 224, 0))
    part = cut(backbone.model, unfreeze)
    counts = plan.Counts(PHOTOS, VIEWS, 1)
    store = plan.store(part, 1, "cpu", counts, LIMIT)
    head = Head(np.zeros((backbone.width, CLASSES), np.float32), np.zeros(CLASSES, np.float32))
    with tempfile.TemporaryDirectory() as folder:
        kind = np.float16 if store.storage == "float16" else np.uint8
        file = ScratchFile(Path(folder), (PHOTOS, store.views, *part.shape), kind)
        drawn = Labelled(Drawn(file, rng), labels, np.ones(PHOTOS))
        try:
            next(Upper(part.upper, head).train(drawn, drawn, UpperSettings(1, 32, 0.001, 0.01, 0.0, 0)))
        except Enough:
            size = math.prod((PHOTOS, store.views, *part.shape)) * np.dtype(kind).itemsize
            report(f"{STEPS} steps above {part.below}, {store.views} views in {size / 1e9:.1f} GB")
        views = plan.views_again(store, counts)
        array = scratch_array(Path(folder), (PHOTOS, views, backbone.width))
        for start in range(0, PHOTOS, 100):
            some = slice(start, start + 100)
            array[some] = rng.normal(size=(100, views, backbone.width)) + labels[some, None, None]
        release(array)
        fit_lbfgs(HeadData.of(array, labels, CLASSES).rows(), 10.0)
        report(f"the fit of the head on {views} views")


if __name__ == "__main__":
    main(sys.argv[1])
