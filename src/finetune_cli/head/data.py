"""What a head is fitted on: features with labels, weights and groups."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Rows = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class HeadData:
    """Features with what belongs to each photo, or to each row.

    features: ``(photos, views, D)``, or ``(N, D)``; a memory map stays one. labels: ``(n,)``, from 0 to
    ``n_classes - 1``, where n is the number of photos or rows. weights: ``(n,)``. groups: ``(n,)``, numbers; what has
    the same number is on one side of a split. folds: ``(n,)``, in which fold of a cross-validation each is held out,
    from 1; 0 for what never is; None if there are no folds.
    """

    features: Rows
    labels: Ints
    n_classes: int
    weights: Floats
    groups: Ints
    folds: Ints | None = None

    @classmethod
    def of(
        cls,
        features: Rows,
        labels: Ints,
        n_classes: int,
        weights: Floats | None = None,
        groups: Ints | None = None,
    ) -> Self:
        """The data; unless given, all weights are 1 and each photo or row is a group."""
        count = len(features)
        return cls(
            features,
            np.asarray(labels),
            n_classes,
            np.ones(count) if weights is None else np.asarray(weights),
            np.arange(count) if groups is None else np.asarray(groups),
        )

    def rows(self) -> Self:
        """The same with a row for each view: features ``(photos, views, D)`` become ``(photos * views, D)``.

        A row has its photo's weight divided by the number of views, so that a photo counts once however many views it
        has. Only the small arrays are copied.
        """
        photos, views, width = self.features.shape
        return replace(
            self,
            features=self.features.reshape(photos * views, width),
            labels=np.repeat(self.labels, views),
            weights=np.repeat(self.weights, views) / views,
            groups=np.repeat(self.groups, views),
            folds=None if self.folds is None else np.repeat(self.folds, views),
        )

    def part(self, chosen: Any) -> Self:
        """The photos or rows that the index or mask `chosen` selects."""
        return replace(
            self,
            features=self.features[chosen],
            labels=self.labels[chosen],
            weights=self.weights[chosen],
            groups=self.groups[chosen],
            folds=None if self.folds is None else self.folds[chosen],
        )


def views_in_turn(photos: int, views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """``int64 (photos,)``: the view that each photo takes in `epoch`, the first of which is 0.

    In turn, from a random first one, so that all are seen equally often.
    """
    return (np.random.default_rng(seed).integers(0, views, size=photos) + epoch) % views


def class_weights(labels: Ints, spec: str | Mapping[str, float], classes: Sequence[str]) -> Floats:
    """A weight for each row of `labels` (N,): `spec` is 'none', 'balanced', or class name -> weight (others have 1).

    'balanced' gives every class that occurs the same sum: N / (classes that occur * rows of the class). Raises
    `ConfigError` for a name that is not a class.
    """
    labels = np.asarray(labels)
    if isinstance(spec, Mapping):
        for name in spec:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, 1)
                raise ConfigError(
                    f"training.class_weights names {name!r}, which is not a class",
                    f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(classes)}",
                )
        return np.array([spec.get(name, 1.0) for name in classes], np.float64)[labels]
    if spec == "balanced":
        counts = np.bincount(labels, minlength=len(classes))
        return len(labels) / (np.count_nonzero(counts) * counts[labels].astype(np.float64))
    return np.ones(len(labels))
