"""The files with which a run refuses photos that are unlike its training photos: two arrays in NumPy's `.npy` form.

    unknown-references.npy   features of training photos, float16 (r, D), with length 1
    unknown-scores.npy       the scores of the held-out photos, float64 (m,), ascending

`run.json` says how many rows they have, and which weight the energy has in the score.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.errors import RunError
from finetune_cli.metrics.novelty import NoveltyScore
from finetune_cli.runs.run import Run

# What NumPy raises for a header that it did not write: it reads the text as a Python literal.
_NOT_OURS = (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError)
REFERENCES, SCORES = "unknown-references.npy", "unknown-scores.npy"


@dataclass(frozen=True, eq=False)
class Novelty:
    """What a run needs for a p-value: its score, and the scores of the held-out photos, ``float64 (m,)``, ascending.

    false_rejects: the p-value from which on a photo is refused.
    """

    score: NoveltyScore
    held_out: NDArray[np.float64]
    false_rejects: float


def write(folder: Path, references: NDArray[np.float16], held_out: NDArray[np.float64]) -> list[str]:
    """Write the arrays into the run `folder`; returns the names of the files. Raises `StorageError`."""
    for name, array in ((REFERENCES, references), (SCORES, held_out)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files.write_bytes(folder / name, buffer.getvalue(), folder)
    return [REFERENCES, SCORES]


def read(run: Run) -> Novelty | None:
    """What `run` needs for p-values; None if it was trained without. Raises `RunError` when a file is not its own."""
    facts = run.manifest.unknown
    if facts is None:
        return None
    references = _array(run, REFERENCES, np.dtype("<f2"), (facts.references, run.manifest.backbone.width))
    held_out = _array(run, SCORES, np.dtype("<f8"), (facts.held_out,))
    if (np.diff(held_out) < 0).any():
        raise _damaged(run, SCORES, "its scores do not ascend")
    score = NoveltyScore(references.astype(np.float32), facts.energy_weight)
    return Novelty(score, held_out, facts.false_rejects)


def _array(run: Run, name: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in a file of a run that may be a stranger's: it must have this type and shape, and be finite.

    Only the header is parsed, by NumPy; an array of the size that it claims is not made before the size is compared.
    """
    file = io.BytesIO(run.read(name))
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its version is not 1.0")
        found, by_columns, found_kind = np.lib.format.read_array_header_1_0(file)
    except _NOT_OURS as exc:
        raise _damaged(run, name, "it is no array of NumPy") from exc
    data = file.read()
    if (found, by_columns, found_kind) != (shape, False, kind) or len(data) != kind.itemsize * math.prod(shape):
        raise _damaged(run, name, f"it is not the array of shape {shape} that run.json describes")
    array = np.frombuffer(data, kind).reshape(shape)
    if not np.isfinite(array).all():
        raise _damaged(run, name, "it holds values that are not finite")
    return array


def _damaged(run: Run, name: str, why: str) -> RunError:
    return RunError(f"{run.folder / name} is damaged: {why}", "restore the run from a copy, or train again")
