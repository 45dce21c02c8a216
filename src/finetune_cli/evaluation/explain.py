"""`explain`: where in a photo the evidence for a class lies; exact, without gradients, in the runtime of `predict`."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.drawing import heatmap
from finetune_cli.errors import RunError, UsageError
from finetune_cli.inference.linear_end import class_map
from finetune_cli.inference.predictor import InsightfulPredictor
from finetune_cli.photos import decode
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.places import Place
from finetune_cli.runs.run import Run

_SHOWN_SIZE = 448


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a class has its logit: ``supporting + opposing + bias = logit``, before the temperature.

    supporting and opposing: means of the class's map with its negative, or its positive, values as zero.
    """

    name: str
    probability: float
    logit: float
    supporting: float
    opposing: float
    bias: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """The evidence for every class, most probable first, and the map ``float64 (h, w)`` of the class `name`.

    The probabilities are the softmax of the logits divided by `temperature`.
    """

    name: str
    evidence: tuple[Evidence, ...]
    map: NDArray[np.float64]
    output: Path
    temperature: float


def explain(run: Run, path: Place, class_name: str | None, output: Path) -> Explanation:
    """Explain what `run` predicts for the photo `path`, and draw the map of `class_name` (default: the predicted one).

    Writes a PNG to `output`: the photo as the model sees it, and beside it the map over the photo. Raises `UsageError`
    for a class that the run does not have, `BadImage`, and `RunError` for a run whose backbone has no map.
    """
    chosen = None if class_name is None else _class(run, class_name)
    if not run.manifest.backbone.feature_map:
        raise _no_map(run)
    predictor = InsightfulPredictor(run, workers=1, latency=True)
    insight = predictor.insight(decode.decode(path, predictor.settings)[None])
    if insight.feature_map is None:
        raise _no_map(run)
    probabilities, end = insight.probabilities[0], predictor.end
    maps = class_map(insight.feature_map[0], end.kernel)
    supporting = np.maximum(maps, 0).mean(axis=(0, 1))
    opposing = np.minimum(maps, 0).mean(axis=(0, 1))
    order = np.argsort(-probabilities, kind="stable")
    evidence = tuple(
        Evidence(
            run.classes[i],
            float(probabilities[i]),
            float(maps[..., i].mean() + end.bias[i]),
            float(supporting[i]),
            float(opposing[i]),
            float(end.bias[i]),
        )
        for i in order
    )
    chosen = int(order[0]) if chosen is None else chosen
    _draw(path, predictor.settings, maps[..., chosen], output)
    return Explanation(run.classes[chosen], evidence, maps[..., chosen], output, run.temperature)


def _class(run: Run, name: str) -> int:
    if name not in run.classes:
        near = difflib.get_close_matches(name, run.classes, 1)
        raise UsageError(
            f"{run.name} has no class {name!r}",
            f"did you mean {near[0]!r}?" if near else f"its classes are {', '.join(run.classes)}",
        )
    return run.classes.index(name)


def _no_map(run: Run) -> RunError:
    return RunError(
        f"{run.folder}: there is no exact heat map for the backbone {run.manifest.backbone.name}, because its "
        "head does not take the mean over a feature map as it is",
        "train with a backbone whose pooled features feed the head directly, such as resnet50 or efficientnet_lite0",
    )


def _draw(path: Place, settings: ImageSettings, evidence: NDArray[np.float64], output: Path) -> None:
    from PIL import Image

    # The same crop as the model's, with more pixels for the eye.
    photo = decode.decode(path, replace(settings, size=max(settings.size, _SHOWN_SIZE)))
    picture = Image.fromarray(heatmap.side_by_side(photo, heatmap.overlay(photo, evidence)))
    with files.atomic_output(output) as temporary:
        picture.save(temporary, "PNG", compress_level=3)  # 0.1 s faster than `optimize`, and 6 % larger
