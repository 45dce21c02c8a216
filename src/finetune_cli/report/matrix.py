"""The confusion matrix of the report, and the photos behind its cells, within a budget of bytes.

Of more classes than a screen holds, the most confused pairs stand in for the matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_cli.evaluation.answers import Answers
from finetune_cli.evaluation.judge import Judgement
from finetune_cli.report.sentences import percent
from finetune_cli.report.thumbnails import Figure, thumbnails
from finetune_cli.text import brief

BUDGET = 3_000_000  # bytes of the photos behind the cells
MOST, WRONG_EACH, RIGHT_EACH = 600, 60, 24  # photos
TABLE_CLASSES, PAIRS = 40, 100
_LEVELS = 10

Pair = tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """One cell: how many photos it has and those of them that are shown, the ones worth a look first.

    level: its share of its row, in tenths.
    """

    key: str
    true: str
    predicted: str
    right: bool
    count: int
    level: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Matrix:
    """`rows`: for each class a cell or None a column; empty if there are too many classes for a table.

    pairs: then the wrong cells with the most photos; `more_pairs` others hold `more_photos`. galleries: the cells of
    `rows` with photos to show. `shown` of `photos` photos are.
    """

    classes: tuple[str, ...]
    rows: tuple[tuple[Cell | None, ...], ...]
    galleries: tuple[Cell, ...]
    pairs: tuple[Cell, ...]
    more_pairs: int
    more_photos: int
    shown: int
    photos: int


def pictures(judged: Judgement, workers: int, advance: Callable[[int], None]) -> dict[int, str | None]:
    """Thumbnails by index of the photos worth showing, the most interesting first; calls `advance` for each."""
    indexes = worth_showing(judged.answers, len(judged.run.classes))
    samples = [judged.answers.samples[i] for i in indexes]
    return dict(zip(indexes, thumbnails(samples, judged.run.image_settings, workers, advance), strict=True))


def matrix(judged: Judgement, made: Mapping[int, str | None], budget: int = BUDGET) -> Matrix:
    """The confusion matrix of `judged`, with as many of the pictures `made` as `budget` bytes hold."""
    answers, classes = judged.answers, tuple(brief(name) for name in judged.run.classes)
    figures: dict[int, Figure] = {}
    for i, picture in made.items():
        answer = int(answers.predicted[i])
        confidence = f"{percent(float(answers.probabilities[i, answer]))} {classes[answer]}"
        figure = Figure(brief(answers.samples[i].name), picture, (confidence,))
        budget -= figure.size
        if budget < 0:
            break
        figures[i] = figure
    totals = judged.evaluation.confusion.sum(axis=1)
    cells = {
        (true, answer): Cell(
            f"cell-{true}-{answer}",
            classes[true],
            classes[answer],
            true == answer,
            len(members),
            max(1, round(_LEVELS * len(members) / int(totals[true]))),
            tuple(figures[i] for i in members if i in figures),
        )
        for (true, answer), members in _members(answers).items()
    }
    wrong = sorted((cell for cell in cells.values() if not cell.right), key=lambda cell: -cell.count)
    n = len(classes)
    table = n <= TABLE_CLASSES
    listed = () if table else tuple(wrong[:PAIRS])
    return Matrix(
        classes,
        tuple(tuple(cells.get((i, j)) for j in range(n)) for i in range(n)) if table else (),
        tuple(cell for cell in cells.values() if cell.figures) if table else (),
        listed,
        len(wrong) - len(listed),
        sum(cell.count for cell in wrong[len(listed) :]),
        len(figures),
        len(answers.samples),
    )


def worth_showing(answers: Answers, n_classes: int) -> list[int]:
    """The indexes of at most `MOST` photos: wrong ones first, and of those one of each cell before a second of any.

    Without a table only the listed pairs count.
    """
    cells = sorted(_members(answers).items(), key=lambda item: -len(item[1]))
    wrong = [members for (true, answer), members in cells if true != answer]
    right = [members for (true, answer), members in cells if true == answer]
    if n_classes > TABLE_CLASSES:
        wrong, right = wrong[:PAIRS], []
    return [*_in_turn(wrong, WRONG_EACH), *_in_turn(right, RIGHT_EACH)][:MOST]


def _in_turn(cells: Sequence[Sequence[int]], each: int) -> list[int]:
    return [members[turn] for turn in range(each) for members in cells if turn < len(members)]


def _members(answers: Answers) -> dict[Pair, list[int]]:
    """The indexes of the photos in each cell; the most confident mistakes and the least confident hits come first."""
    confidence = answers.probabilities.max(axis=1)
    right = answers.labels == answers.predicted
    order = np.argsort(np.where(right, confidence, -confidence), kind="stable").tolist()
    labels, predicted = answers.labels.tolist(), answers.predicted.tolist()
    members: dict[Pair, list[int]] = {}
    for i in order:
        members.setdefault((labels[i], predicted[i]), []).append(i)
    return dict(sorted(members.items()))
