"""Photos for the report: thumbnails and heat maps as data URIs, within a budget of bytes.

In: `Sample`s. Out: ``data:image/jpeg;base64,...``, about 4 KB a thumbnail. Photos are shown as the model sees them:
upright, cropped and resized by the one decoder.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finetune_cli.drawing import heatmap
from finetune_cli.errors import BadImage
from finetune_cli.evaluation.photos import pixels
from finetune_cli.inference.linear_end import class_map
from finetune_cli.inference.predictor import InsightfulPredictor
from finetune_cli.parallel import ordered_map
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample

THUMBNAIL = 112
LARGE = 200
_MARKUP = 150  # bytes around a figure


@dataclass(frozen=True)
class Figure:
    """A photo in the report: its name, its picture (None where the photo is gone or changed), and lines below it."""

    name: str
    picture: str | None
    lines: tuple[str, ...]

    @property
    def size(self) -> int:
        """About the bytes that it takes in the report."""
        text = "".join((self.name, *self.lines))
        return len(self.picture or "") + len(html.escape(text).encode("utf-8", "replace")) + _MARKUP


def jpeg(picture: NDArray[np.uint8], quality: int = 72) -> str:
    """A picture ``uint8 (H, W, 3)`` as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def thumbnails(
    samples: Sequence[Sample], settings: ImageSettings, workers: int, advance: Callable[[int], None]
) -> list[str | None]:
    """A thumbnail of every sample; None for one whose photo is gone or changed."""
    small = replace(settings, size=THUMBNAIL)

    def work(sample: Sample) -> str | None:
        try:
            return jpeg(pixels(sample, small))
        except BadImage:
            return None

    made = []
    for picture in ordered_map(work, samples, workers):
        made.append(picture)
        advance(1)
    return made


def contrasts(
    predictor: InsightfulPredictor, samples: Iterable[Sample], pairs: Iterable[tuple[int, int]], workers: int
) -> list[str | None]:
    """Photo and heat map side by side for every sample: evidence for the first class of its pair against the second.

    Only the photo where the model has no feature map; None where the photo is gone or changed. The map's mean plus
    the difference of the biases is the difference of the two logits.
    """
    end = predictor.end
    large = replace(predictor.settings, size=LARGE)

    def work(item: tuple[Sample, tuple[int, int]]) -> str | None:
        sample, (first, second) = item
        try:
            photo = pixels(sample, large)
            feature_map = predictor.insight(pixels(sample, predictor.settings)[None]).feature_map
        except BadImage:
            return None
        if feature_map is None:
            return jpeg(photo)
        evidence = class_map(feature_map[0], end.kernel[:, first] - end.kernel[:, second])
        return jpeg(heatmap.side_by_side(photo, heatmap.overlay(photo, evidence), gap=4))

    return list(ordered_map(work, list(zip(samples, pairs, strict=True)), workers))
