"""A process that uses a feature store, for `test_faults.py` to kill or to race.

python cacher.py write FOLDER FIRST     rows FIRST, FIRST + 1, ... in batches of 8, each printed once stored
python cacher.py both FOLDER FIRST      writes 200 rows from FIRST on and reads all below 400 between batches
python cacher.py prune FOLDER BYTES     shrinks the store
"""

import sys
from pathlib import Path

import numpy as np
from numpy.testing import assert_array_equal

from finetune_cli.cache import features


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def row(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=1280).astype(np.float32)


def check(store: features.FeatureStore, numbers) -> int:
    """How many of the rows are there; each must be right."""
    found = store.get([key(i) for i in numbers])
    for name, array in found.items():
        assert_array_equal(array, row(int.from_bytes(name, "big")), strict=True)
    return len(found)


def write(folder: Path, first: int) -> None:
    with features.FeatureStore(folder) as store:
        while "cannot be written" not in "".join(store.warnings):
            store.put([(key(i), row(i)) for i in range(first, first + 8)])
            first += 8
            print(first, flush=True)
    raise SystemExit(store.warnings)


def both(folder: Path, first: int) -> None:
    with features.FeatureStore(folder) as store:
        for start in range(first, first + 200, 8):
            store.put([(key(i), row(i)) for i in range(start, start + 8)])
            check(store, range(400))
            assert check(store, range(first, start + 8)) == start + 8 - first
    assert store.warnings == [], store.warnings


if __name__ == "__main__":
    action, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if action == "prune":
        features.prune(folder, number)
    else:
        {"write": write, "both": both}[action](folder, number)
