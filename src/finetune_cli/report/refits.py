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
    """The photos that refits are judged by: features ``float32 (m, D)`` and labels ``(m,)``."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


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
    data = HeadData(features, material.labels, len(material.classes), material.weights, material.groups)
    return choose_l2(data.rows(), L2Search(material.label_smoothing, material.seed, material.calibrated))[0]


def effect_of_views(material: Material, judges: Judges) -> ViewsEffect:
    """Fit on the photos as they are, and on all views; each head has the l2 and the temperature that are right for it.

    Without the temperature, the log loss would blame a strong l2 for the low probabilities that a temperature corrects.
    """
    everything = np.arange(len(material.labels))
    heads = (
        refit(material, everything, views=1, l2=_chosen_l2(material, 1)),
        refit(material, everything),
    )
    answer = (lambda logits: cross_fitted(logits, judges.labels)) if material.calibrated else softmax
    probabilities = [answer(head.logits(judges.features)) for head in heads]
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
    joint of Northcutt et al. 2021 (https://arxiv.org/abs/1911.00068). Calls `advance` for each of five folds.
    """
    fold = group_folds(material.labels, material.groups, FOLDS, material.seed)
    p = np.zeros((len(material.labels), len(material.classes)))
    for k in range(FOLDS):
        held_out = np.flatnonzero(fold == k)
        rest = np.flatnonzero(fold != k)
        if len(held_out) and len(rest):
            p[held_out] = softmax(refit(material, rest, views=1).logits(material.features[held_out, 0]))
        advance(1)
    counts = np.bincount(material.labels, minlength=len(material.classes))
    own = p[np.arange(len(p)), material.labels]
    average = np.bincount(material.labels, weights=own, minlength=len(counts)) / np.maximum(counts, 1)
    other = p.argmax(axis=1)
    best = p.max(axis=1)
    enough = (counts[material.labels] >= _FEWEST) & (counts[other] >= _FEWEST)
    suspected = (other != material.labels) & (best >= average[other]) & (own < average[material.labels]) & enough
    order = sorted(np.flatnonzero(suspected), key=lambda i: own[i] - best[i])
    return [Suspect(material.rows[i], float(own[i]), material.classes[other[i]], float(best[i])) for i in order]


def learning_curve(material: Material, judges: Judges, advance: Callable[[int], None]) -> LearningCurve:
    """Fit on a quarter, half, three quarters and all of every class's photos; below all, three random parts each.

    Calls `advance` for every fit, `fits()` of them.
    """
    rng = np.random.default_rng(material.seed)
    full = refit(material, np.arange(len(material.labels)))
    advance(1)
    right = np.zeros((len(FRACTIONS), len(judges.labels)))
    right[-1] = full.logits(judges.features).argmax(axis=1) == judges.labels
    sizes = [0] * (len(FRACTIONS) - 1) + [len(material.labels)]
    for _draw in range(_DRAWS):
        orders = [rng.permutation(np.flatnonzero(material.labels == i)) for i in range(len(material.classes))]
        for j, fraction in enumerate(FRACTIONS[:-1]):
            part = np.sort(np.concatenate([own[: max(1, round(fraction * len(own)))] for own in orders if len(own)]))
            sizes[j] = len(part)
            head = refit(material, part, start=full)
            right[j] += (head.logits(judges.features).argmax(axis=1) == judges.labels) / _DRAWS
            advance(1)
    return _summed_up(right, sizes, judges.labels, len(material.classes))


def fits() -> int:
    """How many heads `learning_curve` fits."""
    return 1 + _DRAWS * (len(FRACTIONS) - 1)


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
