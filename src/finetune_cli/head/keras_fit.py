"""The softmax head in Keras: its fit epoch by epoch, its growth to new classes, and the finished model around it.

Features (photos, views, D) and labels (photos,) go in, a `Head` comes out; the objective is that of
`finetune_cli.head.lbfgs`. `build` puts a head on a backbone: raw pixels (N, H, W, 3) in, probabilities (N, C) out.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune_cli import signals
from finetune_cli.errors import FinetuneError, RunError
from finetune_cli.head.lbfgs import Floats, Head, Ints, Rows, one_blas_thread
from finetune_cli.keras_setup import import_keras
from finetune_cli.untrusted.keras_archive import load_keras_file


@dataclass(frozen=True, slots=True)
class KerasSettings:
    """What `fit_keras` is told; `patience` None trains all epochs. The best weights are kept either way."""

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
    def restore(cls, arrays: Mapping[str, NDArray[Any]], info: Mapping[str, Any]) -> "EpochState":
        """The state that `arrays` and `info` were taken from. Raises `KeyError` when something is missing."""

        def those(prefix: str) -> tuple[NDArray[Any], ...]:
            return tuple(arrays[name] for name in sorted(arrays) if name.startswith(prefix + "/"))

        return cls(
            epoch=info["epoch"],
            head=Head(arrays["kernel"], arrays["bias"]),
            best=Head(arrays["best/kernel"], arrays["best/bias"]),
            best_epoch=info["best_epoch"],
            best_loss=info["best_loss"],
            wait=info["wait"],
            history=tuple(info["history"]),
            optimizer=those("optimizer"),
            dropout=those("dropout"),
        )


def fit_keras(
    features: Rows,
    labels: Ints,
    weights: Floats,
    val_features: Rows,
    val_labels: Ints,
    n_classes: int,
    settings: KerasSettings,
    start: Head | None = None,
    resume: EpochState | None = None,
    on_epoch: Callable[[EpochState], None] = lambda _state: None,
) -> EpochState:
    """Fit a head in Keras, by Adam or SGD, and return the last epoch's state, whose `best` is the head to use.

    features: float32 (photos, views, D), read batch by batch, so it may be a memory map; labels and weights: (photos,);
    val_features: (n, D), n >= 1. An epoch visits each photo once, in an order drawn from (seed, epoch) and in its next
    view. Training stops after `patience` epochs without a lower validation loss (the objective on the validation
    photos, all of weight 1). `on_epoch` gets every epoch's state; given as `resume`, it leads to bit-identical ends.
    Raises `FinetuneError` when the loss is no longer finite, `Interrupted` after a batch in which a signal came.
    """
    state = resume
    if state is not None and (state.epoch >= settings.epochs or _has_stopped(state, settings)):
        return state
    keras = import_keras()
    # On a GPU so small a model is slower, and not the same twice.
    with signals.deferred(), keras.device("cpu:0"), one_blas_thread():
        trainer = _Trainer(keras, features.shape[2], n_classes, settings)
        trainer.set(state, start or glorot(features.shape[2], n_classes, settings.seed))
        began = time.perf_counter()

        def epoch_ended(epoch: int, logs: Mapping[str, float]) -> None:
            nonlocal state, began
            row = {"epoch": epoch + 1, "loss": float(logs["loss"]), "accuracy": float(logs["accuracy"])}
            with np.errstate(over="ignore", invalid="ignore"):  # of weights that have blown up; told below
                row |= _validate(trainer.head(), val_features, val_labels, settings)
            row["seconds"] = round(time.perf_counter() - began, 3)
            if not math.isfinite(row["loss"] + row["val_loss"]):
                raise FinetuneError(
                    f"training diverged: the loss is no longer a number after epoch {epoch + 1}",
                    f"choose a smaller training.learning_rate than {settings.learning_rate:g}",
                )
            state = trainer.state(row, state)
            on_epoch(state)
            trainer.model.stop_training = _has_stopped(state, settings)
            began = time.perf_counter()

        first = state.epoch if state is not None else 0
        batches = _batches(keras, features, np.asarray(labels), np.asarray(weights), n_classes, settings, first)
        trainer.model.fit(
            batches,
            initial_epoch=first,
            epochs=settings.epochs,
            steps_per_epoch=_steps(len(features), settings),
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_epoch_end=epoch_ended, on_train_batch_end=lambda _batch, **_logs: signals.check()
                )
            ],
        )
    assert state is not None
    return state


def glorot(width: int, n_classes: int, seed: int) -> Head:
    """A head to start from: kernel uniform in +-sqrt(6 / (D + C)) (Glorot and Bengio 2010), bias zero."""
    limit = math.sqrt(6 / (width + n_classes))
    kernel = np.random.default_rng(seed).uniform(-limit, limit, (width, n_classes))
    return Head(kernel.astype(np.float32), np.zeros(n_classes, np.float32))


def grow(
    head: Head, old_classes: Sequence[str], new_classes: Sequence[str], seed: int
) -> tuple[Head, tuple[str, ...], tuple[str, ...]]:
    """`head` for `new_classes`, which of them were kept, and which are new; the other old columns are left out.

    Kept columns are copied bit for bit. A new one is the mean of the kept ones plus a Glorot draw: adding the same
    vector to all columns of a softmax head changes no probability, so only relative to the kept columns is there a
    neutral place, where a new class wins neither everywhere nor nowhere.
    """
    kept = tuple(name for name in new_classes if name in old_classes)
    grown = glorot(len(head.kernel), len(new_classes), seed)
    kernel, bias = grown.kernel.copy(), grown.bias.copy()
    columns = [list(old_classes).index(name) for name in kept]
    if kept:
        kernel += head.kernel[:, columns].mean(axis=1, keepdims=True)
        bias += head.bias[columns].mean()
    places = [list(new_classes).index(name) for name in kept]
    kernel[:, places], bias[places] = head.kernel[:, columns], head.bias[columns]
    return Head(kernel, bias), kept, tuple(name for name in new_classes if name not in old_classes)


@signals.deferred()
def build(backbone_model: Any, head: Head, temperature: float, classes: Sequence[str]) -> Any:
    """A `keras.Model` from raw pixels 0..255 RGB (N, H, W, 3) to probabilities (N, C) of `classes`.

    The backbone is called with ``training=False``; after it come Dense `logits`, Rescaling `temperature` (1/T) and
    Softmax `probabilities`, in float32: stock layers only, so the file loads without this package.
    """
    if head.kernel.shape != (backbone_model.output_shape[-1], len(classes)):
        raise ValueError(f"a head of shape {head.kernel.shape} does not fit {len(classes)} classes on this backbone")
    keras = import_keras()
    pixels = keras.Input(backbone_model.input_shape[1:], name="pixels")
    dense = keras.layers.Dense(len(classes), name="logits", dtype="float32")
    values = dense(backbone_model(pixels, training=False))
    values = keras.layers.Rescaling(1 / temperature, name="temperature", dtype="float32")(values)
    values = keras.layers.Softmax(name="probabilities", dtype="float32")(values)
    dense.set_weights([head.kernel, head.bias])
    model = keras.Model(pixels, values, name="classifier")
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


class _Trainer:
    """The Keras side of `fit_keras`: a model on features, its optimizer, and their variables."""

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
        """Go on from `state`, or begin with `start`."""
        head = state.head if state is not None else start
        self.dense.set_weights([head.kernel, head.bias])
        if state is not None:
            for variable, value in zip(self.optimizer.variables, state.optimizer, strict=True):
                variable.assign(value)
            for variable, value in zip(self.dropout, state.dropout, strict=True):
                variable.assign(value)

    def head(self) -> Head:
        """The current weights."""
        return Head(*self.dense.get_weights())

    def state(self, row: dict[str, float], before: EpochState | None) -> EpochState:
        """The state after the epoch that `row` tells of; `before` is the one before."""
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


def _has_stopped(state: EpochState, settings: KerasSettings) -> bool:
    return settings.patience is not None and state.wait >= settings.patience


def _steps(photos: int, settings: KerasSettings) -> int:
    return math.ceil(photos / settings.batch_size)


def _batches(
    keras: Any, features: Rows, labels: Ints, weights: Floats, n_classes: int, settings: KerasSettings, first: int
) -> Any:
    """A `PyDataset` of all batches of all epochs from epoch `first`, without end: batch i is always the same one.

    The batch's number says which epoch it belongs to, so it does not matter how far ahead Keras reads. Batches of an
    epoch differ by at most one photo in size, and weights have the mean 1: then the mean loss of the batches is the
    objective.
    """
    photos, views = features.shape[:2]
    steps = _steps(photos, settings)
    targets = np.eye(n_classes, dtype=np.float32)[labels]
    scaled = (weights / weights.mean()).astype(np.float32)
    first_views = np.random.default_rng(settings.seed).integers(0, views, size=(photos,))
    orders: dict[int, list[NDArray[np.int64]]] = {}

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        num_batches = None

        def __getitem__(self, index: int) -> tuple[Rows, Rows, Rows]:
            epoch = first + index // steps
            if epoch not in orders:
                orders.clear()
                order = np.random.default_rng((settings.seed, epoch)).permutation(photos)
                orders[epoch] = np.array_split(order, steps)
            chosen = orders[epoch][index % steps]
            # Each photo takes its views in turn, from a random first one, so all are seen equally often.
            rows = np.asarray(features[chosen, (first_views[chosen] + epoch) % views])
            return rows, targets[chosen], scaled[chosen]

    return Batches()


def _validate(head: Head, features: Rows, labels: Ints, settings: KerasSettings) -> dict[str, float]:
    """Validation loss (the objective) and accuracy."""
    z = head.logits(features).astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    target = np.eye(z.shape[1])[labels] * (1 - settings.label_smoothing) + settings.label_smoothing / z.shape[1]
    entropy = np.log(np.exp(z).sum(axis=1)) - (target * z).sum(axis=1)
    penalty = settings.l2 * float((head.kernel.astype(np.float64) ** 2).sum())
    return {"val_loss": float(entropy.mean()) + penalty, "val_accuracy": float((z.argmax(axis=1) == labels).mean())}
