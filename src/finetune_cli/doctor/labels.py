"""Labels that are probably wrong: judged by a head that was fitted without the photo, and by the nearest photos.

Both see the same features, but they err in different ways: a head generalises from all photos of a class, neighbours
tell what the photos that look most alike are called. Only where they agree is a label called wrong with some certainty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_cli.duplicates import neighbours
from finetune_cli.head.data import HeadData, Ints
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Problem, one_blas_thread
from finetune_cli.metrics.calibration import fit_temperature, softmax
from finetune_cli.metrics.folds import group_folds
from finetune_cli.progress import Advance, ignore_progress

FOLDS = 5
FEWEST = 5  # photos of a class; with fewer, neither folds nor neighbours can judge a label
_NEIGHBOURS = 10
# A fit takes no more photos than make this many numbers (rows x features x classes), or than so many of each class.
_FITTED, _FITTED_PER_CLASS = 150_000_000, 10
_AGREEING = 0.8  # of the neighbours, for the tier high
_OWN, _PROBABILITY = 0.1, 0.075  # at most this share of them, and this probability, for the label itself
_DIVISIONS = 3  # into folds, of the second round
FITS = (1 + _DIVISIONS) * FOLDS


@dataclass(frozen=True)
class Doubt:
    """A photo, by number, whose label is in doubt, and the class, by number, that it seems to show.

    high: both judges agree. probability, suggested_probability: of label (the highest of three divisions into folds)
    and suggestion, by heads that did not see the photo. neighbours: how many of the `of` nearest other photos have the
    suggested label.
    """

    photo: int
    suggested: int
    high: bool
    probability: float
    suggested_probability: float
    neighbours: int
    of: int


def doubts(data: HeadData, workers: int, seed: int = 0, advance: Advance = ignore_progress) -> list[Doubt]:
    """The photos whose label is in doubt: those of the tier high first, then the least probable labels.

    `data` has features ``(n, D)``; photos of one group never judge each other. Probabilities are out-of-fold, and a
    photo is suspected by the confident joint (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068): its label is
    less probable than the label of the average photo of that class, and another class is more probable than it is for
    the average photo of that one. The heads of the second round are fitted without what the first one suspected, with
    three divisions into folds, which must agree for the tier high. `advance` counts fits, `FITS`.
    """
    labels, n_classes = data.labels, data.n_classes
    enough = np.bincount(labels, minlength=n_classes) >= FEWEST
    if len(np.unique(labels)) < 2:
        return []
    p = _out_of_fold(data, np.ones(len(labels), np.bool_), [seed], advance)[0]
    before = _suspected(p, labels, enough)
    trusted = ~before
    for label in range(n_classes):  # a class of which nothing is left is trusted as it is
        if not trusted[labels == label].any():
            trusted |= labels == label
    divisions = _out_of_fold(data, trusted, [seed + i for i in range(_DIVISIONS)], advance)
    p = divisions[0]
    suspected = _suspected(p, labels, enough)
    votes = _votes(data, workers)
    own = np.arange(len(labels))
    of = np.maximum(votes.sum(axis=1), 1)
    best, voted = p.argmax(axis=1), votes.argmax(axis=1)
    disagree = (voted != labels) & (votes[own, voted] >= _AGREEING * of) & (votes[own, labels] <= _OWN * of)
    highest = divisions[:, own, labels].max(axis=0)
    agree = (divisions.argmax(axis=2) == voted).all(axis=0)
    high = before & suspected & disagree & agree & (highest <= _PROBABILITY) & enough[labels]
    found = []
    for i in np.flatnonzero((suspected | disagree) & enough[labels]):
        other = int(best[i] if suspected[i] else voted[i])
        found.append(
            Doubt(
                photo=int(i),
                suggested=other,
                high=bool(high[i]),
                probability=float(highest[i]),
                suggested_probability=float(p[i, other]),
                neighbours=int(votes[i, other]),
                of=int(votes[i].sum()),
            )
        )
    return sorted(found, key=lambda doubt: (not doubt.high, doubt.probability, doubt.photo))


def _out_of_fold(
    data: HeadData, trusted: NDArray[np.bool_], seeds: Sequence[int], advance: Advance
) -> NDArray[np.float64]:
    """Probabilities ``(divisions, n, C)``, with a temperature, by heads fitted on `trusted` photos of other folds.

    Each of `seeds` divides the photos into folds in its own way.
    """
    l2 = choose_l2(data.part(trusted), L2Search(seed=seeds[0]))[0]
    return np.stack([_by_division(data, trusted, l2, seed, advance) for seed in seeds])


def _by_division(
    data: HeadData, trusted: NDArray[np.bool_], l2: float, seed: int, advance: Advance
) -> NDArray[np.float64]:
    fold = group_folds(data.labels, data.groups, FOLDS, seed)
    most = max(_FITTED_PER_CLASS * data.n_classes, _FITTED // (data.features.shape[1] * data.n_classes))
    logits = np.zeros((len(data.labels), data.n_classes), np.float32)
    for k in range(FOLDS):
        held_out, rest = np.flatnonzero(fold == k), np.flatnonzero((fold != k) & trusted)
        if len(rest) > most:
            rest = np.sort(np.random.default_rng(seed).permutation(rest)[:most])
        if len(held_out) and len(rest):
            with one_blas_thread():
                problem = Problem(data.part(rest), label_smoothing=0.0)
                head = problem.minimise(l2 * trusted.sum() / len(rest), None, ignore_progress, tolerance=1e-6)
            logits[held_out] = head.logits(data.features[held_out])
        advance(1)
    return softmax(logits, fit_temperature(logits, data.labels))


def _suspected(p: NDArray[np.float64], labels: Ints, enough: NDArray[np.bool_]) -> NDArray[np.bool_]:
    own = p[np.arange(len(p)), labels]
    counts = np.bincount(labels, minlength=p.shape[1])
    average = np.bincount(labels, weights=own, minlength=p.shape[1]) / np.maximum(counts, 1)
    other = p.argmax(axis=1)
    clearly = (p.max(axis=1) >= average[other]) & (own < average[labels])
    return np.asarray((other != labels) & clearly & enough[other] & enough[labels])


def _votes(data: HeadData, workers: int) -> NDArray[np.uint8]:
    """How many of the nearest photos have each label, ``uint8 (n, C)``; photos of the own group do not vote."""
    labels, groups = data.labels, data.groups
    rows = neighbours.directions(data.features)
    nearest, _cosines = neighbours.nearest(rows, rows, 3 * _NEIGHBOURS, workers)
    votes = np.zeros((len(labels), data.n_classes), np.uint8)
    left = np.full(len(labels), _NEIGHBOURS)
    for column in nearest.T:
        votes_now = (groups[column] != groups) & (left > 0)
        votes[np.flatnonzero(votes_now), labels[column[votes_now]]] += 1
        left -= votes_now
    return votes
