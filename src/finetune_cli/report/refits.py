"""What refitting the head on the cached training features shows: nearly free, and without the backbone.

Did augmentation help, would more photos, and which labels does cross-validation contradict? Heads are fitted by L-BFGS
with the run's own l2; on fewer photos l2 grows in proportion, so that the prior on the weights stays the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.metrics.calibration import cross_fitted, softmax
from finetune_cli.metrics.folds import group_folds
from finetune_cli.metrics.scores import Z95, Comparison, compare
from finetune_cli.report.refit_data import Material
from finetune_cli.runs.run import SplitRow

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
_DRAWS = 3  # random parts of the training photos for each fraction below 1
FOLDS = 5
_FEWEST = 3  # photos of a class; with fewer, cross-validation cannot judge its labels

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judges:
    """The photos that refits are judged by: features ``float32 (m, D)`` and labels ``(m,)``.

    folds: of training photos, which have been cross-validated, in which fold each is held out ``(m,)``: heads that
    judge it are fitted without its fold. None for photos that were not trained on.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    folds: NDArray[np.int64] | None = None

    @classmethod
    def of_folds(cls, material: Material) -> "Judges":
        """The training photos of a run that was cross-validated, in its own folds."""
        assert material.folds is not None
        rows = np.flatnonzero(material.folds)
        return cls(material.features[rows, 0], material.labels[rows], material.folds[rows])

    def sides(self, material: Material) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """The photos of `material` that a head may learn from, with those that it is judged by, for each fold."""
        if self.folds is None or material.folds is None:
            return [(np.arange(len(material.labels)), np.arange(len(self.labels)))]
        return [
            (np.flatnonzero(material.folds != fold), np.flatnonzero(self.folds == fold))
            for fold in np.unique(self.folds)
        ]


@dataclass(frozen=True)
class ViewsEffect:
    """The head fitted on view 0 alone (first) and on all views (second).

    log_loss: how much the second is lower than the first, with its 95 % interval.
    """

    views: int
    comparison: Comparison
    accuracies: tuple[float, float]
    log_loss: tuple[float, float, float]


@dataclass(frozen=True)
class Suspect:
    """A training photo whose label cross-validation contradicts: the probability of its label and of another."""

    row: SplitRow
    probability: float
    suggested: str
    suggested_probability: float


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Recall ``(fractions, C)``, NaN for a class without photos to judge by, and accuracy ``(fractions,)``.

    gain, error: what a class gained in recall from half to all of its photos ``(C,)``, and its standard error.
    """

    photos: tuple[int, ...]
    accuracy: Floats
    recall: Floats
    support: NDArray[np.int64]
    gain: Floats
    error: Floats


def refit(
    material: Material,
    photos: NDArray[np.intp],
    views: int | None = None,
    l2: float | None = None,
    start: Head | None = None,
) -> Head:
    """The head fitted on these `photos` (indexes into `material`) and their first `views` views (default: all)."""
    part = material.features[photos, :views]
    data = HeadData.of(part, material.labels[photos], len(material.classes), material.weights[photos])
    strength = (material.l2 if l2 is None else l2) * len(material.labels) / len(photos)
    return fit_lbfgs(data.rows(), strength, material.label_smoothing, start)


def with_strength(material: Material) -> Material:
    """`material` with the l2 that is right for it: it may be a part of the run's photos, and Adam may have had none."""
    if material.l2 > 0:
        return replace(material, l2=material.l2 * material.photos / len(material.labels))
    return replace(material, l2=_chosen_l2(material, material.views))


def _chosen_l2(material: Material, views: int) -> float:
    features = material.features[:, :views]
    data = HeadData(features, material.labels, len(material.classes), material.weights, material.groups, material.folds)
    return choose_l2(data.rows(), L2Search(material.label_smoothing, material.seed, material.calibrated))[0]


def effect_of_views(material: Material, judges: Judges) -> ViewsEffect:
    """Fit on the photos as they are, and on all views; each head has the l2 and the temperature that are right for it.

    Without the temperature, the log loss would blame a strong l2 for the low probabilities that a temperature corrects.
    """
    logits = np.zeros((2, len(judges.labels), len(material.classes)), np.float32)
    l2_of_photos = _chosen_l2(material, 1)
    for known, rows in judges.sides(material):
        heads = refit(material, known, views=1, l2=l2_of_photos), refit(material, known)
        for i, head in enumerate(heads):
            logits[i, rows] = head.logits(judges.features[rows])
    answer = (lambda logits: cross_fitted(logits, judges.labels)) if material.calibrated else softmax
    probabilities = [answer(logits[i]) for i in range(2)]
    own = np.arange(len(judges.labels)), judges.labels
    gains = np.log(np.maximum(probabilities[1][own], 1e-15)) - np.log(np.maximum(probabilities[0][own], 1e-15))
    half = Z95 * float(gains.std(ddof=1)) / np.sqrt(len(gains)) if len(gains) > 1 else float("inf")
    predicted = [p.argmax(axis=1) for p in probabilities]
    first, second = (float((p == judges.labels).mean()) for p in predicted)
    mean = float(gains.mean())
    return ViewsEffect(
        material.views,
        compare(judges.labels, predicted[0], predicted[1]),
        (first, second),
        (mean, mean - half, mean + half),
    )


