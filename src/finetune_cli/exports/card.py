"""The card of every exported model: the names of its outputs, in their order, and how photos are prepared.

`classes.json` in each export is this card; ONNX, OpenVINO and LiteRT files hold a second copy inside, under `KEY`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.errors import WeightsError
from finetune_cli.fields import Fields
from finetune_cli.photos import settings as image_settings
from finetune_cli.photos.decode import ImageSettings

FILE = "classes.json"
KEY = "finetune"
FORMAT = 1
# The remedy for a file that is not an export.
EXPORT_IT = "name the folder or the file that `finetune export` wrote"

_RESIZING = {
    "crop": "scale the shorter side to {size} pixels and take the centre",
    "squash": "scale both sides to {size} pixels",
    "pad": "scale the longer side to {size} pixels and fill up with black around it",
}
_SHAPE = "(N, {size}, {size}, 3), or (N, 3, {size}, {size}) if that is the input of the model"


@dataclass(frozen=True, slots=True)
class Card:
    """The class names in the order of the model's outputs, and how photos are decoded for it."""

    classes: tuple[str, ...]
    settings: ImageSettings

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values, with notes for people."""
        settings = self.settings
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "image": image_settings.to_json(settings),
            "preparation": [
                "turn the photo as its Exif data say, lay it on white where it is transparent",
                _RESIZING[settings.resize].format(size=settings.size)
                + " (Hamming filter to shrink, bicubic to enlarge)",
                f"pass RGB values 0 to 255 of shape {_SHAPE.format(size=settings.size)}; all scaling is inside",
            ],
            "unknown": "cannot tell: a photo that shows none of the classes gets the probabilities of some class, too",
        }

    def text(self) -> str:
        """The card as ASCII text."""
        return json.dumps(self.to_json())

    def write(self, folder: Path) -> None:
        """Write `classes.json` into `folder`."""
        files.write_json(folder / FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """The card in `folder`. Raises `WeightsError` when it is missing or damaged."""
        path = folder / FILE
        try:
            return cls.parse(files.read_own(path).decode("utf-8"), path)
        except (OSError, UnicodeDecodeError) as exc:
            raise WeightsError(f"{path}, which names the classes of the model, cannot be read", "export again") from exc

    @classmethod
    def parse(cls, text: str, source: Path) -> "Card":
        """The card in `text`, which was found in `source`. Raises `WeightsError` when it is damaged."""
        try:
            card = json.loads(text)
            return cls(_classes(card), image_settings.from_json(Fields(card).object("image")))
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise WeightsError(
                f"{source}: its list of classes and image settings is damaged ({exc})", "export again"
            ) from exc


def _classes(card: Mapping[str, Any]) -> tuple[str, ...]:
    if card["format"] != FORMAT:
        raise ValueError(f"its format is {card['format']}, this version reads {FORMAT}")
    classes = card["classes"]
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are not at least two names")
    return tuple(classes)
