"""The fit of the softmax head in Keras, by Adam or SGD, an epoch at a time.

`HeadData` with features (photos, views, D) goes in, a state comes out after each epoch; the objective is that of
`finetune_cli.head.lbfgs`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_cli import signals
from finetune_cli.errors import FinetuneError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.head.classifier import glorot
from finetune_cli.head.data import HeadData, Rows
from finetune_cli.head.lbfgs import Head, one_blas_thread
from finetune_cli.keras_setup import import_keras

_VALIDATED_ROWS = 4096  # photos that are validated at once: memory does not grow with their number


@dataclass(frozen=True, slots=True)
class KerasSettings:
    """How `fit_epochs` trains; `patience` None trains all epochs. The best weights are returned either way."""

    optimizer: Literal["adam", "sgd"] = "adam"
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.001
    patience: int | None = 5
    dropout: float = 0.0
    label_smoothing: float = 0.0
    l2: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class EpochState:
    """Everything that the next epoch depends on, after `epoch` completed epochs (the first is 1).

    `head` is the current one, `best` that of `best_epoch`, with the validation loss `best_loss`; `wait` counts the
    epochs since. `optimizer` and `dropout` are Keras's variables (`dropout` is empty without dropout). A row of
    `history` has epoch, loss, accuracy, val_loss, val_accuracy and seconds.
    """

    epoch: int
    head: Head
    best: Head
    best_epoch: int
    best_loss: float
    wait: int
    history: tuple[dict[str, float], ...]
    optimizer: tuple[NDArray[Any], ...]
    dropout: tuple[NDArray[Any], ...]

    @property
    def is_best(self) -> bool:
        """Whether this epoch is the best so far."""
        return self.wait == 0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state's arrays by name; with `info`, all that `restore` needs."""
        named = {
            "kernel": self.head.kernel,
            "bias": self.head.bias,
            "best/kernel": self.best.kernel,
            "best/bias": self.best.bias,
        }
        for prefix, values in (("optimizer", self.optimizer), ("dropout", self.dropout)):
            named |= {f"{prefix}/{i:03}": value for i, value in enumerate(values)}
        return named

    def info(self) -> dict[str, Any]:
        """The rest of the state as plain JSON values."""
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "wait": self.wait,
            "history": list(self.history),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, NDArray[Any]], info: Fields) -> "EpochState":
        """The state that `arrays` and `info` were taken from.

        Raises `FieldError` when an array or a key is missing or of a wrong type.
        """

        def array(name: str) -> NDArray[Any]:
            if name not in arrays:
                raise FieldError(f"the array {name} is missing")
            return arrays[name]

        def numbered(prefix: str) -> tuple[NDArray[Any], ...]:
            return tuple(arrays[name] for name in sorted(arrays) if name.startswith(prefix + "/"))

        return cls(
            epoch=info.integer("epoch", 1),
            head=Head(array("kernel"), array("bias")),
            best=Head(array("best/kernel"), array("best/bias")),
            best_epoch=info.integer("best_epoch", 1),
            best_loss=info.number("best_loss"),
            wait=info.integer("wait"),
            history=tuple(history_row(row) for row in info.objects("history")),
            optimizer=numbered("optimizer"),
            dropout=numbered("dropout"),
        )


def history_row(row: Fields) -> dict[str, float]:
    """A row of `EpochState.history`. Raises `FieldError`."""
    columns = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")
    return {"epoch": row.integer("epoch", 1), **{column: row.number(column) for column in columns}}


def fit_epochs(
    train: HeadData,
    val: HeadData,
    settings: KerasSettings,
    start: Head | None = None,
    resume: EpochState | None = None,
) -> Iterator[EpochState]:
    """Fit a head in Keras, by Adam or SGD, and yield the state after each epoch; the last one's `best` is the result.

    train: features float32 ``(photos, views, D)``, read batch by batch, so they may be a memory map. val: features
    ``(n, D)``, n >= 1; its weights are not used. An epoch visits each photo of a weight above 0 once, in an order drawn
    from (seed, epoch) and in its next view. Training stops after `patience` epochs without a lower validation loss (the
    objective on the validation photos, all of weight 1). Given as `resume`, any state leads to a bit-identical result;
    after a last one nothing is yielded. Raises `FinetuneError` when the loss is no longer finite, `Interrupted` after a
    batch in which a signal came.
    """
    state = resume
    if state is not None and is_last(state, settings):
        return
    keras, width = import_keras(), train.features.shape[2]
    trainer = None
    while state is None or not is_last(state, settings):
        began = time.perf_counter()
        epoch = state.epoch if state is not None else 0
        # So small a model is slower on a GPU, and not reproducible. Signals are deferred during the epoch only.
        with signals.deferred(), keras.device("cpu:0"), one_blas_thread():
            if trainer is None:
                trainer = _Trainer(keras, width, train.n_classes, settings)
                trainer.set(state, start or glorot(width, train.n_classes, settings.seed))
                batches = _batches(train, settings)
            row = {"epoch": epoch + 1, **trainer.epoch(batches(epoch))}
            with np.errstate(over="ignore", invalid="ignore"):  # of diverged weights; reported below
                row |= _validate(trainer.head(), val, settings)
            row["seconds"] = round(time.perf_counter() - began, 3)
            if not math.isfinite(row["loss"] + row["val_loss"]):
                raise FinetuneError(
                    f"training diverged: the loss is not finite after epoch {epoch + 1}",
                    f"choose a smaller training.learning_rate than {settings.learning_rate:g}",
                )
            state = trainer.state(row, state)
        yield state


