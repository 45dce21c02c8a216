"""The head of one run: the config's `training` section and the features in, a fitted `Head` and its history out.

Chooses l2 and weights the rows. Keras yields the state of every epoch, so that the caller can save a checkpoint;
L-BFGS takes a second or two and starts again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_cli.config.schema import Config
from finetune_cli.head import keras_fit
from finetune_cli.head.keras_fit import EpochState
from finetune_cli.head.lbfgs import Head, choose_l2, class_weights, fit_lbfgs, flatten_views
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.dataset import Sample
from finetune_cli.progress import Observer
from finetune_cli.text import counted
from finetune_cli.training.extract import Features

_STILL, _LAST = 0.01, 3  # a loss that fell by more than 1 % in the last 3 epochs is still falling


@dataclass(frozen=True)
class Fitted:
    """A head, the `l2` that it was fitted with, and a row of numbers an epoch (empty for L-BFGS)."""

    head: Head
    l2: float
    history: Sequence[dict[str, float]]


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """``int64 (n,)``: the class index of every sample."""
    return np.array([sample.label for sample in samples], np.int64)


def lbfgs(config: Config, train: Features, classes: Sequence[str], start: Head | None, observer: Observer) -> Fitted:
    """The minimum of the objective over all views of the training photos."""
    training = config.training
    rows = _rows(config, train, classes)
    l2 = chosen_l2(config, train, classes, observer)
    with observer.stage("head (lbfgs)", None, "iterations") as advance:
        fitted = fit_lbfgs(*rows[:3], len(classes), l2, training.label_smoothing, start, advance)
    return Fitted(fitted, l2, ())


def keras(
    config: Config,
    train: Features,
    val: Features,
    classes: Sequence[str],
    l2: float,
    start: Head | None,
    resume: EpochState | None,
) -> Iterator[EpochState]:
    """The states of a Keras optimizer, epoch by epoch; the last one's `best` has the lowest validation loss."""
    training = config.training
    assert training.solver != "lbfgs"
    labels = labels_of(train.samples)
    settings = keras_fit.KerasSettings(
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
    weights = class_weights(labels, training.class_weights, classes)
    val_rows, val_labels = val.array[:, 0], labels_of(val.samples)
    return keras_fit.fit_epochs(
        train.array, labels, weights, val_rows, val_labels, len(classes), settings, start, resume
    )


def still_improving(history: Sequence[Mapping[str, float]], solver: str, epochs: int) -> str | None:
    """What to say of a training that `epochs` has stopped too early; `None` if it has not.

    It has if the last epoch has the lowest validation loss, more than `_STILL` below that of `_LAST` epochs before (of
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
    rows = _rows(config, train, classes)
    with observer.stage("l2 by cross-validation", None, "fits") as advance:
        calibrated = config.calibration == "temperature"
        settings = training.label_smoothing, training.seed, calibrated
        return choose_l2(*rows, len(classes), *settings, advance, observer.note)[0]


def _rows(
    config: Config, train: Features, classes: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Features, labels, weights and groups of every view."""
    labels = labels_of(train.samples)
    weights = class_weights(labels, config.training.class_weights, classes)
    groups = group_numbers((sample.group, sample.digest) for sample in train.samples)
    return flatten_views(train.array, labels, weights, groups)  # type: ignore[return-value]
