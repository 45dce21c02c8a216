"""How unlike the training photos a photo is, and how sure that is: features and logits in, p-values out. NumPy only.

    score   = distance + energy_weight * energy
    p-value = (1 + held-out photos with at least this score) / (held-out photos + 1)

distance: cosine distance to the fifth nearest training photo (Sun et al. 2022, https://arxiv.org/abs/2204.06507).
energy: minus the log of the sum of the exponentials of the logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759).
The p-value is that of split conformal prediction (Bates et al. 2023, https://arxiv.org/abs/2104.08279): a photo that is
drawn like the held-out ones gets a p-value of at most r with a probability of at most r, whatever the score is.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]

NEIGHBOURS = 5
# A block has no more distances than this: 32 MB.
_BLOCK_NUMBERS = 1 << 23


@dataclass(frozen=True, eq=False)
class NoveltyScore:
    """A score that is higher for photos that are less like the references.

    references: ``float32 (r, D)``, features of training photos with length 1. energy_weight: of the energy; 0 where the
    distance is used alone.
    """

    references: NDArray[np.float32]
    energy_weight: float

    def __call__(self, features: Numbers, logits: Numbers) -> NDArray[np.float64]:
        """``float64 (n,)`` of features ``(n, D)`` and logits ``(n, C)``, the ones before the temperature."""
        scores = distances(features, self.references)
        return scores + self.energy_weight * energies(logits) if self.energy_weight else scores


def unit(features: Numbers) -> NDArray[np.float32]:
    """Features ``(n, D)`` with length 1, as float32; a row of zeros stays one."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, 1e-12), np.float32)


def distances(features: Numbers, references: NDArray[np.float32]) -> NDArray[np.float64]:
    """``float64 (n,)``: cosine distance, 0 to 2, of features ``(n, D)`` to the `NEIGHBOURS`-th nearest reference.

    references: ``(r, D)`` with length 1; with fewer than `NEIGHBOURS` of them, the farthest counts.
    """
    nth = min(NEIGHBOURS, len(references))
    found = np.empty(len(features))
    step = max(1, _BLOCK_NUMBERS // len(references))
    for start in range(0, len(features), step):
        similarities = unit(features[start : start + step]) @ references.T
        found[start : start + step] = 1 - np.partition(similarities, -nth, axis=1)[:, -nth]
    return found


def energies(logits: Numbers) -> NDArray[np.float64]:
    """``float64 (n,)``: minus the log of the sum of the exponentials of logits ``(n, C)``."""
    values = np.asarray(logits, np.float64)
    largest = values.max(axis=1)
    return np.asarray(-largest - np.log(np.exp(values - largest[:, None]).sum(axis=1)))


def p_values(scores: Numbers, held_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """``float64 (n,)``: the p-value of each of `scores` ``(n,)`` by the scores ``(m,)`` of held-out photos, ascending.

    The least that m photos can give is 1 / (m + 1).
    """
    as_high = len(held_out) - np.searchsorted(held_out, scores, side="left")
    return np.asarray((1 + as_high) / (len(held_out) + 1))


def least_held_out(rate: float) -> int:
    """The least number of held-out photos with which a p-value can be `rate` or less: ceil(1 / rate) - 1."""
    number = max(1, math.ceil(1 / rate) - 2)  # one below, because the division rounds
    while 1 / (number + 1) > rate:
        number += 1
    return number
