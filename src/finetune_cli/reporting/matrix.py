"""The confusion matrix of the report, and the photos behind its cells, within a budget of bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_cli.reporting.pictures import Figure, thumbnails
from finetune_cli.reporting.verdict import percent
from finetune_cli.runs.judged import Answers, Judged
from finetune_cli.text import shown

BUDGET = 3_000_000  # bytes of thumbnails; all else in the report together stays well below the other 2 MB
MOST, WRONG_EACH, RIGHT_EACH = 600, 60, 24
_TABLE_CLASSES = 40
_LEVELS = 10


@dataclass(frozen=True)
class Cell:
    """One cell of the confusion matrix: the places of its photos, those worth a look first, and how many are shown."""

    true: int
    predicted: int
    photos: NDArray[np.intp]
    shown: int


@dataclass(frozen=True)
class Gallery:
    """The photos behind a cell, as the report shows them; `level` is the cell's share of its row in tenths."""

    key: str
    true: str
    predicted: str
    right: bool
    count: int
    level: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Matrix:
    """`rows`: for each class a gallery or None a column; empty if there are too many classes for a table.

    `confusions`: the wrong cells, largest first. `shown` of `photos` photos have a thumbnail.
    """

    classes: tuple[str, ...]
    rows: tuple[tuple[Gallery | None, ...], ...]
    galleries: tuple[Gallery, ...]
    confusions: tuple[Gallery, ...]
    shown: int
    photos: int


def matrix(judged: Judged, workers: int, advance: Callable[[int], None]) -> Matrix:
    """The confusion matrix of `judged`; `advance` is called for every thumbnail."""
    answers, classes = judged.answers, tuple(shown(name) for name in judged.run.classes)
    cells = confusion_cells(answers, WRONG_EACH, RIGHT_EACH, MOST)
    places = [i for cell in cells for i in cell.photos[: cell.shown].tolist()]
    made = thumbnails([answers.samples[i] for i in places], judged.run.image_settings, workers, advance)
    if (size := sum(len(uri or "") for uri in made)) > BUDGET:
        cells = confusion_cells(answers, WRONG_EACH, RIGHT_EACH, len(places) * BUDGET // size)
    picture = dict(zip(places, made, strict=True))
    totals = judged.evaluation.confusion.sum(axis=1)
    galleries = {(cell.true, cell.predicted): _gallery(cell, answers, classes, totals, picture) for cell in cells}
    n = len(classes)
    rows = tuple(tuple(galleries.get((i, j)) for j in range(n)) for i in range(n)) if n <= _TABLE_CLASSES else ()
    wrong = sorted((gallery for gallery in galleries.values() if not gallery.right), key=lambda g: -g.count)
    return Matrix(
        classes, rows, tuple(galleries.values()), tuple(wrong), sum(cell.shown for cell in cells), len(answers.samples)
    )


def _gallery(
    cell: Cell,
    answers: Answers,
    classes: tuple[str, ...],
    totals: NDArray[np.int64],
    picture: dict[int, str | None],
) -> Gallery:
    figures = tuple(
        Figure(
            shown(answers.samples[i].name),
            picture[i],
            (f"{percent(float(answers.probabilities[i, cell.predicted]))} {classes[cell.predicted]}",),
        )
        for i in cell.photos[: cell.shown].tolist()
    )
    return Gallery(
        f"cell-{cell.true}-{cell.predicted}",
        classes[cell.true],
        classes[cell.predicted],
        cell.true == cell.predicted,
        len(cell.photos),
        max(1, round(_LEVELS * len(cell.photos) / int(totals[cell.true]))),
        figures,
    )


def confusion_cells(answers: Answers, wrong_each: int, right_each: int, most: int) -> list[Cell]:
    """The cells that hold photos: in wrong ones the most confident first, in right ones the least sure.

    At most `wrong_each` or `right_each` photos of a cell are shown, and `most` in all: wrong ones first, and of those
    one from each cell before a second one from any.
    """
    confidence = answers.probabilities.max(axis=1)
    members: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(answers.labels.tolist(), answers.predicted.tolist(), strict=True)):
        members.setdefault(pair, []).append(i)
    cells: dict[tuple[int, int], NDArray[np.intp]] = {}
    for (true, predicted), places in members.items():
        sign = 1 if true == predicted else -1
        cells[true, predicted] = np.array(sorted(places, key=lambda i: sign * confidence[i]), np.intp)
    shown, total = dict.fromkeys(cells, 0), 0
    for wanted, each in ((False, wrong_each), (True, right_each)):
        kind = [pair for pair in cells if (pair[0] == pair[1]) == wanted]
        for turn in range(each):
            for pair in kind:
                if turn < len(cells[pair]) and total < most:
                    shown[pair] += 1
                    total += 1
    return [Cell(*pair, cells[pair], shown[pair]) for pair in sorted(cells)]
