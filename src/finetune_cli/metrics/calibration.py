"""How well probabilities are calibrated, and the temperature that corrects them.

Logits or probabilities (N, C) and labels (N,) go in; scores of the calibration and a temperature come out. NumPy only,
because `predict` and `evaluate` come through here. Scores and temperatures are computed in float64, block by block of
rows: N x C numbers in float64 are never in memory at once. What is computed for a row does not depend on its block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune_cli.errors import DataError, FinetuneError
from finetune_cli.metrics.folds import group_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Numbers = NDArray[np.floating[Any]]

BINS = 15
COOLEST, HOTTEST = 0.05, 20.0
_BLOCK_NUMBERS = 1 << 20  # 8 MB in float64
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
    """How well probabilities are calibrated; each score is 0 for a perfect model.

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


def softmax(logits: ArrayLike, temperature: float | Floats = 1.0) -> Floats:
    """Probabilities (N, C) of logits (N, C) divided by `temperature`, one for all rows or (N, 1)."""
    p = np.asarray(logits, np.float64) / temperature
    p -= p.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p


def softmax32(logits: Numbers, temperature: float = 1.0) -> NDArray[np.float32]:
    """`softmax` rounded to float32, block by block."""
    p = np.empty(logits.shape, np.float32)
    for rows in _blocks(*logits.shape):
        p[rows] = softmax(logits[rows], temperature)
    return p


def checked(values: ArrayLike, labels: ArrayLike) -> tuple[Numbers, Ints]:
    """`values` (N, C) as floating-point numbers and `labels` (N,) as integers, after a look at both.

    Raises `DataError` without photos, `FinetuneError` for values that are not finite (a broken model), `ValueError`
    for shapes that do not fit.
    """
    values, labels = np.asarray(values), np.asarray(labels, np.intp)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
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
    return _scores((p[rows].astype(np.float64) for rows in _blocks(*p.shape)), y)


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
    low, high, b = 1 / HOTTEST, 1 / COOLEST, 1.0
    for _ in range(100):
        mean, variance = _moments(z, y, b)
        slope = float(w @ mean) + 1 - 1 / b
        curvature = float(w @ variance) + 1 / b**2
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature
        following = step if low <= step <= high else (low + high) / 2
        if abs(following - b) <= 1e-10 * b:
            break
        b = following
    return float(np.clip(1 / b, COOLEST, HOTTEST))


def _moments(logits: Numbers, labels: Ints, b: float) -> tuple[Floats, Floats]:
    """Mean and variance ``(N,)`` of the logits relative to the true class's, under softmax(b logits)."""
    mean, variance = np.empty(len(labels)), np.empty(len(labels))
    for rows in _blocks(*logits.shape):
        z = logits[rows].astype(np.float64)
        z -= z[np.arange(len(z)), labels[rows]][:, None]  # then the log loss is ln sum exp(b z)
        p = softmax(z, 1 / b)
        mean[rows] = (p * z).sum(axis=1)
        variance[rows] = (p * z**2).sum(axis=1) - mean[rows] ** 2
    return mean, variance


def cross_fitted(logits: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, folds: int = 5) -> Floats:
    """Calibrated probabilities (N, C) in which no photo took part in fitting the temperature that scales it.

    `groups` (N,) holds what must stay together (duplicates, bursts). With a single group nothing can be fitted and
    the temperature is 1. Raises as `checked` does.
    """
    z, y = checked(logits, labels)
    return softmax(z, _cross_fitted_temperatures(z, y, groups, folds))


def cross_fitted_calibration(
    logits: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, folds: int = 5
) -> tuple[CalibrationScores, CalibrationScores]:
    """The calibration before (T = 1) and after a temperature, the latter never on photos that it was fitted on."""
    z, y = checked(logits, labels)
    temperatures = _cross_fitted_temperatures(z, y, groups, folds)
    before = _scores((softmax(z[rows]) for rows in _blocks(*z.shape)), y)
    return before, _scores((softmax(z[rows], temperatures[rows]) for rows in _blocks(*z.shape)), y)


def _cross_fitted_temperatures(z: Numbers, y: Ints, groups: ArrayLike | None, folds: int) -> Floats:
    """For each row the temperature ``(N, 1)`` that was fitted on the other folds."""
    fold = group_folds(y, np.arange(len(y)) if groups is None else groups, folds)
    temperatures = np.ones((len(y), 1))
    for k in np.unique(fold):
        rest = fold != k
        if rest.any():
            temperatures[~rest] = fit_temperature(z[rest], y[rest])
    return temperatures


def _blocks(rows: int, classes: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, `_BLOCK_NUMBERS` numbers or one row at a time."""
    step = max(1, _BLOCK_NUMBERS // max(1, classes))
    return (slice(start, start + step) for start in range(0, rows, step))


def _scores(blocks: Iterator[Floats], y: Ints) -> CalibrationScores:
    """The scores of probabilities that come as blocks ``(n, C)`` of all rows in order."""
    own, squares, confidence, right = np.empty(len(y)), np.empty(len(y)), np.empty(len(y)), np.empty(len(y), bool)
    start = 0
    for p in blocks:
        rows = slice(start, start + len(p))
        start = rows.stop
        label = np.arange(len(p)), y[rows]
        own[rows], confidence[rows], right[rows] = p[label], p.max(axis=1), p.argmax(axis=1) == y[rows]
        p[label] -= 1
        squares[rows] = (p**2).sum(axis=1)
    reliability = _reliability(confidence, right)
    gaps = [
        b.photos * abs(b.accuracy - b.confidence)
        for b in reliability
        if b.accuracy is not None and b.confidence is not None
    ]
    return CalibrationScores(
        log_loss=float(-np.log(np.maximum(own, _SMALLEST)).mean()),
        brier_score=float(squares.mean()),
        expected_calibration_error=float(sum(gaps) / len(y)),
        reliability=reliability,
    )


def _reliability(confidence: Floats, right: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    # The bins are (low, high]: a confidence of exactly 1 belongs to the last.
    edges = np.linspace(0, 1, BINS + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    photos = np.bincount(index, minlength=BINS)
    confidences = np.bincount(index, weights=confidence, minlength=BINS)
    rights = np.bincount(index, weights=right, minlength=BINS)
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
