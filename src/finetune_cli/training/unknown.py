"""How a run learns to answer `unknown`: which photos set the threshold, which score is used, and what it detects.

    validation photos -> half choose (temperature, fine-tuning, score), half set the threshold and choose nothing
    training photos   -> at most `MOST_REFERENCES` references, and heads that were fitted without one of the classes
    each class left out in turn: of which score are most of its photos refused?  -> the score, and an estimate

The promise, how many photos of the run's own kind are refused, rests on the photos that chose nothing; see
`metrics/novelty.py`. What share of strange photos is refused is an estimate, and differs with what they show.

With `data.folds` no photo is set apart:

    every photo  -> its distance to photos outside its own fold, and the energy of its out-of-fold logits: the threshold
    a few folds  -> choose the score, as the photos that choose do above

New photos are compared with references of all folds and answered by the final head, so their scores are not drawn like
those that set the threshold, and the rate is approximate (Barber et al. 2021, https://arxiv.org/abs/1905.02928).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli.config.schema import Config
from finetune_cli.errors import DataError
from finetune_cli.head.data import HeadData, class_weights
from finetune_cli.head.lbfgs import Head, fit_lbfgs, one_blas_thread
from finetune_cli.inference.predictor import UNKNOWN
from finetune_cli.metrics import novelty
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Advance, Observer, timed
from finetune_cli.runs import novelty as stored
from finetune_cli.runs.manifest import Unknown
from finetune_cli.text import counted
from finetune_cli.training.extract import Features
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.prepare import Prepared
from finetune_cli.training.start_from import AnyBackbone

MOST_REFERENCES = 2000
MOST_LEFT_OUT = 10
_MOST_HELD_OUT = 0.75  # of the validation photos
_CHOOSING = 200  # so many cross-validated photos choose the score, and the rest of the last fold
DISTANCE, BOTH = "distance", "distance and energy"


def sets_threshold(val: Sequence[Sample], config: Config) -> NDArray[np.bool_]:
    """``bool (n,)``: the validation photos that set the threshold, and so may choose nothing; without `unknown` none.

    About half of each class, whole groups with their copies, by content alone. Raises `DataError` when these are too
    few for the rate that was asked for.
    """
    if config.unknown is None:
        return np.zeros(len(val), np.bool_)
    rate = config.unknown.false_rejects
    groups = group_numbers((sample.group, sample.digest) for sample in val)
    mask = held_out(labels_of(val), groups, [sample.digest for sample in val], rate)
    if not mask.any():
        least = novelty.least_held_out(rate)
        count = len(np.unique(groups))
        raise DataError(
            f"unknown.false_rejects: {rate:g} needs at least {math.ceil(least / _MOST_HELD_OUT)} validation photos, "
            f"{least} of which set the threshold and choose nothing; there are {len(val)}"
            + (f" in {counted(count, 'group')} that stay together" if count < len(val) else ""),
            "add photos, use a larger data.val_split, set a larger unknown.false_rejects, or drop `unknown`",
        )
    return mask


def held_out(
    labels: NDArray[np.int64], groups: NDArray[np.int64], digests: Sequence[str], rate: float
) -> NDArray[np.bool_]:
    """``bool (n,)``: the photos that set the threshold for `rate`; none when too few can.

    With m of them, the threshold is the k-th highest score, k = floor(rate (m + 1)), and k / (m + 1) is the share that
    is refused on average. At 5 % and 36 photos that is the highest score, so one odd photo lets all strangers pass; at
    39 it is the second. So m is near a half of the photos, and where little of the rate is lost: the sum of both losses
    is the least. Whole groups are taken, of every class the same share, ordered by digests.
    """
    order = sorted(range(len(labels)), key=lambda i: _hash(digests[i]))
    members: dict[int, list[int]] = {}
    for i in order:
        members.setdefault(int(groups[i]), []).append(i)
    by_class: dict[int, list[list[int]]] = {}
    for unit in members.values():
        by_class.setdefault(int(labels[unit[0]]), []).append(unit)
    # The positions in each class are spread over the same line, so that any start of it has all classes in proportion.
    line = sorted(
        ((rank + 0.5) / len(units), label, unit) for label, units in by_class.items() for rank, unit in enumerate(units)
    )
    taken: list[int] = []
    best, least_loss = 0, math.inf
    for _position, _label, unit in line:
        if len(taken) + len(unit) > _MOST_HELD_OUT * len(labels):
            continue
        taken += unit
        share = int(rate * (len(taken) + 1) + 1e-9) / (len(taken) + 1)
        loss = (1 - share / rate) + abs(len(taken) / len(labels) - 0.5)
        if share and loss < least_loss:
            best, least_loss = len(taken), loss
    mask = np.zeros(len(labels), np.bool_)
    mask[taken[:best]] = True
    return mask


def _hash(digest: str) -> str:
    """An order of photos that has nothing to do with the one by which they were chosen for validation."""
    return hashlib.sha256(f"unknown {digest}".encode()).hexdigest()


def choosing(val: Features, config: Config) -> Features:
    """The validation photos that may choose the temperature, the tuned weights and the score: without `unknown` all."""
    mask = sets_threshold(val.samples, config)
    return _part(val, ~mask) if mask.any() else val


def checked(config: Config) -> Callable[[Dataset, AnyBackbone], None]:
    """A check for `prepare` to make before the features are computed. It raises `DataError`."""

    def check(data: Dataset, _backbone: AnyBackbone) -> None:
        if config.unknown is not None and UNKNOWN in data.classes:
            raise DataError(
                f"a class is named {UNKNOWN}, which is also the answer for photos that show none of the classes",
                "rename that class; or drop it, if it holds photos of anything else, or drop `unknown` from the config",
            )
        if config.data.folds is None:
            sets_threshold(data.val, config)
        else:
            _refuse_too_few(data.train, config)

    return check


def _refuse_too_few(train: Sequence[Sample], config: Config) -> None:
    """Raise `DataError` when fewer photos are held out once than the rate needs."""
    if config.unknown is None:
        return
    rate, count = config.unknown.false_rejects, sum(sample.fold is not None for sample in train)
    least = novelty.least_held_out(rate)
    if count < least:
        raise DataError(
            f"unknown.false_rejects: {rate:g} needs at least {least} cross-validated photos; there are {count}",
            "add photos, set a larger unknown.false_rejects, or drop `unknown`",
        )


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a run needs to answer `unknown`: facts for its manifest, and the names of its files; none without it."""

    facts: Unknown | None = None
    files: tuple[str, ...] = ()


