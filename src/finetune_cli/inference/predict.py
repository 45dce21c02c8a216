"""`predict`: photos in, one `PredictionRow` per photo out, streaming; neither TensorFlow nor Keras is imported."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage, UsageError
from finetune_cli.inference.predictor import PHOTOS_A_CALL, UNSURE, Predictor, RunPredictor, answers, best, chunks
from finetune_cli.parallel import cores, groups_available
from finetune_cli.photos import decode as images
from finetune_cli.text import address

__all__ = ["UNSURE", "PredictionRow", "Predictor", "RunPredictor", "predict"]


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """The answer for one photo, or the reason why there is none.

    label: the most probable class, or `unsure` when its probability is below the minimum confidence. top: (class,
    probability) pairs, best first.
    """

    path: str
    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]
    error: str | None

    def to_json(self) -> dict[str, object]:
        """The row of a JSON Lines file."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": probability} for label, probability in self.top],
            "error": self.error,
        }


def predict(
    predictor: Predictor, paths: Iterable[Path], top_k: int, min_confidence: float = 0.0, at_once: bool = False
) -> Iterator[PredictionRow]:
    """One `PredictionRow` per path, in order, on all cores; memory does not grow with the number of paths.

    at_once: every path is answered before the next one is waited for, as a program that writes one at a time expects.
    Raises `UsageError` when `min_confidence` asks for the answer `unsure` and a class has that name.
    """
    if min_confidence and UNSURE in predictor.classes:
        raise UsageError(
            f"this model has a class named {UNSURE}, which is also the answer below --min-confidence",
            "drop --min-confidence and compare the probability that --format csv or jsonl gives; "
            "or train again with another name for that class",
        )
    groups = groups_available(paths, PHOTOS_A_CALL) if at_once else chunks(paths)
    return _predict(predictor, groups, top_k, min_confidence)


def _predict(
    predictor: Predictor,
    groups: Iterable[tuple[Path, ...] | None],
    top_k: int,
    min_confidence: float,
) -> Iterator[PredictionRow]:
    top_k = min(top_k, len(predictor.classes))

    def decode(path: Path) -> NDArray[np.uint8]:
        return images.decode(path, predictor.settings)

    for path, answer in answers(predictor, groups, decode, cores()):
        if isinstance(answer, BadImage):
            typed = address(path)
            reason = answer.reason if typed is None else "this is an address; download the photo and name the file"
            yield PredictionRow(typed or str(path), None, None, (), reason)
        else:
            yield _prediction(str(path), answer, predictor.classes, top_k, min_confidence)


def _prediction(
    path: str, probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int, min_confidence: float
) -> PredictionRow:
    top = best(probabilities, classes, top_k)
    label, probability = top[0]
    return PredictionRow(path, label if probability >= min_confidence else UNSURE, probability, top, None)
