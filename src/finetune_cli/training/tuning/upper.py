"""The upper part of a backbone and the head, trained together in Keras on activations at the cut, epoch by epoch.

Activations (n, H, W, C) -> upper part, BatchNorm with its moving statistics -> features (n, D) -> Dense -> logits.
AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) from a fitted head (Kumar et al. 2022,
https://arxiv.org/abs/2202.10054: a random head would first destroy what the features know); linear warm-up over a
tenth of the steps, then a cosine to zero; the norm of all gradients together clipped at 1; no weight decay on biases
and on BatchNorm. With a mixed policy the steps compute in float16 or bfloat16 (Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740), while the weights, and everything that is measured, stay float32. Only Keras's
backend-neutral API is used here.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import signals
from finetune_cli.devices import TrainingPolicy
from finetune_cli.errors import FinetuneError
from finetune_cli.head.data import Floats, Ints, views_in_turn
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference.runtimes import out_of_memory
from finetune_cli.keras_setup import import_keras
from finetune_cli.parallel import ordered_map
from finetune_cli.text import counted
from finetune_cli.training.tuning.activations import Rows, Source
from finetune_cli.training.tuning.folded import Steps

_WARM_UP = 0.1  # of all steps
_CLIP = 1.0
_FEATURE_BATCH = 32

Weights = tuple[NDArray[Any], ...]
Indexes = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class UpperSettings:
    """How the upper part is trained; `learning_rate` is the highest one, after the warm-up.

    policy: Keras's name of the types that the steps compute in.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    seed: int
    policy: TrainingPolicy = "float32"


