"""The Python API: `train` a run, `load` it, and predict with it. docs/python.md is its guide.

`finetune_cli` itself offers these names and imports this module when one of them is first used. Everything here is a
thin layer over what the command line calls. Only `train` and some exports import TensorFlow.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, overload

import numpy as np
from numpy.typing import NDArray

from finetune_cli.config.load import load_config, merge
from finetune_cli.config.schema import Config
from finetune_cli.errors import BadImage, BadPhotos, UsageError
from finetune_cli.inference.predict import Limits, labelled
from finetune_cli.inference.predictor import Answer, RunPredictor, answers, best, chunks, unknown_rate
from finetune_cli.metrics.scores import Evaluation
from finetune_cli.parallel import cores
from finetune_cli.photos import decode as images
from finetune_cli.places import Place, place
from finetune_cli.progress import Observer, Silent
from finetune_cli.runs.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "Evaluation", "Observer", "Prediction", "Run", "load", "train"]

# A path or an address, the bytes of an image file, a Pillow image, or pixels: uint8 (height, width, 3), RGB.
Photo: TypeAlias = Union[str, os.PathLike[str], bytes, "Image", NDArray[np.uint8]]
_P = TypeVar("_P", bound=Photo)

_log = logging.getLogger("finetune_cli")


class _LogObserver(Silent):
    """The default `Observer`: progress is not shown; notes and warnings go to the logger `finetune_cli`."""

    def note(self, text: str) -> None:
        """Log at level INFO, which Python does not show by default."""
        _log.info(text)

    def warn(self, text: str) -> None:
        """Log at level WARNING, which Python shows on stderr by default."""
        _log.warning(text)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for one photo.

    label: the most probable class, or ``unknown`` for a photo that is unlike the training photos. probability: that of
    the most probable class, from 0 to 1. top: the most probable classes as (name, probability), best first.
    probabilities: ``float32 (C,)`` of all classes, in the order of `Classifier.classes`; read-only, and ignored when
    predictions are compared. p_value: about the share of held-out photos that is less like the training photos than
    this one; None if the run was trained without ``unknown``.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    probabilities: NDArray[np.float32] = field(repr=False, compare=False)
    p_value: float | None = None


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
    /,
    *,
    observer: Observer | None = None,
    **sections: Any,
) -> Run:
    """Train a classifier and return the finished run.

    config: a YAML file; or the same as a dict of sections, for programs without a file; or a loaded `Config`. Without
    it, `sections` are the whole configuration. Relative paths in a file are relative to the file, others to the
    current folder.

    sections: changes for this run, by section as in the YAML file: ``training={"seed": 1}, calibration="none"``. They
    are merged key by key. (The command line's ``training.seed=1`` cannot be a Python keyword.) NumPy numbers and paths
    are valid values.

    observer: receives progress, notes and warnings. By default only warnings are shown, through the logger
    ``finetune_cli``; ``observer=finetune_cli.Console()`` shows what the command line shows.

    Raises `ConfigError` for a wrong key or value, `DataError` for unusable photos, `WeightsError`, `StorageError`,
    `GateError` when the saved model does not give the measured answers, or another `FinetuneError`. Computed features
    stay in the cache in any case. Resume an interrupted run with ``finetune train --resume runs/NAME``.
    """
    path: Path | None = None
    values: dict[str, Any] = {}
    if isinstance(config, str | os.PathLike):
        path = Path(config)
    else:
        merge(values, _plain(_sections(config)))
    merge(values, _plain(sections))
    for name in values:
        if "." in str(name):
            section, key = str(name).split(".", 1)
            raise UsageError(f"{name!r} is not a section of the configuration", f"write {section}={{{key!r}: ...}}")
    settings = load_config(path, values)
    from finetune_cli.training import pipeline  # after the config is known to be good

    try:
        return pipeline.train(settings, observer or _LogObserver())
    except BadPhotos as exc:
        exc.remedy = 'repair or remove them, or leave them out: data={"on_bad_image": "skip"}'
        raise


def load(run: str | os.PathLike[str] | Run) -> "Classifier":
    """The classifier of a finished run: its directory, or what `train` returned.

    Raises `RunError` when the run is missing, unfinished or damaged. Neither TensorFlow nor Keras is imported.
    """
    return Classifier(run if isinstance(run, Run) else Run.load(Path(run)))


class Classifier:
    """A finished run that classifies photos.

    The model is in memory, compiled for the CPU, and no file stays open: there is nothing to close. One `Classifier`
    can be used by any number of threads; a call of `predict` for one photo uses one core, for a list all of them.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._predictor = RunPredictor(run, cores())

    def __repr__(self) -> str:
        """The run and its classes."""
        return f"<Classifier {str(self.run.folder)!r}: {', '.join(self.classes)}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of `Prediction.probabilities`."""
        return self.run.classes

    @overload
    def predict(self, photos: Photo, *, top_k: int = 3, unknown: float | None = None) -> Prediction: ...
    @overload
    def predict(
        self,
        photos: list[_P] | tuple[_P, ...],
        *,
        top_k: int = 3,
        on_bad_image: Literal["error"] = "error",
        unknown: float | None = None,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        photos: list[_P] | tuple[_P, ...],
        *,
        top_k: int = 3,
        on_bad_image: Literal["skip"],
        unknown: float | None = None,
    ) -> list[Prediction | None]: ...
    def predict(
        self,
        photos: Photo | list[Any] | tuple[Any, ...],
        *,
        top_k: int = 3,
        on_bad_image: Literal["error", "skip"] = "error",
        unknown: float | None = None,
    ) -> Prediction | list[Prediction] | list[Prediction | None]:
        """Classify a photo, or each photo of a list, on all cores.

        A photo is a path, the bytes of an image file, a Pillow image, or its pixels: a uint8 array
        ``(height, width, 3)``, RGB from 0 to 255. Any size is valid: all are resized as the training photos were,
        so the prediction is the same as for a file with these pixels; for a large JPEG file, which is decoded at a
        fraction of its size, nearly the same. A Pillow image is turned upright by its Exif data; an array has none.

        top_k: how many classes `Prediction.top` holds. on_bad_image: with ``skip``, a photo of a list that cannot
        be decoded gives None and a warning in the log, instead of an exception for the whole list. unknown: the p-value
        up to which a photo is answered ``unknown``, for runs that were trained with ``unknown``; by default their
        `false_rejects`, 0 for never.

        May be called from several threads at once, but not in a process that was forked after `load`, because a fork
        does not copy the threads that compute: that is an error.

        Raises `BadImage` (its `path` names the photo) when a photo cannot be decoded, `UsageError` for anything that
        is not a photo, such as an array of another type or shape, and for an `unknown` that the run cannot give.
        """
        if top_k < 1:
            raise UsageError(f"top_k is {top_k}, which is not a positive number", "choose 1 or more")
        if on_bad_image not in {"error", "skip"}:
            raise UsageError(f"on_bad_image is {on_bad_image!r}", "choose error or skip")
        if unknown is not None and not 0 <= unknown <= 1:
            raise UsageError(f"unknown is {unknown}", "choose a number from 0 to 1")
        limits = Limits(unknown=unknown_rate(self._predictor, unknown))
        if not isinstance(photos, list | tuple):
            rows = self._predictor.answers(_pixels(photos, self._predictor.settings)[None])
            return self._prediction(rows[0], top_k, limits)
        for i, photo in enumerate(photos):
            _check(photo, f"photos[{i}]")
        found: list[Prediction | None] = []
        decode = partial(_pixels, settings=self._predictor.settings)
        for photo, answer in answers(self._predictor, chunks(photos), decode, cores()):
            if not isinstance(answer, BadImage):
                found.append(self._prediction(answer, top_k, limits))
                continue
            name = photo if isinstance(photo, str | os.PathLike) else f"photos[{len(found)}]"
            if on_bad_image == "error":
                raise BadImage(os.fspath(name), answer.reason) from answer
            _log.warning("no prediction for %s: %s", name, answer.reason)
            found.append(None)
        return found

    def _prediction(self, answer: Answer, top_k: int, limits: Limits) -> Prediction:
        probabilities = answer.probabilities
        probabilities.flags.writeable = False
        top = best(probabilities, self.classes, top_k)
        return Prediction(labelled(answer, top, limits), top[0][1], top, probabilities, answer.p_value)

    def evaluate(
        self,
        data: str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        observer: Observer | None = None,
    ) -> Evaluation:
        """Evaluate the run on labelled photos. Nothing is written; ``finetune evaluate`` writes tables and a report.

        data: a folder of class folders, or a table; by default the run's test photos, else its validation photos,
        which also served to select the run, or with ``data.folds`` its training photos by their out-of-fold
        predictions. root: where the run's own photos are now, if they were moved (the command line's ``--data``).
        Photos that cannot be used are left out, each with a warning in the log.

        Raises `DataError` when there are no photos to evaluate.
        """
        from finetune_cli.evaluation import evaluate as evaluation

        observer = observer or _LogObserver()
        request = evaluation.EvaluationRequest(_place(data), _place(root))
        judged = evaluation.judge_photos(self.run, observer, request)
        for photo in judged.bad:
            observer.warn(f"left out {photo.path}: {photo.reason}")
        return judged.evaluation

    def export(
        self,
        format: str,  # noqa: A002
        output: str | os.PathLike[str],
        *,
        version: int | None = None,
        quantize: Literal["none", "float16", "int8"] | None = None,
        layout: Literal["nhwc", "nchw"] | None = None,
        pixels: Literal["fixed", "any-size"] | None = None,
        page: bool = False,
        root: str | os.PathLike[str] | None = None,
        force: bool = False,
        observer: Observer | None = None,
    ) -> Path:
        """Export the run for other programs, after checking on validation photos that the predictions agree.

        format: savedmodel, keras, onnx, litert or openvino. output: a new or empty folder; the result is the folder
        with the model, which for savedmodel and with `version` is ``output/VERSION``. The options are those of
        ``finetune export``: `quantize` for onnx, litert and openvino, `pixels` for onnx and openvino, `layout` and
        `page` for onnx; `root`: where the run's own photos are now (``--data``); `force` replaces an export that
        already exists.

        Raises `UsageError` for an unknown format, an option of another format or a folder in use,
        `MissingExtra` when the format needs a package, `DataError` when the validation photos are missing, `GateError`
        when the predictions differ. In each case nothing was written.
        """
        from finetune_cli.exports.export import ExportRequest, export

        options = {"quantize": quantize, "layout": layout, "pixels": pixels, "page": "page" if page else None}
        request = ExportRequest([format], Path(output), version, options, _place(root), force)
        (exported,) = export(self.run, request, observer or _LogObserver()).exports
        return exported.folder


def _place(path: str | os.PathLike[str] | None) -> Place | None:
    return None if path is None else place(path)


def _sections(config: Mapping[str, Any] | Config | None) -> Mapping[str, Any]:
    """`config` as values by section, with paths relative to the current folder."""
    if not isinstance(config, Config):
        if config is None or isinstance(config, Mapping):
            return config or {}
        raise UsageError(f"config is a {type(config).__name__}", "give a path, a dict of sections, or a Config")
    values = config.dump(Path())
    values["output"]["name"] = config.output.name
    return values


def _plain(value: Any) -> Any:
    """`value` as a YAML file could hold it: paths as text, NumPy's numbers and arrays as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _pixels(photo: Photo, settings: images.ImageSettings) -> NDArray[np.uint8]:
    """``uint8 (size, size, 3)``. Raises `BadImage`, and `UsageError` for anything that is not a photo."""
    _check(photo, "the photo")
    if isinstance(photo, bytes):
        return images.decode(photo, settings)
    if isinstance(photo, str | os.PathLike):
        return images.decode(place(photo), settings)
    if isinstance(photo, np.ndarray):
        from PIL import Image

        photo = Image.fromarray(photo)
    return images.from_image(photo, settings)


def _check(photo: object, name: str) -> None:
    """Raise `UsageError` unless `photo` has a type that `Classifier.predict` accepts; messages call it `name`."""
    if isinstance(photo, str | os.PathLike | bytes):
        return
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8:
            raise UsageError(
                f"{name} is an array of {photo.dtype}", "give RGB values from 0 to 255 as uint8, without any scaling"
            )
        if photo.ndim == 4:
            raise UsageError(f"{name} is an array of several photos", "give a list: list(photos)")
        if photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise UsageError(
                f"{name} is an array of the shape {photo.shape}, not (height, width, 3)",
                "reorder its axes, or give a Pillow image, which may also be gray or have transparency",
            )
        return
    from PIL.Image import Image

    if not isinstance(photo, Image):
        raise UsageError(
            f"{name} is a {type(photo).__name__}",
            "give a path, bytes, a Pillow image or a uint8 array (height, width, 3); of an open file, file.read()",
        )