def learn(
    folder: Path, prepared: Prepared, fitted: Fitted, observer: Observer, folds: "Sequence[FoldFeatures]" = ()
) -> Learnt:
    """Choose a score, set its threshold, and write what the run needs into `folder`; nothing without `unknown`.

    fitted: the head on the features of `prepared`. folds: see `of_folds`. Raises `DataError` when
    too few photos can set the threshold, and `StorageError`.
    """
    config, classes = prepared.config, prepared.data.classes
    if config.unknown is None:
        return Learnt()
    rate = config.unknown.false_rejects
    with (
        timed(prepared.seconds, "unknown"),
        observer.stage("score for unknown photos", None, "classes") as advance,
        one_blas_thread(),
    ):
        known = of_validation(prepared, fitted) if config.data.folds is None else of_folds(prepared, fitted, folds)
        found = choose(known.materials, len(classes), rate, advance)
        energy_weight = known.choosing.energy_weight() if found.score == BOTH else 0.0
        scores = known.held_out.scores(energy_weight)
    facts = Unknown(
        false_rejects=rate,
        interval=interval(rate, len(scores)) if config.data.folds is None else None,
        references=len(known.references),
        held_out=len(scores),
        energy_weight=energy_weight,
        detection={classes[label]: share for label, share in found.detection.items()},
        compared=found.compared,
        tuned=prepared.backbone.fingerprint != prepared.backbone.original,
    )
    names = stored.write(folder, known.references.astype(np.float16), np.sort(scores))
    return Learnt(facts, tuple(names))


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of the score of some photos: distances and energies, ``float64 (n,)`` each."""

    distances: NDArray[np.float64]
    energies: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.float32], references: NDArray[np.float32], head: Head | None) -> "Terms":
        """Of features ``(n, D)``; without a head, the energies are 0."""
        energies = np.zeros(len(features)) if head is None else novelty.energies(head.logits(features))
        return cls(novelty.distances(features, references), energies)

    @classmethod
    def joined(cls, parts: "Sequence[Terms]") -> "Terms":
        """The terms of all photos of `parts`."""
        return cls(np.concatenate([p.distances for p in parts]), np.concatenate([p.energies for p in parts]))

    def energy_weight(self) -> float:
        """The weight with which the energy varies as much as the distance."""
        return float(self.distances.std() / self.energies.std()) if self.energies.std() > 0 else 0.0

    def scores(self, energy_weight: float) -> NDArray[np.float64]:
        """The scores ``(n,)``."""
        return self.distances + energy_weight * self.energies


@dataclass(frozen=True, eq=False)
class Known:
    """What a run knows of its own kind of photos.

    materials: by which the score is chosen. references: ``float32 (r, D)``, as they are stored. choosing: terms of the
    photos that choose the weight of the energy; held_out: of those that set the threshold. With folds these are the
    same: all that are held out once.
    """

    materials: "Sequence[Material]"
    references: NDArray[np.float32]
    choosing: Terms
    held_out: Terms


def of_validation(prepared: Prepared, fitted: Fitted) -> Known:
    """What is known from the validation photos. Raises `DataError` as `sets_threshold` does."""
    val, config = prepared.parts["val"], prepared.config
    mask = sets_threshold(val.samples, config)
    choosing = _part(val, ~mask)
    rows = references(prepared.parts["train"].samples)
    features = np.asarray(prepared.parts["train"].array[rows, 0])
    judges = np.asarray(choosing.array[:, 0]), labels_of(choosing.samples)
    material = _material(prepared, fitted.l2, (rows, features), judges)
    return Known(
        [material],
        material.references,
        Terms.of(material.val_features, material.references, fitted.head),
        Terms.of(np.asarray(val.array[mask, 0]), material.references, fitted.head),
    )


@dataclass(frozen=True, eq=False)
class FoldFeatures:
    """A fold, and references outside it, as the backbone sees both that has not learned from the fold.

    rows, outside: which training photos these are ``(m,)``, ``(r,)``; features ``(m, D)`` and references ``(r, D)``.
    """

    rows: NDArray[np.intp]
    outside: NDArray[np.intp]
    features: NDArray[np.float32]
    references: NDArray[np.float32]


def of_folds(prepared: Prepared, fitted: Fitted, folds: Sequence[FoldFeatures] = ()) -> Known:
    """What is known from the photos that are held out once: `fitted` has their out-of-fold logits.

    folds: of a backbone that was tuned without each of them; by default they have the features of `prepared`, whose
    backbone has learned from none of these photos. The score is chosen by the photos of the first folds, `_CHOOSING` or
    a few more, because every fold takes a head for each class that is left out. Raises `DataError` when too few photos
    are held out.
    """
    train, config, logits = prepared.parts["train"], prepared.config, fitted.out_of_fold
    assert logits is not None
    _refuse_too_few(train.samples, config)
    labels = labels_of(train.samples)
    materials: list[Material] = []
    terms = []
    for fold in folds or _by_one_backbone(prepared):
        distances = novelty.distances(fold.features, as_stored(fold.references))
        terms.append(Terms(distances, novelty.energies(logits[fold.rows])))
        if sum(len(material.val_labels) for material in materials) < _CHOOSING:
            judges = fold.features, labels[fold.rows]
            materials.append(_material(prepared, fitted.l2, (fold.outside, fold.references), judges))
    own = Terms.joined(terms)
    return Known(materials, as_stored(np.asarray(train.array[references(train.samples), 0])), own, own)


def _by_one_backbone(prepared: Prepared) -> Iterator[FoldFeatures]:
    """The folds with the features of `prepared`."""
    train, held_out = prepared.parts["train"], prepared.validating.array
    for rows, outside in by_fold(train.samples):
        yield FoldFeatures(rows, outside, np.asarray(held_out[rows, 0]), np.asarray(train.array[outside, 0]))


def by_fold(samples: Sequence[Sample]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """For each fold, the rows ``(m,)`` of its photos and those ``(r,)`` of references outside it, both ascending."""
    folds = np.array([sample.fold or 0 for sample in samples])
    for fold in np.unique(folds[folds > 0]):
        outside = np.flatnonzero(folds != fold)
        yield np.flatnonzero(folds == fold), outside[references([samples[int(i)] for i in outside])]


def _material(
    prepared: Prepared,
    l2: float,
    known: tuple[NDArray[np.intp], NDArray[np.float32]],
    judges: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> "Material":
    """What the score is chosen by.

    known: which training photos are references, and their features; judges: the features of the photos that choose,
    and their labels.
    """
    rows, features = known
    val_features, val_labels = judges
    config, train = prepared.config, prepared.parts["train"]
    labels = labels_of(train.samples)
    weights = class_weights(labels, config.training.class_weights, prepared.data.classes)
    return Material(
        features=features,
        labels=labels[rows],
        weights=weights[rows],
        references=as_stored(features),
        val_features=val_features,
        val_labels=val_labels,
        # The objective has the mean loss: with fewer photos, the same prior is a larger penalty.
        l2=l2 * len(labels) / len(rows),
        label_smoothing=config.training.label_smoothing,
    )


def as_stored(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """References of features ``(r, D)``: with length 1, rounded as the run's file holds them."""
    return novelty.unit(features).astype(np.float16).astype(np.float32)


