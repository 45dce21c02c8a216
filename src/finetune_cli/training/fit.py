"""The fit of a head: the config's `training` section and the features in, a fitted `Head` and its history out.

Chooses l2 and weights the photos. L-BFGS takes a second or two and needs no checkpoints; for Keras, which needs them,
this module gives the data and the settings, and `pipeline.py` goes through the epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from finetune_cli.config.schema import Config
from finetune_cli.head.data import HeadData, Rows, class_weights
from finetune_cli.head.keras_fit import KerasSettings
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.text import counted
from finetune_cli.training.extract import Features

_STILL, _LAST = 0.01, 3  # a loss that fell by more than 1 % in the last 3 epochs is still falling


@dataclass(frozen=True)
class Fitted:
    """A head, the `l2` that it was fitted with, and a row of numbers per epoch (empty for L-BFGS).

    out_of_fold: with `data.folds`, the out-of-fold logits ``float32 (n, C)`` of the training photos, NaN for those
    that are never held out; fold_heads: by fold, the heads that they come from.
    """

    head: Head
    l2: float
    history: Sequence[dict[str, float]]
    out_of_fold: Rows | None = None
    fold_heads: Mapping[int, Head] = field(default_factory=dict)


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """``int64 (n,)``: the class index of every sample."""
    return np.array([sample.label for sample in samples], np.int64)


def lbfgs(config: Config, train: Features, classes: Sequence[str], start: Head | None, observer: Observer) -> Fitted:
    """The minimum of the objective over all views of the training photos."""
    rows = head_data(config, train, classes).rows()
    l2 = chosen_l2(config, train, classes, observer)
    with observer.stage("head (lbfgs)", None, "iterations") as advance:
        fitted = fit_lbfgs(rows, l2, config.training.label_smoothing, start, advance)
    return Fitted(fitted, l2, ())


def keras_settings(config: Config, l2: float) -> KerasSettings:
    """How Keras trains the head, for the solvers adam and sgd."""
    training = config.training
    assert training.solver != "lbfgs"
    return KerasSettings(
        optimizer=training.solver,
        epochs=training.epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        patience=training.early_stopping_patience,
        dropout=config.model.dropout,
        label_smoothing=training.label_smoothing,
        l2=l2,
        seed=training.seed,
    )


def still_improving(history: Sequence[Mapping[str, float]], solver: str, epochs: int) -> str | None:
    """A warning about a training that `epochs` stopped too early; `None` if it did not.

    It did if the last epoch has the lowest validation loss, more than `_STILL` below that of `_LAST` epochs before (of
    the first, in a shorter training).
    """
    losses = [row["val_loss"] for row in history]
    last = min(_LAST, len(losses) - 1)
    if len(losses) < epochs or last < 1 or losses[-1] > min(losses):
        return None
    before = losses[-1 - last]
    if before - losses[-1] <= _STILL * before:
        return None
    fall = 1 - losses[-1] / before
    return (
        f"{solver} was still improving when it stopped: the validation loss fell by {fall:.1%} in the last "
        f"{counted(last, 'epoch')} of {epochs}; try training.epochs={2 * epochs}, or a higher training.learning_rate"
    )


def chosen_l2(config: Config, train: Features, classes: Sequence[str], observer: Observer) -> float:
    """`training.l2`, for `auto` by cross-validation on the training features."""
    training = config.training
    if training.l2 != "auto":
        return training.l2
    search = L2Search(training.label_smoothing, training.seed, config.calibration == "temperature")
    rows = head_data(config, train, classes).rows()
    with observer.stage("l2 by cross-validation", None, "fits") as advance:
        return choose_l2(rows, search, advance, observer.note)[0]


def head_data(config: Config, train: Features, classes: Sequence[str]) -> HeadData:
    """The training photos in all their views, weighted by `training.class_weights`; with their folds, if any."""
    labels = labels_of(train.samples)
    weights = class_weights(labels, config.training.class_weights, classes)
    groups = group_numbers((sample.group, sample.digest) for sample in train.samples)
    folds = None
    if config.data.folds is not None:
        folds = np.array([sample.fold or 0 for sample in train.samples], np.int64)
    return HeadData(train.array, labels, len(classes), weights, groups, folds)


def validation_data(val: Features, classes: Sequence[str]) -> HeadData:
    """The validation photos as they are: view 0, all of weight 1."""
    return HeadData.of(val.array[:, 0], labels_of(val.samples), len(classes))
