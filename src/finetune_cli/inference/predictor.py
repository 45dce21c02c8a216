"""A finished run that answers for photos; neither TensorFlow nor Keras is imported."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage, RunError, UsageError
from finetune_cli.inference import linear_end
from finetune_cli.inference.linear_end import ModelEnd
from finetune_cli.inference.novelty import add_score
from finetune_cli.inference.runtimes import OpenVinoRuntime, parse_ir
from finetune_cli.metrics import novelty
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import decode as images
from finetune_cli.photos import probe
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs import novelty as stored
from finetune_cli.runs.novelty import Novelty
from finetune_cli.runs.run import Run

if TYPE_CHECKING:
    import openvino

PHOTOS_A_CALL = 4
Photo = TypeVar("Photo")
UNKNOWN = "unknown"  # the label of a photo that is less like the training photos than the held-out ones
UNSURE = "unsure"  # the label of a photo whose best class is below the minimum confidence


class Predictor(Protocol):
    """Anything that answers for photos: a run, or one of its exports."""

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in the order of the outputs."""
        ...

    @property
    def settings(self) -> ImageSettings:
        """How photos are decoded."""
        ...

    def probabilities(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` RGB -> ``float32 (n, C)``; may be called from several threads."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Answer:
    """The probabilities ``float32 (C,)`` of a photo, and its p-value if the predictor has one for photos."""

    probabilities: NDArray[np.float32]
    p_value: float | None


@dataclass(frozen=True, eq=False)
class Finished:
    """What a predictor takes from a finished run: small and picklable, and without the files of the model.

    name: of the run, for errors. width: of a feature. novelty: what p-values need, or None.
    """

    name: str
    classes: tuple[str, ...]
    settings: ImageSettings
    temperature: float
    width: int
    novelty: Novelty | None


_GRAPH, _WEIGHTS = "inference/model.xml", "inference/model.bin"


@dataclass(frozen=True, eq=False)
class Source:
    """A finished run, read once: what predictors are made of, in this process or in another one.

    files: name -> content of the model's two files, whose SHA-256 was compared with that in run.json.
    """

    finished: Finished
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, run: Run, novelty: Novelty | None = None) -> Self:
        """novelty: what p-values need, for a caller who wants them. Raises `RunError` when a file is damaged."""
        width = run.manifest.backbone.width
        finished = Finished(str(run.folder), run.classes, run.image_settings, run.temperature, width, novelty)
        return cls(finished, {name: run.read(name) for name in (_WEIGHTS, _GRAPH)})

    def model(self) -> "openvino.Model":
        """The OpenVINO form of the run. Raises `RunError`."""
        return parse_ir(self.files[_GRAPH], self.files[_WEIGHTS], Path(self.finished.name, _GRAPH))

    def end(self, model: "openvino.Model") -> ModelEnd:
        """The linear end of `model`. Raises `RunError` when it does not fit the run."""
        finished = self.finished
        end = linear_end.read_end(model, finished.temperature)
        if end.kernel.shape != (finished.width, len(finished.classes)):
            width, outputs = end.kernel.shape
            problem = (
                f"{finished.name}: the model has {outputs} outputs of {width} features for "
                f"{len(finished.classes)} classes"
            )
            raise RunError(problem, "restore the run from a copy, or train again")
        return end


class RunPredictor:
    """A finished run, through its OpenVINO form, in float32 on the CPU.

    `latency`: all cores work on one photo; otherwise photos are shared out among `workers` threads. `novelty`: what
    p-values need, None if the run was trained without. `source`: what it was made of, if that was a `Source`.
    """

    def __init__(self, run: Run | Source, workers: int, latency: bool = False) -> None:
        self.source = run if isinstance(run, Source) else None
        source = run if isinstance(run, Source) else Source.of(run, stored.read(run))
        self.classes = source.finished.classes
        self.settings = source.finished.settings
        self.novelty = source.finished.novelty
        model = source.model()
        if self.novelty is not None:
            add_score(model, source.end(model), self.novelty.score)
        self._runtime = OpenVinoRuntime(model, "float32", workers, latency)

    def probabilities(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` RGB -> ``float32 (n, C)``."""
        return self._runtime.infer(photos)

    def answers(self, photos: NDArray[np.uint8]) -> list[Answer]:
        """``uint8 (n, H, W, 3)`` RGB -> n answers, with p-values if the run has them, from one pass of the model."""
        if self.novelty is None:
            return [Answer(row, None) for row in self.probabilities(photos)]
        probabilities, scores = self._runtime.infer_all(photos)
        p = novelty.p_values(scores[:, 0], self.novelty.held_out)
        return [Answer(row, float(value)) for row, value in zip(probabilities, p, strict=True)]


def unknown_rate(predictor: Predictor, wanted: float | None) -> float:
    """The p-value up to which a photo is answered `unknown`: `wanted`, by default that of the run; 0 for never.

    Raises `UsageError` when the predictor has no p-values, or none as low as `wanted`, or a class with that name.
    """
    known = predictor.novelty if isinstance(predictor, RunPredictor) else None
    if known is None:
        if not wanted:
            return 0.0
        who = "this run was trained without `unknown`, so it" if isinstance(predictor, RunPredictor) else "an export"
        raise UsageError(
            f"{who} cannot tell photos that show none of its classes",
            "train with unknown.false_rejects=0.05 in the config, and predict with that run"
            if isinstance(predictor, RunPredictor)
            else "predict with the run that it was made of: --run RUN",
        )
    rate = known.false_rejects if wanted is None else wanted
    if rate and UNKNOWN in predictor.classes:
        raise UsageError(
            f"this model has a class named {UNKNOWN}, which is also the answer for photos of none of the classes",
            "switch that off with --unknown 0, or train again with another name for that class",
        )
    if wanted and len(known.held_out) < novelty.least_held_out(wanted):
        raise UsageError(
            f"a rate of {wanted:g} needs {novelty.least_held_out(wanted)} held-out photos, and this run has "
            f"{len(known.held_out)}",
            f"choose {np.ceil(1000 / (len(known.held_out) + 1)) / 1000:g} or more, "
            "or train again with more validation photos",
        )
    return rate


@dataclass(frozen=True)
class AnswerWork(Generic[Photo]):
    """What is done with a few photos: decode them, and answer. decode: see `answers`."""

    predictor: Predictor
    decode: Callable[[Photo], NDArray[np.uint8]]

    def __call__(self, chunk: tuple[Photo, ...]) -> list[tuple[Photo, Answer | BadImage]]:
        """Each photo with its `Answer`, or with the reason why it has none."""
        found: list[NDArray[np.uint8] | BadImage] = []
        for photo in chunk:
            try:
                found.append(self.decode(photo))
            except BadImage as exc:
                found.append(exc)
        pixels = [item for item in found if not isinstance(item, BadImage)]
        rows = iter(_answers(self.predictor, np.stack(pixels)) if pixels else ())
        return [
            (photo, item if isinstance(item, BadImage) else next(rows))
            for photo, item in zip(chunk, found, strict=True)
        ]

    def probe(self) -> dict[str, str]:
        """See `engine.Work.probe`."""
        photo = images.decode(probe.photo(), self.predictor.settings)
        (answer,) = _answers(self.predictor, photo[None])
        return {"pixels": probe.digest(photo), "probabilities": probe.digest(answer.probabilities)}


def answers(
    predictor: Predictor,
    groups: Iterable[tuple[Photo, ...] | None],
    decode: Callable[[Photo], NDArray[np.uint8]],
    workers: int,
) -> Iterator[tuple[Photo, Answer | BadImage]]:
    """Each photo with its `Answer`, or with the reason why it has none; in order.

    groups: the photos that a thread processes together, see `chunks`; `None` before a long wait. decode: photo ->
    ``uint8 (size, size, 3)``, or it raises `BadImage`. Memory does not grow with the number of photos.
    """
    for answered in ordered_map(AnswerWork(predictor, decode), groups, workers):
        yield from answered


def _answers(predictor: Predictor, photos: NDArray[np.uint8]) -> list[Answer]:
    if isinstance(predictor, RunPredictor):
        return predictor.answers(photos)
    return [Answer(row, None) for row in predictor.probabilities(photos)]


def best(probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int) -> tuple[tuple[str, float], ...]:
    """The `top_k` most probable classes of one photo with their probabilities, best first; of equals, the first."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return tuple((classes[i], float(probabilities[i])) for i in order)


def chunks(photos: Iterable[Photo]) -> Iterator[tuple[Photo, ...]]:
    """`photos` in groups of the size that is the fastest on a CPU."""
    iterator = iter(photos)
    while chunk := tuple(itertools.islice(iterator, PHOTOS_A_CALL)):
        yield chunk


@dataclass(frozen=True, eq=False)
class Insight:
    """The outputs of a model for n photos: probabilities ``(n, C)``, and features ``(n, D)``, the input of the head.

    feature_map: ``(n, h, w, D)``, whose mean over positions the features are, or None if the backbone has none.
    p_values: ``float64 (n,)``, or None if the predictor was made without.
    """

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    feature_map: NDArray[np.float32] | None
    p_values: NDArray[np.float64] | None = None


class InsightfulPredictor:
    """A finished run whose features and feature map can be seen, at the cost of `RunPredictor`.

    It has p-values if `run` is a `Source` with them.

    Raises `RunError` when the run's model does not end in a linear head.
    """

    def __init__(self, run: Run | Source, workers: int, latency: bool = False) -> None:
        source = run if isinstance(run, Source) else Source.of(run)
        model = source.model()
        end = source.end(model)
        model.add_outputs([output for output in (end.features, end.feature_map) if output is not None])
        self.classes = source.finished.classes
        self.settings = source.finished.settings
        self.end = end
        self.novelty = source.finished.novelty
        if self.novelty is not None:
            add_score(model, end, self.novelty.score)
        self._runtime = OpenVinoRuntime(model, "float32", workers, latency)

    def insight(self, photos: NDArray[np.uint8]) -> Insight:
        """``uint8 (n, H, W, 3)`` RGB -> `Insight`; may be called from several threads."""
        probabilities, features, *others = self._runtime.infer_all(photos)
        p = None
        if self.novelty is not None:
            p = novelty.p_values(others.pop()[:, 0], self.novelty.held_out)
        feature_map = linear_end.channels_last(others[0], self.end) if others else None
        return Insight(probabilities, features.reshape(len(photos), -1), feature_map, p)


def read_model(run: Run) -> "openvino.Model":
    """The OpenVINO form of `run`, from the same bytes whose SHA-256 was checked. Raises `RunError`."""
    return Source.of(run).model()
