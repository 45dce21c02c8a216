"""How good a classifier is: probabilities (N, C) and labels (N,) go in, an `Evaluation` comes out.

NumPy only, because `evaluate` and `predict` import it and must start fast. All numbers are computed in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune_cli.metrics.calibration import CalibrationScores, calibration_scores, checked

TARGET_PRECISIONS = (0.90, 0.95, 0.98, 0.99)
TOP_K = (3, 5)
Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of photos, `value`, with its 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One class: `support` photos have it, `predicted` were given it.

    precision: share of the predicted photos that have the class, None if none was predicted. recall: share of the
    photos of the class that were predicted, None if there are none. f1: their harmonic mean, 0 without a correct one,
    None if the class occurs nowhere.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """What accepting only confident answers brings: photos with confidence >= `threshold` are `coverage` of all.

    `threshold` is the lowest, in steps of 0.0001, at which the accepted photos are right with at least the `target`
    share; `precision` is the share reached. Both are None, and `coverage` is 0, where no threshold reaches it.
    """

    target: float
    threshold: float | None
    coverage: float
    accepted: int
    precision: Proportion | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All scores on one set of photos. `confusion` is (C, C): rows true, columns predicted.

    balanced_accuracy: mean recall of the classes that occur among the labels. macro_f1: mean F1 of the classes that
    occur among labels or predictions; weighted_f1: mean F1 weighted by support. baseline: always answering
    `baseline_class`, the most frequent label. calibration: never that of photos with a temperature fitted on them.
    without_near_duplicates: how many of the photos show another picture than every training photo, and the accuracy on
    them; None if all do, or none.
    """

    classes: tuple[str, ...]
    photos: int
    accuracy: Proportion
    top_k: dict[int, Proportion]
    balanced_accuracy: float
    macro_f1: float
    weighted_f1: float
    baseline: Proportion
    baseline_class: str
    per_class: tuple[ClassScores, ...]
    confusion: NDArray[np.int64]
    calibration: CalibrationScores
    coverage: tuple[CoverageRow, ...]
    without_near_duplicates: tuple[int, Proportion] | None = None

    @property
    def log_loss(self) -> float:
        """Mean of -ln p(true class)."""
        return self.calibration.log_loss

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain JSON values under stable key names; shares lie between 0 and 1, None is unknown."""
        others = self.without_near_duplicates
        return {
            "photos": self.photos,
            "classes": list(self.classes),
            "accuracy": self.accuracy.value,
            "accuracy_interval": _interval(self.accuracy),
            "without_near_duplicates": None
            if others is None
            else {"photos": others[0], "accuracy": others[1].value, "accuracy_interval": _interval(others[1])},
            "top_k": {str(k): {"accuracy": p.value, "interval": _interval(p)} for k, p in self.top_k.items()},
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1,
            "baseline": {
                "class": self.baseline_class,
                "accuracy": self.baseline.value,
                "interval": _interval(self.baseline),
            },
            **self.calibration.to_json(),
            "per_class": [
                {
                    "class": row.name,
                    "precision": row.precision,
                    "recall": row.recall,
                    "f1": row.f1,
                    "support": row.support,
                    "predicted": row.predicted,
                }
                for row in self.per_class
            ],
            "confusion_matrix": self.confusion.tolist(),
            "coverage": [
                {
                    "target_precision": row.target,
                    "threshold": row.threshold,
                    "coverage": row.coverage,
                    "accepted": row.accepted,
                    "precision": None if row.precision is None else row.precision.value,
                    "precision_interval": None if row.precision is None else _interval(row.precision),
                }
                for row in self.coverage
            ],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two classifiers on the same photos: how many only one of them gets right, and whether that may be chance.

    p_value: McNemar's exact test. difference: accuracy of the second minus that of the first, with its 95 % interval
    for paired shares.
    """

    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    p_value: float
    difference: Proportion

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values under stable key names."""
        return {
            "both_right": self.both_right,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "both_wrong": self.both_wrong,
            "p_value": self.p_value,
            "difference": self.difference.value,
            "difference_interval": _interval(self.difference),
        }


def evaluate(probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]) -> Evaluation:
    """The `Evaluation` of probabilities (N, C) against integer labels (N,); `classes` holds the C names in order.

    The predicted class is the most probable one, the first of equals. Raises `DataError` for N = 0, `FinetuneError`
    for probabilities that are not finite, `ValueError` for shapes that do not fit.
    """
    p, y = checked(probabilities, labels)
    if len(classes) != p.shape[1]:
        raise ValueError(f"{len(classes)} classes do not fit probabilities of shape {p.shape}")
    predicted = p.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (y, predicted), 1)
    per_class = tuple(_class_scores(name, confusion, i) for i, name in enumerate(classes))
    support = confusion.sum(axis=1)
    largest = int(support.argmax())
    f1 = [row.f1 for row in per_class if row.f1 is not None]
    return Evaluation(
        classes=tuple(classes),
        photos=len(y),
        accuracy=wilson(int((predicted == y).sum()), len(y)),
        top_k={k: wilson(int((_rank(p, y) < k).sum()), len(y)) for k in TOP_K if k < len(classes)},
        balanced_accuracy=float(np.mean([row.recall for row in per_class if row.recall is not None])),
        macro_f1=float(np.mean(f1)),
        weighted_f1=float(sum(row.support * (row.f1 or 0.0) for row in per_class) / len(y)),
        baseline=wilson(int(support[largest]), len(y)),
        baseline_class=classes[largest],
        per_class=per_class,
        confusion=confusion,
        calibration=calibration_scores(p, y),
        coverage=coverage_table(p.max(axis=1), predicted == y),
    )


def without(
    evaluation: Evaluation, left_out: NDArray[np.bool_], probabilities: ArrayLike, labels: ArrayLike
) -> Evaluation:
    """`evaluation` with the accuracy on the photos that are not `left_out` ``bool (N,)``, if some are and some not."""
    if not left_out.any() or left_out.all():
        return evaluation
    right = np.asarray(probabilities).argmax(axis=1) == np.asarray(labels)
    count = int((~left_out).sum())
    return replace(evaluation, without_near_duplicates=(count, wilson(int(right[~left_out].sum()), count)))


def of_folds(evaluation: Evaluation, folds: int) -> Evaluation:
    """`evaluation`, of out-of-fold predictions, with the intervals that `wilson` gives for so many `folds`."""

    def widened(share: Proportion, photos: int) -> Proportion:
        return wilson(round(share.value * photos), photos, folds)

    return replace(
        evaluation,
        accuracy=widened(evaluation.accuracy, evaluation.photos),
        top_k={k: widened(share, evaluation.photos) for k, share in evaluation.top_k.items()},
        coverage=tuple(
            row if row.precision is None else replace(row, precision=widened(row.precision, row.accepted))
            for row in evaluation.coverage
        ),
    )


def wilson(right: int, photos: int, folds: int | None = None) -> Proportion:
    """`right` of `photos` (at least one) with Wilson's 95 % score interval (Wilson 1927), which stays inside 0..1.

    `folds`: the photos were predicted out of so many folds. Then it is the interval of `independent` photos.
    """
    share, z2 = right / photos, Z95**2
    n = independent(photos, folds)
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return Proportion(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def independent(photos: int, folds: int | None) -> float:
    """How many photos that were predicted independently tell as much as `photos` that were predicted out of K `folds`.

    n / (1 + K / (K - 1)), because the models of the folds share training photos: the correction of the variance by
    Nadeau and Bengio (2003, Machine Learning 52), 1/K + n_test / n_train in place of 1/K. All of them without folds.
    """
    return photos if folds is None else photos / (1 + folds / (folds - 1))


def coverage_table(
    confidence: ArrayLike, right: ArrayLike, targets: Sequence[float] = TARGET_PRECISIONS
) -> tuple[CoverageRow, ...]:
    """For each target precision the threshold that accepts most photos, from confidences (N,) and correctness (N,)."""
    confidence = np.asarray(confidence, np.float64)
    order = np.argsort(-confidence, kind="stable")
    descending = confidence[order]
    rights = np.concatenate([[0], np.cumsum(np.asarray(right, bool)[order])])
    # Thresholds that a person can type: every confidence, rounded down to four decimals.
    thresholds = np.unique(np.floor(confidence * 1e4) / 1e4)
    accepted = np.searchsorted(-descending, -thresholds, side="right")
    usable = accepted > 0  # rounding errors of the division may put a threshold above its own confidence
    thresholds, accepted = thresholds[usable], accepted[usable]
    return tuple(_coverage_row(target, thresholds, accepted, rights) for target in targets)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: were the photos that only one of two has right split by a fair coin?

    Twice the smaller binomial(n, 1/2) tail, at most 1 (McNemar 1947). Computed by logarithms, for any n.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    i = np.arange(1, k + 1, dtype=np.float64)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))]) - n * math.log(2)
    return min(1.0, 2 * float(np.exp(log_terms).sum()))


def compare(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> Comparison:
    """Compare two predictions (N,) of the same photos with true `labels` (N,), N >= 1.

    The interval of the difference adds half a photo to each of the four cells (Agresti and Min 2005).
    """
    labels = np.asarray(labels)
    a, b = np.asarray(first) == labels, np.asarray(second) == labels
    only_first, only_second, n = int((a & ~b).sum()), int((b & ~a).sum()), len(labels)
    centre = (only_second - only_first) / (n + 2)
    half = Z95 * math.sqrt(((only_first + only_second + 1) / (n + 2) - centre**2) / (n + 2))
    difference = Proportion((only_second - only_first) / n, max(centre - half, -1.0), min(centre + half, 1.0))
    return Comparison(
        both_right=int((a & b).sum()),
        only_first=only_first,
        only_second=only_second,
        both_wrong=int((~a & ~b).sum()),
        p_value=mcnemar(only_first, only_second),
        difference=difference,
    )


def _class_scores(name: str, confusion: NDArray[np.int64], i: int) -> ClassScores:
    hits, support, predicted = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
    return ClassScores(
        name=name,
        precision=hits / predicted if predicted else None,
        recall=hits / support if support else None,
        f1=2 * hits / (support + predicted) if support + predicted else None,
        support=support,
        predicted=predicted,
    )


def _rank(p: NDArray[np.floating[Any]], y: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many classes come before the true one; of equals the first comes first, as in the prediction."""
    own = p[np.arange(len(y)), y][:, None]
    before = np.arange(p.shape[1]) < y[:, None]
    return np.asarray(((p > own) | ((p == own) & before)).sum(axis=1), np.intp)


def _coverage_row(
    target: float, thresholds: NDArray[np.float64], accepted: NDArray[np.intp], rights: NDArray[np.intp]
) -> CoverageRow:
    good = np.flatnonzero(rights[accepted] >= target * accepted - 1e-9)
    if not len(good):
        return CoverageRow(target, None, 0.0, 0, None)
    best = good[0]  # thresholds ascend, so the first good one accepts most
    n = int(accepted[best])
    return CoverageRow(target, float(thresholds[best]), n / (len(rights) - 1), n, wilson(int(rights[n]), n))


def _interval(proportion: Proportion) -> list[float]:
    return [proportion.low, proportion.high]
