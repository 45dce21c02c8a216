"""Photos that are unlike all others of the set: screenshots among birds, a logo, a hand before the lens."""

import numpy as np
from numpy.typing import NDArray

from finetune_cli.duplicates import neighbours

_NEIGHBOUR = 10
_FAR = 4.0  # robust standard deviations below the median
FEWEST = 30  # photos of a set; with fewer, nothing is usual


def outliers(features: NDArray[np.float32], workers: int) -> list[tuple[int, float, float]]:
    """The photos, by number, whose tenth nearest neighbour is unusually far, the farthest first.

    `features`: ``float32 (n, D)``. Each comes with its cosine to that neighbour and the median of all. The tenth
    neighbour (Ramaswamy et al. 2000) and not the first, because strangers often come in groups. Cosines of the signed
    square roots of the features, so that a few strong ones do not decide (Hellinger's kernel). Far is more than four
    robust standard deviations (1.4826 times the median absolute deviation) below the median.
    """
    if len(features) < FEWEST:
        return []
    roots = np.abs(features)
    np.copysign(np.sqrt(roots, out=roots), features, out=roots)
    rows = neighbours.directions(roots, centred=False)
    cosines = neighbours.nearest(rows, rows, _NEIGHBOUR, workers)[1][:, -1]
    median = float(np.median(cosines))
    spread = 1.4826 * float(np.median(np.abs(cosines - median)))
    far = np.flatnonzero(cosines < median - _FAR * max(spread, 1e-6))
    return [(int(i), float(cosines[i]), median) for i in far[np.argsort(cosines[far], kind="stable")]]
