"""`predict`: photos in, one `PredictionRow` per photo out, streaming; neither TensorFlow nor Keras is imported."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import places
from finetune_cli.engines.engine import Engine, Local
from finetune_cli.errors import BadImage, UsageError
from finetune_cli.inference.predictor import (
    PHOTOS_A_CALL,
    UNKNOWN,
    UNSURE,
    Answer,
    AnswerWork,
    Finished,
    Predictor,
    RunPredictor,
    Source,
    best,
    chunks,
    unknown_rate,
)
from finetune_cli.parallel import cores, groups_available
from finetune_cli.photos import decode as images
from finetune_cli.places import Place
from finetune_cli.storage import masked
from finetune_cli.text import address

__all__ = ["UNKNOWN", "UNSURE", "Limits", "PredictionRow", "Predictor", "RunPredictor", "predict"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a photo is not answered with a class.

    min_confidence: below this probability the answer is `unsure`. unknown: up to this p-value it is `unknown`; None for
    the run's own rate, 0 for never.
    """

    min_confidence: float = 0.0
    unknown: float | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """How photos go through.

    at_once: every path is answered before the next one is waited for, as a program that writes one at a time expects.
    engine: by default the threads of this process; one that uses others needs a predictor that has its `Source`.
    """

    at_once: bool = False
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """The answer for one photo, or the reason why there is none.

    label: the most probable class; `unknown` when the photo is unlike the training photos; or else `unsure` when the
    probability is below the minimum confidence. top: (class, probability) pairs, best first. p_value: of the held-out
    photos, about the share that is less like the training photos than this one; None if the model cannot tell.
    """

    path: str
    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]
    error: str | None
    p_value: float | None = None

    def to_json(self) -> dict[str, object]:
        """The row of a JSON Lines file."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": probability} for label, probability in self.top],
            "error": self.error,
            "p_value": self.p_value,
        }


_Answered = list[tuple[Place, Answer | BadImage]]


@dataclass(frozen=True)
class _PredictTask:
    """Photos answered by a model, for any engine; see `engine.Task`."""

    predictor: Predictor

    def work(self) -> AnswerWork[Place]:
        """For this process."""
        return _work(self.predictor)

    def recipe(self) -> "_PredictRecipe":
        """For other processes."""
        return _PredictRecipe(self._source.finished)

    def files(self) -> Mapping[str, bytes]:
        """Those of the model."""
        return self._source.files

    def names(self, item: tuple[Place, ...]) -> list[str]:
        """The paths of photos."""
        return [masked(str(path)) for path in item]

    @property
    def _source(self) -> Source:
        assert isinstance(self.predictor, RunPredictor)
        assert self.predictor.source is not None
        return self.predictor.source


@dataclass(frozen=True)
class _PredictRecipe:
    """Makes the work of a `_PredictTask` of the model's files, on one core."""

    finished: Finished
    tolerated: tuple[str, ...] = ()

    def work(self, files: Mapping[str, bytes]) -> AnswerWork[Place]:
        """See `engine.Recipe.work`."""
        return _work(RunPredictor(Source(self.finished, files), 1))


def _work(predictor: Predictor) -> AnswerWork[Place]:
    def decode(path: Place) -> NDArray[np.uint8]:
        try:
            return images.decode(path, predictor.settings)
        except UsageError as exc:  # an address on standard input that cannot be used
            raise BadImage(masked(str(path)), exc.problem, exc.remedy) from exc

    return AnswerWork(predictor, decode)


def predict(
    predictor: Predictor,
    paths: Iterable[Place],
    top_k: int,
    limits: Limits = Limits(),
    flow: Flow = Flow(),
) -> Iterator[PredictionRow]:
    """One `PredictionRow` per path, in order, on all cores; memory does not grow with the number of paths.

    Raises `UsageError` when `limits` asks for an answer that is also the name of a class, or that `predictor` cannot
    give.
    """
    rate = unknown_rate(predictor, limits.unknown)
    if limits.min_confidence and UNSURE in predictor.classes:
        raise UsageError(
            f"this model has a class named {UNSURE}, which is also the answer below --min-confidence",
            "drop --min-confidence and compare the probability that --format csv or jsonl gives; "
            "or train again with another name for that class",
        )
    engine, limits = flow.engine or Local(cores()), Limits(limits.min_confidence, rate)
    if flow.at_once:
        answered = engine.map(_PredictTask(predictor), groups_available(paths, PHOTOS_A_CALL))
    else:
        others = iter(paths)
        first = list(itertools.islice(others, 1))
        groups = chunks(itertools.chain(first, others))
        answered = engine.map(_PredictTask(predictor), groups, places.stored(first))
    return _rows(answered, predictor.classes, min(top_k, len(predictor.classes)), limits)


def _rows(answered: Iterable[_Answered], classes: Sequence[str], top_k: int, limits: Limits) -> Iterator[PredictionRow]:
    for path, answer in itertools.chain.from_iterable(answered):
        if isinstance(answer, BadImage):
            typed = address(path) if isinstance(path, Path) else None
            reason = answer.reason if typed is None else "this is an address; download the photo and name the file"
            yield PredictionRow(typed or masked(str(path)), None, None, (), reason)
        else:
            top = best(answer.probabilities, classes, top_k)
            yield PredictionRow(str(path), labelled(answer, top, limits), top[0][1], top, None, answer.p_value)


def labelled(answer: Answer, top: Sequence[tuple[str, float]], limits: Limits) -> str:
    """The label of a photo with the classes `top`: `unknown` comes before `unsure`, and both before a class."""
    label, probability = top[0]
    if answer.p_value is not None and limits.unknown is not None and answer.p_value <= limits.unknown:
        return UNKNOWN
    return label if probability >= limits.min_confidence else UNSURE
