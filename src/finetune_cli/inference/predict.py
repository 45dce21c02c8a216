"""`predict`: photos in, one `Prediction` a photo out, streaming; neither TensorFlow nor Keras is imported."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage
from finetune_cli.inference.predictor import PHOTOS_A_CALL, Predictor, RunPredictor
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos import decode

__all__ = ["UNSURE", "Prediction", "Predictor", "RunPredictor", "predict"]

UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one photo, or the reason why there is none.

    `label` is the most probable class, or `unsure` when its probability is below the wanted confidence; `top` holds
    (class, probability) pairs, best first.
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
    predictor: Predictor, paths: Iterable[Path], top_k: int, workers: int | None = None, min_confidence: float = 0.0
) -> Iterator[Prediction]:
    """One `Prediction` a path, in order; memory does not grow with the number of paths."""
    workers = workers or cores()
    top_k = min(top_k, len(predictor.classes))

    def work(chunk: tuple[Path, ...]) -> list[Prediction]:
        answers: dict[int, Prediction] = {}
        photos: list[NDArray[np.uint8]] = []
        decoded: list[int] = []
        for i, path in enumerate(chunk):
            try:
                photos.append(decode.decode(path, predictor.settings))
                decoded.append(i)
            except BadImage as exc:
                answers[i] = Prediction(str(path), None, None, (), exc.reason)
        if photos:
            for i, row in zip(decoded, predictor.probabilities(np.stack(photos)), strict=True):
                answers[i] = _answer(str(chunk[i]), row, predictor.classes, top_k, min_confidence)
        return [answers[i] for i in range(len(chunk))]

    for predictions in ordered_map(work, _chunks(paths), workers):
        yield from predictions


def _answer(
    path: str, probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int, min_confidence: float
) -> Prediction:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = tuple((classes[i], float(probabilities[i])) for i in order)
    label, probability = top[0]
    return Prediction(path, label if probability >= min_confidence else UNSURE, probability, top, None)


def _chunks(paths: Iterable[Path]) -> Iterator[tuple[Path, ...]]:
    iterator = iter(paths)
    while chunk := tuple(itertools.islice(iterator, PHOTOS_A_CALL)):
        yield chunk
