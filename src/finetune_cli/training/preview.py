"""`finetune preview`: the effect of the augmentation on the user's own photos, as one picture."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.errors import BadImage, DataError
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.decode import ImageSettings, decode
from finetune_cli.photos.scan import Sample
from finetune_cli.text import shown

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

MAX_VIEWS = 8
_CELL, _GAP, _MARGIN, _LABELS, _HEADER = 176, 8, 20, 190, 84
_INK, _FAINT, _PAPER = (32, 36, 42), (112, 118, 126), (255, 255, 255)


def contact_sheet(data: Dataset, augmenter: Augmenter, settings: ImageSettings, output: Path, photos: int = 6) -> Path:
    """Write a PNG with training photos by rows and their views by columns; return `output`.

    The photos are taken from all classes in turn, the views are those that `train` would use (the first 8 of them).
    Photos that cannot be decoded are left out. Raises `DataError` if none can, and `StorageError`.
    """
    rows: list[tuple[Sample, list[NDArray[np.uint8]]]] = []
    for sample in _in_turn(data):
        if len(rows) == photos:
            break
        try:
            image = decode(sample.path, settings)
        except BadImage:
            continue
        rows.append((sample, _views(augmenter, image, sample.digest)))
    if not rows:
        raise DataError("none of the training photos can be decoded", "`finetune check CONFIG` says what is wrong")
    _save(_title(augmenter), [(data.classes[sample.label], sample.name, views) for sample, views in rows], output)
    return output


def _in_turn(data: Dataset) -> Iterator[Sample]:
    """The training photos, the first of each class, then the second of each."""
    by_class = [[sample for sample in data.train if sample.label == label] for label in range(len(data.classes))]
    return (sample for sample in chain.from_iterable(zip_longest(*by_class)) if sample is not None)


def _views(augmenter: Augmenter, image: NDArray[np.uint8], digest: str) -> list[NDArray[np.uint8]]:
    return [augmenter.view(image, digest, view) for view in range(min(augmenter.views, MAX_VIEWS))]


def _title(augmenter: Augmenter) -> str:
    if not augmenter.active:
        return "no transform is active: each photo has one view"
    changed = (f"{name} {json.dumps(value)}" for name, value in augmenter.changed.items())
    return ", ".join(changed).replace('"', "").replace(" true", "")


def _save(title: str, rows: list[tuple[str, str, list[NDArray[np.uint8]]]], output: Path) -> None:
    """Lay out `rows` of (class, name, views) and write the sheet."""
    from PIL import Image, ImageDraw

    columns = len(rows[0][2])
    step = _CELL + _GAP
    width = 2 * _MARGIN + _LABELS + max(columns, 3) * step - _GAP
    sheet = Image.new("RGB", (width, _HEADER + len(rows) * step - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, plain = _font("DejaVuSans-Bold", 14), _font("DejaVuSans", 12)
    draw.text((_MARGIN, _MARGIN), _fitted(title, bold, width - 2 * _MARGIN), _INK, bold)
    for view in range(columns):
        heading = "view 0: the photo itself" if view == 0 else f"view {view}"
        draw.text((_MARGIN + _LABELS + view * step, _HEADER - 22), _fitted(heading, plain, _CELL), _FAINT, plain)
    for row, (label, name, views) in enumerate(rows):
        y = _HEADER + row * step
        draw.text((_MARGIN, y), _fitted(label, bold, _LABELS - 12), _INK, bold)
        draw.text((_MARGIN, y + 20), _fitted(Path(name).name, plain, _LABELS - 12), _FAINT, plain)
        for view, pixels in enumerate(views):
            cell = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (_MARGIN + _LABELS + view * step, y))
    with files.atomic_output(output) as temporary:
        sheet.save(temporary, "PNG")


def _font(name: str, size: int) -> "FreeTypeFont":
    """A font that comes with matplotlib: these cover more alphabets than Pillow's own."""
    from PIL import ImageFont

    # Importing matplotlib would make a folder in the home.
    package = find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    return ImageFont.truetype(Path(package.origin).with_name("mpl-data") / "fonts" / "ttf" / f"{name}.ttf", size)


def _fitted(text: str, font: "FreeTypeFont", width: float) -> str:
    """`text`, safe to show and shortened in its middle to this width in pixels."""
    text = kept = shown(text)
    while len(kept) > 2 and font.getlength(text) > width:
        kept = kept[: len(kept) // 2] + kept[len(kept) // 2 + 1 :]
        text = kept[: len(kept) // 2] + "…" + kept[len(kept) // 2 :]
    return text
