"""Photos through a finished run, streaming: `Sample`s in, probabilities ``(n, C)`` out.

A photo that cannot be used (gone, changed, undecodable) is listed with its reason, and the others are answered.
Neither TensorFlow nor SciPy is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage
from finetune_cli.evaluation.photos import pixels
from finetune_cli.inference.predictor import InsightfulPredictor, chunks
from finetune_cli.parallel import ordered_map
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance
from finetune_cli.runs import novelty as stored
from finetune_cli.runs.run import Run

# At most so many rows of features are stored, evenly spread over the photos: enough for any comparison.
_FEATURE_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Answers:
    """What a run answers for `samples`: probabilities ``float32 (n, C)``. bad: photos that have no answer.

    features: ``float32 (m, D)``, the input of the head, of every `stride`-th photo: refitted heads are judged by them.
    p_values: ``float64 (n,)``, how unlike the training photos each photo is; None if the run cannot tell.
    """

    samples: tuple[Sample, ...]
    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    stride: int
    bad: tuple[BadPhoto, ...]
    p_values: NDArray[np.float64] | None = None

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """``int64 (n,)``: the true class of every photo."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """``int64 (n,)``: the most probable class of every photo, the first of equals."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)


def answer(run: Run, samples: Sequence[Sample], workers: int, advance: Advance) -> Answers:
    """What `run` answers for `samples`; calls `advance` with the number of photos after each few of them."""
    predictor = InsightfulPredictor(run, workers, known=stored.read(run))
    stride = math.ceil(len(samples) / _FEATURE_ROWS) or 1
    answered: list[Sample] = []
    bad: list[BadPhoto] = []
    probabilities = [np.zeros((0, len(run.classes)), np.float32)]
    features = [np.zeros((0, len(predictor.end.kernel)), np.float32)]
    p = [np.zeros(0)]
    for part in ordered_map(lambda chunk: _answer_chunk(predictor, chunk), chunks(samples), workers):
        advance(len(part.samples) + len(part.bad))
        bad += part.bad
        features.append(part.features[-len(answered) % stride :: stride])
        answered += part.samples
        probabilities.append(part.probabilities)
        if part.p_values is not None:
            p.append(part.p_values)
    return Answers(
        tuple(answered),
        np.concatenate(probabilities),
        np.concatenate(features),
        stride,
        tuple(bad),
        None if predictor.novelty is None else np.concatenate(p),
    )


def _answer_chunk(predictor: InsightfulPredictor, chunk: Sequence[Sample]) -> Answers:
    """The answers for a few photos, with the features of all of them."""
    samples: list[Sample] = []
    bad: list[BadPhoto] = []
    photos = []
    for sample in chunk:
        try:
            photos.append(pixels(sample, predictor.settings))
            samples.append(sample)
        except BadImage as exc:
            bad.append(BadPhoto(sample.path, sample.name, exc.reason))
    if not photos:
        width, classes = predictor.end.kernel.shape
        return Answers((), np.zeros((0, classes), np.float32), np.zeros((0, width), np.float32), 1, tuple(bad))
    insight = predictor.insight(np.stack(photos))
    return Answers(tuple(samples), insight.probabilities, insight.features, 1, tuple(bad), insight.p_values)
