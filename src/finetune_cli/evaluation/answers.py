"""Photos through a finished run, streaming: `Sample`s in, probabilities ``(n, C)`` out.

A photo that cannot be used (gone, changed, undecodable) is listed with its reason, and the others are answered.
Neither TensorFlow nor SciPy is imported.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_cli import places
from finetune_cli.engines.engine import Engine
from finetune_cli.errors import BadImage, RunError
from finetune_cli.evaluation.photos import pixels
from finetune_cli.inference.predictor import Finished, InsightfulPredictor, Source, chunks
from finetune_cli.parallel import cores
from finetune_cli.photos import decode, probe
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance
from finetune_cli.runs import novelty as stored
from finetune_cli.runs.run import Run
from finetune_cli.tables import parse_csv

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


@dataclass(frozen=True)
class _AnswerWork:
    """The answers for a few photos, with the features of all of them."""

    predictor: InsightfulPredictor

    def __call__(self, chunk: Sequence[Sample]) -> Answers:
        """See `answer`."""
        return _answer_chunk(self.predictor, chunk)

    def probe(self) -> dict[str, str]:
        """See `engine.Work.probe`."""
        photo = decode.decode(probe.photo(), self.predictor.settings)
        insight = self.predictor.insight(photo[None])
        return {
            "pixels": probe.digest(photo),
            "features": probe.digest(insight.features),
            "probabilities": probe.digest(insight.probabilities),
        }


@dataclass(frozen=True)
class _AnswerTask:
    """Photos answered by a run, for any engine; see `engine.Task`."""

    source: Source
    predictor: InsightfulPredictor

    def work(self) -> _AnswerWork:
        """For this process."""
        return _AnswerWork(self.predictor)

    def recipe(self) -> "_AnswerRecipe":
        """For other processes."""
        return _AnswerRecipe(self.source.finished)

    def files(self) -> Mapping[str, bytes]:
        """Those of the model."""
        return self.source.files

    def names(self, item: Sequence[Sample]) -> list[str]:
        """The paths of photos."""
        return [str(sample.path) for sample in item]


@dataclass(frozen=True)
class _AnswerRecipe:
    """Makes the work of an `_AnswerTask` of the model's files, on one core."""

    finished: Finished
    tolerated: tuple[str, ...] = ()

    def work(self, files: Mapping[str, bytes]) -> _AnswerWork:
        """See `engine.Recipe.work`."""
        return _AnswerWork(InsightfulPredictor(Source(self.finished, files), 1))


def answer(run: Run, samples: Sequence[Sample], engine: Engine, advance: Advance) -> Answers:
    """What `run` answers for `samples`; calls `advance` with the number of photos after each few of them."""
    source = Source.of(run, stored.read(run))
    predictor = InsightfulPredictor(source, cores())
    stride = math.ceil(len(samples) / _FEATURE_ROWS) or 1
    answered: list[Sample] = []
    bad: list[BadPhoto] = []
    probabilities = [np.zeros((0, len(run.classes)), np.float32)]
    features = [np.zeros((0, len(predictor.end.kernel)), np.float32)]
    p = [np.zeros(0)]
    in_store = places.stored(sample.path for sample in samples)
    for part in engine.map(_AnswerTask(source, predictor), chunks(samples), in_store):
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


def out_of_fold(run: Run, samples: Sequence[Sample]) -> Answers | None:
    """What the heads that were fitted without a photo's fold answered for `samples`, as the run has recorded it.

    None unless all of them were cross-validated in `run`: a photo is recognised by its content. There are no features.
    Raises `RunError` when predictions.csv is damaged.
    """
    if "folds" not in run.manifest.metrics:
        return None
    name = {row.digest: row.path for row in run.split() if row.fold}
    if not all(sample.digest in name for sample in samples):
        return None
    try:
        rows = parse_csv(run.read("predictions.csv"), ("split", "path", "true", "predicted", *run.classes))
        known = {row[1]: np.array(row[4:], np.float32) for row in rows if row[0] == "folds"}
        probabilities = np.stack([known[name[sample.digest]] for sample in samples])
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("a probability is not between 0 and 1")
    except (ValueError, KeyError, csv.Error) as exc:
        raise RunError(f"{run.folder}/predictions.csv is damaged: {exc}", "restore the run from a copy") from exc
    return Answers(tuple(samples), probabilities, np.zeros((0, run.manifest.backbone.width), np.float32), 1, ())


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


def seen_in_training(run: Run, samples: Iterable[Sample]) -> int:
    """How many of `samples` are, byte for byte, among the training photos of `run`."""
    trained_on = {row.digest for row in run.split() if row.split == "train"}
    return sum(sample.digest in trained_on for sample in samples)
