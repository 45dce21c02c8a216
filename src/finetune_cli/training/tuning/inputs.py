"""What a training of the upper part gets, and the network that it trains.

On a CPU: the activations at the cut, computed by the fast runtime, and the layers above it. On a GPU: the photos in
views that are drawn anew for every epoch, and the whole network with its lower part frozen. There, the lower part costs
less than bringing its activations from a disk, and no view comes twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune_cli.devices import Precision
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.scan import Sample
from finetune_cli.text import counted
from finetune_cli.training.extract import FeatureRequest
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.tuning import activations
from finetune_cli.training.tuning.activations import Lower, Pixels, Recomputed, Scratch, Source
from finetune_cli.training.tuning.cuts import Cut
from finetune_cli.training.tuning.folded import folded
from finetune_cli.training.tuning.plan import Store
from finetune_cli.training.tuning.upper import Upper


@dataclass(frozen=True, eq=False)
class Inputs:
    """Where the training photos and the validation photos of a training come from."""

    train: Source
    val: Source


def upper(part: Cut, head: Head, device: str) -> Upper:
    """What is trained: the part above the cut or, on a GPU, the whole network with the part below it frozen."""
    if device == "cpu":
        return Upper(part.upper, head, steps=folded(part.upper))
    return Upper(part.whole, head, part.upper.layers)


def lower(part: Cut, extractor: Extractor, precision: Precision, views: Augmenter | None) -> Lower:
    """What computes the inputs of `upper`: the part below the cut or, on a GPU, nothing but the decoding."""
    request = FeatureRequest(extractor.settings.image, extractor.backbone.fingerprint, precision, views)
    workers, batch_size = extractor.workers, extractor.batch_size
    if part.lower is None or extractor.device == "gpu":
        return Lower(request, Pixels(), tuple(part.whole.input_shape[1:]), workers, batch_size)
    runtime = runtimes.OpenVinoRuntime(runtimes.convert(part.lower), precision, workers)
    return Lower(request, runtime, part.shape, workers, batch_size)


def of_cut(extractor: Extractor, train: Sequence[Sample], val: Sequence[Sample], part: Cut, store: Store) -> Inputs:
    """The inputs of a training at the cut `part`, kept as `store` says.

    Raises `StorageError` when the scratch files have no room, `DataError` when a photo has changed.
    """
    augmenter, observer = extractor.settings.augmenter, extractor.observer
    of_train = lower(part, extractor, extractor.precision, augmenter.with_views(store.views))
    of_val = lower(part, extractor, "float32", None)
    if store.storage == "recomputed":
        observer.warn(
            "the activations of one view a photo do not fit in fine_tuning.scratch_gb, so the frozen part runs "
            "again in every epoch"
        )
    if store.storage in {"recomputed", "none"}:
        return Inputs(Recomputed(train, of_train), Recomputed(val, of_val))
    if store.views < augmenter.views:
        observer.warn(
            f"{counted(store.views, 'view')} of {augmenter.views} fit in fine_tuning.scratch_gb; the upper part learns "
            "from those"
        )
    folder = extractor.settings.cache.scratch
    kind = np.float16 if store.storage == "float16" else np.uint8
    with observer.stage(f"activations of {part.below}", len(train) + len(val)) as advance:
        return Inputs(
            activations.stored(train, of_train, Scratch(folder, store.views, kind), advance),
            activations.stored(val, of_val, Scratch(folder, 1, np.float32), advance),
        )