def suspects(material: Material, advance: Callable[[int], None]) -> list[Suspect]:
    """Training photos that heads fitted without them contradict, the most clearly contradicted first.

    A photo is suspected of showing class j if its probability of j is at least the average of the photos labelled j,
    j is the most probable class, and its label's probability is below the average of its own class: the confident
    joint of Northcutt et al. 2021 (https://arxiv.org/abs/1911.00068). The folds are the run's own, else five. Calls
    `advance` for each.
    """
    numbers = material.folds
    if numbers is None:
        numbers = 1 + group_folds(material.labels, material.groups, FOLDS, material.seed)
    p = np.zeros((len(material.labels), len(material.classes)))
    for fold in range(1, folds(material) + 1):
        held_out, rest = np.flatnonzero(numbers == fold), np.flatnonzero(numbers != fold)
        if len(held_out) and len(rest):
            p[held_out] = softmax(refit(material, rest, views=1).logits(material.features[held_out, 0]))
        advance(1)
    counts = np.bincount(material.labels, minlength=len(material.classes))
    own = p[np.arange(len(p)), material.labels]
    average = np.bincount(material.labels, weights=own, minlength=len(counts)) / np.maximum(counts, 1)
    other = p.argmax(axis=1)
    best = p.max(axis=1)
    enough = (counts[material.labels] >= _FEWEST) & (counts[other] >= _FEWEST) & (numbers > 0)
    suspected = (other != material.labels) & (best >= average[other]) & (own < average[material.labels]) & enough
    order = sorted(np.flatnonzero(suspected), key=lambda i: own[i] - best[i])
    return [Suspect(material.rows[i], float(own[i]), material.classes[other[i]], float(best[i])) for i in order]


def folds(material: Material) -> int:
    """In how many folds `suspects` looks at the photos."""
    return FOLDS if material.folds is None else int(material.folds.max())


def learning_curve(material: Material, judges: Judges, advance: Callable[[int], None]) -> LearningCurve:
    """Fit on a quarter, half, three quarters and all of every class's photos; below all, three random parts each.

    With folds, on parts of the photos outside each fold, one random part each. Calls `advance` for every fit, `fits()`
    of them.
    """
    rng = np.random.default_rng(material.seed)
    right = np.zeros((len(FRACTIONS), len(judges.labels)))
    sides = judges.sides(material)
    draws = _draws(len(sides))
    sizes = np.zeros((len(sides), len(FRACTIONS)))
    for side, (known, rows) in enumerate(sides):
        features, labels = judges.features[rows], judges.labels[rows]
        full = refit(material, known)
        advance(1)
        right[-1, rows] = full.logits(features).argmax(axis=1) == labels
        sizes[side, -1] = len(known)
        for _draw in range(draws):
            own_photos = (known[material.labels[known] == i] for i in range(len(material.classes)))
            orders = [rng.permutation(photos) for photos in own_photos if len(photos)]
            for j, fraction in enumerate(FRACTIONS[:-1]):
                part = np.sort(np.concatenate([order[: max(1, round(fraction * len(order)))] for order in orders]))
                sizes[side, j] = len(part)
                head = refit(material, part, start=full)
                right[j, rows] += (head.logits(features).argmax(axis=1) == labels) / draws
                advance(1)
    return _summed_up(right, [round(size) for size in sizes.mean(axis=0)], judges.labels, len(material.classes))


def _draws(sides: int) -> int:
    """Random parts for each fraction: folds bring a part each."""
    return _DRAWS if sides == 1 else 1


def fits(sides: int = 1) -> int:
    """How many heads `learning_curve` fits; `sides`: the number of folds, or 1."""
    return sides * (1 + _draws(sides) * (len(FRACTIONS) - 1))


def _summed_up(right: Floats, sizes: Sequence[int], labels: NDArray[np.int64], n_classes: int) -> LearningCurve:
    """`right` (fractions, m): the share of draws in which a photo was right."""
    recall = np.full((len(FRACTIONS), n_classes), np.nan)
    gain, error = np.full(n_classes, np.nan), np.full(n_classes, np.nan)
    half = FRACTIONS.index(0.5)
    support = np.bincount(labels, minlength=n_classes)
    for i in np.flatnonzero(support):
        own = labels == i
        recall[:, i] = right[:, own].mean(axis=1)
        difference = right[-1, own] - right[half, own]
        gain[i] = difference.mean()
        error[i] = difference.std(ddof=1) / np.sqrt(support[i]) if support[i] > 1 else np.inf
    return LearningCurve(tuple(sizes), right.mean(axis=1), recall, support, gain, error)
