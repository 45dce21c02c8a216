"""Which model is kept: the frozen one, a tuned one, or one between them, by the validation photos alone.

Logits (n, C) of every candidate and labels (n,) go in, the one to keep comes out. The log loss is that
after a temperature, because every model gets one at the end; no photo takes part in fitting the temperature that scales
it. The frozen model wins all ties: a candidate must be better by more than chance would make it (a paired test over
the photos, one-sided, 95 %), and by at least a hundredth. Of tuned models that tie, the one whose head was fitted once
more is kept: it was the better one on the test photos in nearly all trainings that were measured. With `data.folds`,
all photos validate, by out-of-fold logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_cli.head.data import Floats, Ints, Rows
from finetune_cli.metrics.calibration import cross_fitted, fit_temperature, softmax
from finetune_cli.metrics.scores import independent

# Points on the line from the frozen to the tuned weights, beside its end (Wortsman et al. 2022, arXiv 2109.01903).
SHARES = (0.25, 0.5, 0.75)
_NOISE = 1.645  # standard errors: the 95 % quantile of the normal distribution
_LEAST_GAIN = 0.01  # of the frozen log loss: less is not worth a backbone of one's own, however sure it is
_SMALLEST = 1e-15


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model that may be kept. `training` is the number of its training, None for the frozen model.

    share: how far its weights are from the frozen (0) to the tuned ones (1); refitted: whether its head was fitted
    once more, on the tuned features, and did not learn along with them. logits: ``float32 (n, C)`` of the validation
    photos; losses: theirs. folds: how many there are, if the logits are out of fold.
    """

    training: int | None
    share: float
    refitted: bool
    logits: Rows
    losses: Floats
    accuracy: float
    temperature: float
    folds: int | None = None

    @property
    def log_loss(self) -> float:
        """Mean validation log loss."""
        return float(self.losses.mean())

    @property
    def name(self) -> str:
        """What people call it."""
        if self.training is None:
            return "frozen"
        if self.refitted:
            return "tuned, head fitted again"
        return "tuned" if self.share == 1 else f"{100 * self.share:.0f} % of the way"

    def to_json(self, frozen: "Candidate", kept: bool) -> dict[str, Any]:
        """The numbers under stable names; `gain` is against `frozen`, with its standard error, None if unknown."""
        gain, error = compared(frozen, self)
        return {
            "name": self.name,
            "training": self.training,
            "share": self.share,
            "head": "fitted again" if self.refitted else "interpolated" if 0 < self.share < 1 else "as trained",
            "log_loss": self.log_loss,
            "accuracy": self.accuracy,
            "temperature": self.temperature,
            "gain": gain,
            "gain_error": error if math.isfinite(error) else None,
            "kept": kept,
        }


@dataclass(frozen=True, eq=False)
class Validation:
    """What candidates are scored on: the labels and groups (n,) of the validation photos.

    calibrated: whether the finished model gets a temperature. folds: see `Candidate`.
    """

    labels: Ints
    groups: Ints
    calibrated: bool
    folds: int | None = None

    def candidate(
        self, logits: Rows, training: int | None = None, share: float = 0.0, refitted: bool = False
    ) -> Candidate:
        """Score the logits (n, C) of the validation photos; the other arguments: see `Candidate`."""
        labels = self.labels
        probabilities = cross_fitted(logits, labels, self.groups) if self.calibrated else softmax(logits)
        return Candidate(
            training,
            share,
            refitted,
            logits,
            -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _SMALLEST)),
            float((logits.argmax(axis=1) == labels).mean()),
            fit_temperature(logits, labels) if self.calibrated else 1.0,
            self.folds,
        )


def choose(frozen: Candidate, others: Sequence[Candidate]) -> Candidate:
    """The candidate to keep; see the top of this file. `others` is empty if every training diverged."""
    if not others:
        return frozen
    best = min(others, key=lambda other: other.log_loss)
    tied = [other for other in others if other.refitted and not _is_better(best, other)]
    tied.sort(key=lambda other: other.log_loss)
    return next((each for each in (*tied, best) if _is_better(each, frozen)), frozen)


def _is_better(one: Candidate, other: Candidate) -> bool:
    """Whether `one` is better than `other` by more than noise."""
    gain, error = compared(other, one)
    return gain > max(_NOISE * error, _LEAST_GAIN * other.log_loss)


def compared(first: Candidate, second: Candidate) -> tuple[float, float]:
    """By how much the log loss of `second` is lower than that of `first`, and the standard error of that, by photo.

    The error of a single photo's difference is unknown, and so infinite. Out of fold, photos count as fewer.
    """
    differences = first.losses - second.losses
    n = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(independent(n, first.folds)) if n > 1 else math.inf
    return float(differences.mean()), error
