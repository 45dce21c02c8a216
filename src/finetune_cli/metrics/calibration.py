"""How far a probability can be believed, and the one number that mends it.

Logits or probabilities (N, C) and labels (N,) go in; scores of the calibration and a temperature come out. NumPy only,
because `predict` and `evaluate` come through here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune_cli.errors import DataError, FinetuneError
from finetune_cli.metrics.folds import group_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

BINS = 15
COOLEST, HOTTEST = 0.05, 20.0
_SMALLEST = 1e-15  # a probability below this counts as this in the log loss, so that one photo cannot make it infinite


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The photos whose confidence lies in (low, high]; `confidence` and `accuracy` are their means, None if none."""

    low: float
    high: float
    photos: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class CalibrationScores:
    """How well probabilities keep their word; each score is 0 for a perfect model.

    log_loss: mean of -ln p(true class). brier_score: mean over photos of the sum over classes of (p - y)^2, between 0
    and 2 (Brier 1950). expected_calibration_error: with the photos sorted by confidence (the probability of the
    predicted class) into 15 bins of equal width, the mean over photos of |accuracy - mean confidence| of their bin
    (Guo et al. 2017). reliability: those bins.
    """

    log_loss: float
    brier_score: float
    expected_calibration_error: float
    reliability: tuple[ReliabilityBin, ...]

    def to_json(self) -> dict[str, Any]:
        """The scores under stable key names; None where a bin is empty."""
        return {
            "log_loss": self.log_loss,
            "brier_score": self.brier_score,
            "expected_calibration_error": self.expected_calibration_error,
            "reliability": [
                {"low": b.low, "high": b.high, "photos": b.photos, "confidence": b.confidence, "accuracy": b.accuracy}
                for b in self.reliability
            ],
        }


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Probabilities (N, C) of logits (N, C) divided by `temperature`."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)


def checked(values: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    """`values` (N, C) as float64 and `labels` (N,) as integers, after a look at both.

    Raises `DataError` without photos, `FinetuneError` for values that are not finite (a broken model), `ValueError`
    for shapes that do not fit.
    """
    values, labels = np.asarray(values, np.float64), np.asarray(labels, np.intp)
    if len(labels) == 0:
        raise DataError("there are no labelled photos to evaluate", "give a folder that holds some")
    if values.ndim != 2 or labels.shape != values.shape[:1] or not 0 <= labels.min() <= labels.max() < values.shape[1]:
        raise ValueError(f"values of shape {values.shape} do not fit labels of shape {labels.shape}")
    if not np.isfinite(values).all():
        raise FinetuneError("the model's output is not a number for some photos", "train the run again")
    return values, labels


def calibration_scores(probabilities: ArrayLike, labels: ArrayLike) -> CalibrationScores:
    """Log loss, Brier score and expected calibration error of probabilities (N, C). Raises as `checked` does."""
    p, y = checked(probabilities, labels)
    truth = np.eye(p.shape[1])[y]
    reliability = _reliability(p.max(axis=1), p.argmax(axis=1) == y)
    gaps = [
        b.photos * abs(b.accuracy - b.confidence)
        for b in reliability
        if b.accuracy is not None and b.confidence is not None
    ]
    return CalibrationScores(
        log_loss=float(-np.log(np.maximum(p[np.arange(len(y)), y], _SMALLEST)).mean()),
        brier_score=float(((p - truth) ** 2).sum(axis=1).mean()),
        expected_calibration_error=float(sum(gaps) / len(y)),
        reliability=reliability,
    )


def fit_temperature(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The temperature T in [0.05, 20] with which softmax(logits / T) fits the labels best.

    Minimises, over b = 1/T, the sum of the photos' log losses plus b - ln b (Guo et al. 2017, with a prior). The prior
    weighs about as much as one photo and is least at T = 1: it hardly moves an ordinary fit, but where every photo is
    right, and the likelihood alone would ask for certainty, N photos end with a confidence near 1 - 1/N. The sum is
    convex in b, so Newton's method with bisection as its safeguard finds the one minimum. `weights` (N,) says how many
    photos each row stands for, by default one. Raises as `checked` does.
    """
    z, y = checked(logits, labels)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    z = z - z[np.arange(len(y)), y][:, None]  # relative to the true class: the log loss is ln sum exp(b z)
    low, high, b = 1 / HOTTEST, 1 / COOLEST, 1.0
    for _ in range(100):
        p = softmax(z, 1 / b)
        mean = (p * z).sum(axis=1)
        slope = w @ mean + 1 - 1 / b
        curvature = w @ ((p * z**2).sum(axis=1) - mean**2) + 1 / b**2
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature
        following = step if low <= step <= high else (low + high) / 2
        if abs(following - b) <= 1e-10 * b:
            break
        b = following
    return float(np.clip(1 / b, COOLEST, HOTTEST))


def cross_fitted(logits: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, folds: int = 5) -> Floats:
    """Calibrated probabilities (N, C) in which no photo took part in fitting the temperature that scales it.

    `groups` (N,) holds what must stay together (duplicates, bursts). With a single group nothing can be fitted and
    the temperature is 1. Raises as `checked` does.
    """
    z, y = checked(logits, labels)
    fold = group_folds(y, np.arange(len(y)) if groups is None else groups, folds)
    p = softmax(z)
    for k in np.unique(fold):
        rest = fold != k
        if rest.any():
            p[~rest] = softmax(z[~rest], fit_temperature(z[rest], y[rest]))
    return p


def cross_fitted_calibration(
    logits: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, folds: int = 5
) -> tuple[CalibrationScores, CalibrationScores]:
    """The calibration before (T = 1) and after a temperature, the latter never on photos that it was fitted on."""
    after = calibration_scores(cross_fitted(logits, labels, groups, folds), labels)
    return calibration_scores(softmax(logits), labels), after


def _reliability(confidence: Floats, right: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    # The bins are (low, high]: a confidence of exactly 1 belongs to the last.
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    photos = np.bincount(place, minlength=BINS)
    confidences = np.bincount(place, weights=confidence, minlength=BINS)
    rights = np.bincount(place, weights=right, minlength=BINS)
    return tuple(
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            photos=int(photos[i]),
            confidence=float(confidences[i] / photos[i]) if photos[i] else None,
            accuracy=float(rights[i] / photos[i]) if photos[i] else None,
        )
        for i in range(BINS)
    )