def references(samples: Sequence[Sample], most: int = MOST_REFERENCES) -> NDArray[np.intp]:
    """Which photos ``(r,)``, ascending, are references: at most `most`, as many of each class as can be.

    By digest, so that the order of the files is of no account; of copies one.
    """
    first = {sample.digest: i for i, sample in reversed(list(enumerate(samples)))}
    by_class: dict[int, list[int]] = {}
    for _digest, i in sorted(first.items()):
        by_class.setdefault(samples[i].label, []).append(i)
    ranked = sorted((rank, label, i) for label, own in by_class.items() for rank, i in enumerate(own))
    return np.sort(np.array([i for _rank, _label, i in ranked[:most]], np.intp))


@dataclass(frozen=True, eq=False)
class Material:
    """What the score is chosen by.

    features: ``float32 (r, D)`` of the references, as the backbone gives them, with labels and weights ``(r,)``;
    references: the same with length 1, as they are stored. val_features, val_labels: ``(n, D)``, ``(n,)`` of the
    photos that choose: validation photos or those of a fold. l2: of heads that are fitted on the references.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    references: NDArray[np.float32]
    val_features: NDArray[np.float32]
    val_labels: NDArray[np.int64]
    l2: float
    label_smoothing: float = 0.0

    def without(self, label: int) -> "Material":
        """The same without a class; later classes move up by one."""
        kept, val_kept = self.labels != label, self.val_labels != label
        labels, val_labels = self.labels[kept], self.val_labels[val_kept]
        return replace(
            self,
            features=self.features[kept],
            labels=labels - (labels > label),
            weights=self.weights[kept],
            references=self.references[kept],
            val_features=self.val_features[val_kept],
            val_labels=val_labels - (val_labels > label),
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """The score, the share of each left-out class that it refused, and the mean of these shares for every score."""

    score: str
    detection: dict[int, float]
    compared: dict[str, float]


def choose(materials: Sequence[Material], n_classes: int, rate: float, advance: Advance) -> Choice:
    """The score that refuses most photos of classes that were left out, where `rate` of the others are refused.

    Both scores hold the distance, because the energy alone takes photos of another kind for confident answers; the
    energy must gain to be added. With two classes a head without one of them says nothing, so the distance is taken.
    So it is if no class can be left out, and nothing is compared. Of several `materials`, each with references and a
    head of its own, all photos are taken together. `advance` gets 1 after every class.
    """
    present = np.intersect1d(
        np.concatenate([material.labels for material in materials]),
        np.concatenate([material.val_labels for material in materials]),
    )
    spread = np.linspace(0, len(present) - 1, min(len(present), MOST_LEFT_OUT)).astype(np.intp)
    names = (DISTANCE, BOTH) if n_classes > 2 else (DISTANCE,)
    shares: dict[str, dict[int, float]] = {name: {} for name in names}
    for label in present[spread]:
        parts = [_without_class(material, int(label), n_classes) for material in materials]
        known, strangers = (Terms.joined(terms) for terms in zip(*parts, strict=True))
        if not len(known.distances):
            continue
        for name in names:
            weight = known.energy_weight() if name == BOTH else 0.0
            # Of n photos, a share of k / (n + 1) is expected above the k-th highest.
            threshold = np.quantile(known.scores(weight), 1 - rate, method="weibull")
            shares[name][int(label)] = float((strangers.scores(weight) > threshold).mean())
        advance(1)
    compared = {name: float(np.mean([*by_class.values()])) for name, by_class in shares.items() if by_class}
    best = max(compared, key=compared.__getitem__, default=DISTANCE)  # the first of equals
    return Choice(best, shares[best], compared)


def _without_class(material: Material, label: int, n_classes: int) -> tuple[Terms, Terms]:
    """The terms of the photos that choose and show another class, and of all photos of the class, without it."""
    rest = material.without(label)
    head = None
    if n_classes > 2:
        data = HeadData.of(rest.features, rest.labels, n_classes - 1, rest.weights)
        head = fit_lbfgs(data, rest.l2, rest.label_smoothing)
    strangers = np.concatenate(
        [material.features[material.labels == label], material.val_features[material.val_labels == label]]
    )
    return Terms.of(rest.val_features, rest.references, head), Terms.of(strangers, rest.references, head)


def interval(rate: float, held_out: int) -> tuple[float, float]:
    """Between which shares of its own kind of photos 95 % of the runs with so many held-out photos refuse.

    Given the held-out photos, that share has the distribution Beta(k, m + 1 - k) with k = floor(rate (m + 1)) for m
    photos and a score without ties (Vovk 2012, https://arxiv.org/abs/1209.2673); its mean is k / (m + 1) <= rate.
    """
    from scipy.special import betaincinv

    k = int(np.floor(rate * (held_out + 1) + 1e-9))
    low, high = betaincinv(k, held_out + 1 - k, [0.025, 0.975])
    return float(low), float(high)


def _part(features: Features, mask: NDArray[np.bool_]) -> Features:
    samples = tuple(sample for sample, taken in zip(features.samples, mask, strict=True) if taken)
    return replace(features, array=features.array[mask], samples=samples)