class _Trainer:
    """The Keras side of `fit_epochs`: a model on features, its optimizer, and their variables."""

    def __init__(self, keras: Any, width: int, n_classes: int, settings: KerasSettings) -> None:
        dropout = [keras.layers.Dropout(settings.dropout, seed=settings.seed)] if settings.dropout else []
        penalty = keras.regularizers.L2(settings.l2) if settings.l2 else None
        self.dense = keras.layers.Dense(n_classes, kernel_initializer="zeros", kernel_regularizer=penalty)
        self.model = keras.Sequential([keras.Input((width,)), *dropout, self.dense])
        self.optimizer = _optimizer(keras, settings)
        self.optimizer.build(self.model.trainable_variables)
        self.dropout = [layer.seed_generator.state for layer in dropout]
        self.model.compile(
            self.optimizer,
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
            metrics=["accuracy"],
            jit_compile=False,
        )

    def set(self, state: EpochState | None, start: Head) -> None:
        """Resume from `state`, or begin with `start`."""
        head = state.head if state is not None else start
        self.dense.set_weights([head.kernel, head.bias])
        if state is not None:
            for variable, value in zip(self.optimizer.variables, state.optimizer, strict=True):
                variable.assign(value)
            for variable, value in zip(self.dropout, state.dropout, strict=True):
                variable.assign(value)

    def epoch(self, batches: Any) -> dict[str, float]:
        """Train one epoch; its mean loss and accuracy."""
        self.model.reset_metrics()
        # `fit` does the same, but takes 45 ms to set up, more than an epoch of a small set; `train_on_batch` resets the
        # metrics at every batch.
        step = self.model.make_train_function() or self.model.train_function
        logs: dict[str, Any] = {}
        for batch in batches:
            logs = step(iter([batch]))
            signals.check()
        return {name: float(logs[name]) for name in ("loss", "accuracy")}

    def head(self) -> Head:
        """The current weights."""
        return Head(*self.dense.get_weights())

    def state(self, row: dict[str, float], before: EpochState | None) -> EpochState:
        """The state after the epoch of `row`; `before` is the one before."""
        head, epoch = self.head(), int(row["epoch"])
        best = before if before is not None and not row["val_loss"] < before.best_loss else None
        return EpochState(
            epoch=epoch,
            head=head,
            best=best.best if best else head,
            best_epoch=best.best_epoch if best else epoch,
            best_loss=best.best_loss if best else row["val_loss"],
            wait=best.wait + 1 if best else 0,
            history=(*(before.history if before is not None else ()), row),
            optimizer=tuple(np.array(variable) for variable in self.optimizer.variables),
            dropout=tuple(np.array(variable) for variable in self.dropout),
        )


def _optimizer(keras: Any, settings: KerasSettings) -> Any:
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(settings.learning_rate)
    return keras.optimizers.SGD(settings.learning_rate, momentum=0.9, nesterov=True)


class Progressed(Protocol):
    """A training after some epochs: how many, and how many of the last ones were no better than the best."""

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        ...

    @property
    def wait(self) -> int:
        """Epochs since the best."""
        ...


def is_last(state: Progressed, settings: KerasSettings) -> bool:
    """Whether a training ends with `state`: all epochs were run, or `patience` of them brought nothing better."""
    stopped = settings.patience is not None and state.wait >= settings.patience
    return stopped or state.epoch >= settings.epochs


def _batches(data: HeadData, settings: KerasSettings) -> Callable[[int], Iterator[tuple[Rows, Rows, Rows]]]:
    """Epoch (the first is 0) -> its batches, which depend on the seed and on that number only.

    A batch is features (n, D), targets (n, C), weights (n,). Batches of an epoch differ by at most one photo in size,
    and weights have the mean 1: then the mean loss of the batches is the objective.
    """
    views, photos = data.features.shape[1], np.flatnonzero(data.weights)
    scaled = (data.weights / data.weights[photos].mean()).astype(np.float32)
    first_views = np.random.default_rng(settings.seed).integers(0, views, size=data.labels.shape)

    def batches(epoch: int) -> Iterator[tuple[Rows, Rows, Rows]]:
        order = photos[np.random.default_rng((settings.seed, epoch)).permutation(len(photos))]
        # Each photo takes its views in turn, from a random first one, so all are seen equally often.
        turn = (first_views + epoch) % views
        for chosen in np.array_split(order, math.ceil(len(photos) / settings.batch_size)):
            targets = np.zeros((len(chosen), data.n_classes), np.float32)
            targets[np.arange(len(chosen)), data.labels[chosen]] = 1
            yield np.asarray(data.features[chosen, turn[chosen]]), targets, scaled[chosen]

    return batches


def _validate(head: Head, data: HeadData, settings: KerasSettings) -> dict[str, float]:
    """Validation loss (the objective) and accuracy."""
    entropy, right = np.empty(len(data.labels)), np.empty(len(data.labels), np.bool_)
    for start in range(0, len(entropy), _VALIDATED_ROWS):
        rows = slice(start, start + _VALIDATED_ROWS)
        labels = data.labels[rows]
        z = head.logits(data.features[rows]).astype(np.float64)
        right[rows] = z.argmax(axis=1) == labels
        z -= z.max(axis=1, keepdims=True)
        target = np.full_like(z, settings.label_smoothing / z.shape[1])
        target[np.arange(len(z)), labels] += 1 - settings.label_smoothing
        entropy[rows] = np.log(np.exp(z).sum(axis=1)) - (target * z).sum(axis=1)
    penalty = settings.l2 * float((head.kernel.astype(np.float64) ** 2).sum())
    return {"val_loss": float(entropy.mean()) + penalty, "val_accuracy": float(right.mean())}