@dataclass(frozen=True, eq=False)
class UpperState:
    """Everything that the next epoch depends on, after `epoch` completed epochs.

    weights: those that learn, the upper part's first, then the head's kernel and bias; optimizer: Keras's variables;
    batch_size: that of the last epoch, less than the one that was asked for if that did not fit in memory. A row of
    `history` has epoch, loss, accuracy, val_loss and val_accuracy (if there are validation photos), batch_size and
    seconds.
    """

    epoch: int
    weights: Weights
    optimizer: Weights
    batch_size: int
    history: tuple[dict[str, float], ...]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state's arrays by name; with `history`, all that `restore` needs."""
        named = {f"weights/{i:04}": value for i, value in enumerate(self.weights)}
        return named | {f"optimizer/{i:04}": value for i, value in enumerate(self.optimizer)}

    @classmethod
    def restore(cls, epoch: int, arrays: Mapping[str, NDArray[Any]], history: Any) -> "UpperState":
        """The state that `arrays` and `history` were taken from."""

        def those(prefix: str) -> Weights:
            return tuple(arrays[name] for name in sorted(arrays) if name.startswith(prefix))

        return cls(epoch, those("weights/"), those("optimizer/"), int(history[-1]["batch_size"]), tuple(history))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Activations with labels (photos,) and weights (photos,)."""

    source: Source
    labels: Ints
    weights: Floats


class Diverged(FinetuneError):
    """The loss of a training is no longer a number."""


class Upper:
    """The upper part with a head on it; its layers are those of the backbone, which changes with it.

    `model`: a `keras.Model` from activations to features (N, D). `learning`: those of its layers that learn, by default
    all; the others stay frozen. `steps`: what the steps go through in its place, with the same weights; what is
    measured goes through `model`.
    """

    def __init__(
        self, model: Any, head: Head, learning: Sequence[Any] | None = None, steps: Steps | None = None
    ) -> None:
        self._keras = import_keras()
        self._at_once = _FEATURE_BATCH
        self.model = model
        for layer in model.layers:
            layer.trainable = False
        for layer in model.layers if learning is None else learning:
            layer.trainable = True
        with signals.deferred():
            self._dense = self._keras.layers.Dense(head.kernel.shape[1], name="logits", dtype="float32")
            self._dense.build((None, model.output_shape[-1]))
            self._dense.set_weights([head.kernel, head.bias])
            steps = steps or Steps(model, tuple(model.layers))
            self._mixed = steps.mixed
            self._classifier = _classifier(self._keras, steps.model, self._dense)
        # Kept, because another training may have other layers of the same backbone learn.
        self._learning = list(self._classifier.trainable_variables)

    def weights(self) -> Weights:
        """Copies of all weights that learn, the head's last."""
        return tuple(np.array(variable) for variable in self._learning)

    @signals.deferred()
    def assign(self, weights: Weights) -> None:
        """Set all weights that learn."""
        for variable, value in zip(self._learning, weights, strict=True):
            variable.assign(value)

    def head(self) -> Head:
        """The head as it is now."""
        return Head(*self._dense.get_weights())

    @signals.deferred()
    def features(self, source: Source, views: int, into: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Features ``float32 (photos, views, D)`` of the upper part as it is now, written to `into` if it is given."""
        photos = source.shape[0]
        array = np.empty((photos, views, self.model.output_shape[-1]), np.float32) if into is None else into
        # All batches are of one size, the last one filled up, because Keras builds its graph once for each size.
        rows = np.zeros((self._at_once, *source.shape[2:]), np.float32)
        for start in range(0, photos * views, self._at_once):
            some = np.divmod(np.arange(start, min(start + self._at_once, photos * views)), views)
            n = len(some[0])
            rows[:n] = source.batch(*some)
            array[some] = np.asarray(self.model.predict_on_batch(rows))[:n]
            signals.check()
        return array

    def train(
        self,
        train: Labelled,
        val: Labelled | None,
        settings: UpperSettings,
        resume: UpperState | None = None,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> Iterator[UpperState]:
        """Train from the weights as they are, or go on from `resume`; yields the state after every epoch.

        An epoch visits each photo in an order drawn from (seed, epoch) and in its next view, once but for the few that
        fill up the last batch. The validation loss is that of the photos of `val`, if there are any, all of weight 1,
        without label smoothing. When a batch does not fit in the memory of a GPU, the epoch begins again with half of
        it, and `warn` is told.

        Raises `Diverged` when the loss is no longer finite, `FinetuneError` when not even one photo fits, `Interrupted`
        after a batch in which a signal came.
        """
        state, start = resume, self.weights()
        batch = settings.batch_size if state is None else state.batch_size
        while True:
            try:
                for each in self._epochs(train, val, replace(settings, batch_size=batch), state):
                    state = each
                    yield state
                return
            except Exception as exc:
                if not out_of_memory(exc):
                    raise
                if batch == 1:
                    raise FinetuneError(
                        "fine-tuning: not even one photo fits in the memory of the GPU",
                        "lower image.size, let fewer layers learn (fine_tuning.unfreeze), or set runtime.device: cpu",
                    ) from exc
            fewer = math.ceil(batch / 2)
            warn(f"{counted(batch, 'photo')} at once do not fit in the memory; going on with batches of {fewer}")
            batch = fewer
            with signals.deferred():
                self.assign(start if state is None else state.weights)

    def _epochs(
        self, train: Labelled, val: Labelled | None, settings: UpperSettings, state: UpperState | None
    ) -> Iterator[UpperState]:
        """The rest of a training, in batches of one size."""
        self._at_once = min(_FEATURE_BATCH, settings.batch_size)
        photos, views = train.source.shape[:2]
        steps = math.ceil(photos / settings.batch_size)
        # Of one size, see `features`; some photos come twice in an epoch, but never in one batch.
        batch_shape = (steps, math.ceil(photos / steps))
        with signals.deferred():
            optimizer = self._compile(settings, steps)
            if state is not None:
                self.assign(state.weights)
                for variable, value in zip(optimizer.variables, state.optimizer, strict=True):
                    variable.assign(value)
                if state.batch_size != settings.batch_size:
                    optimizer.iterations.assign(state.epoch * steps)  # where the learning rate is as far as the epochs
        targets = np.eye(self._dense.units, dtype=np.float32)
        # With weights of mean 1 and batches of one size, the mean of the batches is the loss.
        weights = (train.weights / train.weights.mean()).astype(np.float32)
        for epoch in range(state.epoch if state is not None else 0, settings.epochs):
            began = time.perf_counter()
            order = np.random.default_rng((settings.seed, epoch)).permutation(photos)
            chosen_views = views_in_turn(photos, views, settings.seed, epoch)

            def loaded(chosen: Indexes, chosen_views: Indexes = chosen_views) -> tuple[Indexes, Rows]:
                return chosen, train.source.batch(chosen, chosen_views[chosen])

            total = np.zeros(2)
            with signals.deferred(), _computing_in(self._mixed, settings.policy):
                # One thread, which reads the next batch while this one is in use.
                for chosen, rows in ordered_map(loaded, np.resize(order, batch_shape), 1):
                    total += self._classifier.train_on_batch(rows, targets[train.labels[chosen]], weights[chosen])
                    self._classifier.reset_metrics()
                    signals.check()
            with signals.deferred():
                loss, accuracy = (total / steps).tolist()
                row = {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "accuracy": accuracy,
                    **({} if val is None else self._validate(val)),
                }
                row |= {"batch_size": settings.batch_size, "seconds": round(time.perf_counter() - began, 3)}
                if not math.isfinite(row["loss"] + row.get("val_loss", 0.0)):
                    raise Diverged(
                        f"fine-tuning diverged: the loss is no longer a number after epoch {epoch + 1}",
                        f"choose a smaller fine_tuning.learning_rate than {settings.learning_rate:g}",
                    )
                history = (*(state.history if state is not None else ()), row)
                variables = tuple(np.array(variable) for variable in optimizer.variables)
                state = UpperState(epoch + 1, self.weights(), variables, settings.batch_size, history)
            yield state

    def _compile(self, settings: UpperSettings, steps: int) -> Any:
        keras, total = self._keras, settings.epochs * steps
        warm_up = min(max(1, round(_WARM_UP * total)), total - 1)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warm_up else settings.learning_rate,
            max(1, total - warm_up),
            warmup_target=settings.learning_rate if warm_up else None,
            warmup_steps=warm_up,
        )
        optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay, global_clipnorm=_CLIP)
        # Vectors are biases and the scales and shifts of normalisation; kernels have more axes.
        optimizer.exclude_from_weight_decay(
            var_list=[variable for variable in self._learning if len(variable.shape) < 2]
        )
        if settings.policy == "mixed_float16":  # whose smallest numbers are too large for some gradients
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(self._learning)
        self._classifier.compile(
            optimizer,
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
            weighted_metrics=None,
            metrics=["accuracy"],
            jit_compile=False,
        )
        return optimizer

    def _validate(self, val: Labelled) -> dict[str, float]:
        """Log loss and accuracy of the validation photos."""
        logits = self.head().logits(self.features(val.source, 1)[:, 0]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), val.labels]
        return {"val_loss": float(losses.mean()), "val_accuracy": float((logits.argmax(axis=1) == val.labels).mean())}


@contextlib.contextmanager
def _computing_in(layers: Sequence[Any], policy: TrainingPolicy) -> Iterator[None]:
    """Let `layers` compute as `policy` says. What Keras builds in the block keeps to that, what it has
    built before does not change; the weights are float32 in any case.
    """
    before = [layer.dtype_policy for layer in layers]
    try:
        if policy != "float32":
            for layer in layers:
                layer.dtype_policy = policy
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.dtype_policy = own


def _classifier(keras: Any, upper: Any, dense: Any) -> Any:
    class Classifier(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="classifier")
            self.upper, self.dense = upper, dense

        def call(self, activations: Any, training: bool = False) -> Any:  # noqa: ARG002
            # In training, too: BatchNorm keeps the statistics of its first, much larger training set, and dropout
            # rests. In a functional model, Keras would overrule this with the mode of the whole model.
            return self.dense(self.upper(activations, training=False))

    return Classifier()


def with_head(weights: Weights, head: Head) -> Weights:
    """`Upper.weights` with another head."""
    return (*weights[:-2], head.kernel, head.bias)


def interpolated(start: Weights, end: Weights, share: float) -> Weights:
    """Weights on the straight line from `start` (share 0) to `end` (1); Wortsman et al. 2022, arXiv 2109.01903."""
    return tuple(
        ((1 - share) * first.astype(np.float64) + share * last.astype(np.float64)).astype(first.dtype)
        for first, last in zip(start, end, strict=True)
    )
