"""A finished run that answers for photos; neither TensorFlow nor Keras is imported."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage, RunError
from finetune_cli.inference import linear_end
from finetune_cli.inference.runtimes import OpenVinoRuntime, parse_ir
from finetune_cli.parallel import ordered_map
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs.run import Run

if TYPE_CHECKING:
    import openvino

PHOTOS_A_CALL = 4
Photo = TypeVar("Photo")
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


class RunPredictor:
    """A finished run, through its OpenVINO form, in float32 on the CPU.

    `latency`: all cores work on one photo; otherwise photos are shared out among `workers` threads.
    """

    def __init__(self, run: Run, workers: int, latency: bool = False) -> None:
        self.classes = run.classes
        self.settings = run.image_settings
        self._runtime = OpenVinoRuntime(read_model(run), "float32", workers, latency)

    def probabilities(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` RGB -> ``float32 (n, C)``."""
        return self._runtime.infer(photos)


def answers(
    predictor: Predictor,
    groups: Iterable[tuple[Photo, ...] | None],
    decode: Callable[[Photo], NDArray[np.uint8]],
    workers: int,
) -> Iterator[tuple[Photo, NDArray[np.float32] | BadImage]]:
    """Each photo with its probabilities ``float32 (C,)``, or with the reason why it has none; in order.

    groups: the photos that a thread processes together, see `chunks`; `None` before a long wait. decode: photo ->
    ``uint8 (size, size, 3)``, or it raises `BadImage`. Memory does not grow with the number of photos.
    """

    def work(chunk: tuple[Photo, ...]) -> list[tuple[Photo, NDArray[np.float32] | BadImage]]:
        found: list[NDArray[np.uint8] | BadImage] = []
        for photo in chunk:
            try:
                found.append(decode(photo))
            except BadImage as exc:
                found.append(exc)
        pixels = [item for item in found if not isinstance(item, BadImage)]
        rows = iter(predictor.probabilities(np.stack(pixels)) if pixels else ())
        return [
            (photo, item if isinstance(item, BadImage) else next(rows))
            for photo, item in zip(chunk, found, strict=True)
        ]

    for answered in ordered_map(work, groups, workers):
        yield from answered


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
    """

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    feature_map: NDArray[np.float32] | None


class InsightfulPredictor:
    """A finished run whose features and feature map can be seen, at the cost of `RunPredictor`.

    Raises `RunError` when the run's model does not end in a linear head.
    """

    def __init__(self, run: Run, workers: int, latency: bool = False) -> None:
        model = read_model(run)
        end = linear_end.read_end(model, run.temperature)
        if end.kernel.shape[1] != len(run.classes):
            problem = f"{run.folder}: the model has {end.kernel.shape[1]} outputs for {len(run.classes)} classes"
            raise RunError(problem, "restore the run from a copy, or train again")
        model.add_outputs([output for output in (end.features, end.feature_map) if output is not None])
        self.classes = run.classes
        self.settings = run.image_settings
        self.end = end
        self._runtime = OpenVinoRuntime(model, "float32", workers, latency)

    def insight(self, photos: NDArray[np.uint8]) -> Insight:
        """``uint8 (n, H, W, 3)`` RGB -> `Insight`; may be called from several threads."""
        probabilities, features, *maps = self._runtime.infer_all(photos)
        feature_map = linear_end.channels_last(maps[0], self.end) if maps else None
        return Insight(probabilities, features.reshape(len(photos), -1), feature_map)


def read_model(run: Run) -> "openvino.Model":
    """The OpenVINO form of `run`, from the same bytes whose SHA-256 was checked. Raises `RunError`."""
    name = "inference/model.xml"
    weights = run.read("inference/model.bin")
    return parse_ir(run.read(name), weights, run.folder / name)
