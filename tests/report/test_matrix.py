"""The confusion matrix of the report: which photos are shown, within which budget, and for how many classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifest_example import EXAMPLE

from finetune_cli.evaluation.answers import Answers
from finetune_cli.evaluation.judge import Judgement
from finetune_cli.evaluation.photos import LabelledPhotos
from finetune_cli.metrics.scores import evaluate
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.report import matrix, thumbnails
from finetune_cli.runs.run import Run


def judged(labels, predicted, confidence, n_classes=3) -> Judgement:
    """Photos that do not exist, with the given answers."""
    probabilities = np.full((len(labels), n_classes), 0.0)
    probabilities += ((1 - np.asarray(confidence)) / (n_classes - 1))[:, None]
    probabilities[np.arange(len(labels)), predicted] = confidence
    samples = tuple(Sample(Path(f"/nowhere/{i}.jpg"), f"{i}.jpg", int(y), "00") for i, y in enumerate(labels))
    answers = Answers(samples, probabilities.astype(np.float32), np.zeros((len(labels), 2), np.float32), 1, ())
    classes = [f"class {i}" for i in range(n_classes)]
    run = Run(Path("/nowhere"), replace(EXAMPLE, classes=tuple(classes), image=ImageSettings(64)))
    return Judgement(
        run, LabelledPhotos("test", "photos", samples), answers, evaluate(probabilities, labels, classes), None
    )


def made(found: Judgement, size=1000) -> dict[int, str | None]:
    """A picture of `size` bytes for each photo worth showing."""
    return dict.fromkeys(matrix.worth_showing(found.answers, len(found.run.classes)), "x" * size)


def test_mistakes_are_sorted_by_confidence_and_right_ones_by_doubt():
    found = judged([0] * 6, [0, 0, 0, 1, 1, 1], [0.6, 0.9, 0.7, 0.5, 0.8, 0.65])
    assert matrix.worth_showing(found.answers, 3) == [4, 5, 3, 0, 2, 1]
    right, wrong = matrix.matrix(found, made(found)).galleries
    assert [figure.name for figure in right.figures] == ["0.jpg", "2.jpg", "1.jpg"]
    assert [figure.name for figure in wrong.figures] == ["4.jpg", "5.jpg", "3.jpg"]
    assert wrong.figures[0].lines == ("80.0% class 1",)


def test_mistakes_come_first_and_every_cell_has_its_turn(monkeypatch):
    monkeypatch.setattr(matrix, "MOST", 9)
    monkeypatch.setattr(matrix, "WRONG_EACH", 5)
    labels = [0] * 10 + [1] * 10 + [2] * 10
    predicted = [0] * 4 + [1] * 6 + [1] * 9 + [2] + [2] * 10
    found = judged(labels, predicted, [0.8] * 30)
    galleries = matrix.matrix(found, made(found)).galleries
    cells = {cell.true[-1] + cell.predicted[-1]: len(cell.figures) for cell in galleries}
    # Six places for mistakes (5 and 1), then one for each of the three right cells.
    assert cells == {"01": 5, "12": 1, "00": 1, "11": 1, "22": 1}


def test_levels_are_tenths_of_the_row():
    found = matrix.matrix(judged([0] * 20, [0] * 13 + [1] * 6 + [2], [0.9] * 20), {})
    assert [cell.level for cell in found.rows[0] if cell] == [6, 3, 1]
    assert [cell.count for cell in found.rows[0] if cell] == [13, 6, 1]
    assert found.rows[1] == (None, None, None)
    assert (found.galleries, found.pairs, found.shown, found.photos) == ((), (), 0, 20)


def test_many_classes_are_a_list_of_the_most_confused_pairs():
    """Of class i, as many photos as its last digit says are taken for class i + 1, and one is right."""
    labels = np.concatenate([[i] * (i % 10 + 1) for i in range(200)])
    last = np.append(labels[1:] != labels[:-1], True)
    found = judged(labels, np.where(last, labels, (labels + 1) % 200), [0.5] * len(labels), 200)
    listed = matrix.matrix(found, made(found))
    assert (listed.rows, listed.galleries) == ((), ())
    assert [cell.count for cell in listed.pairs] == [9] * 20 + [8] * 20 + [7] * 20 + [6] * 20 + [5] * 20
    assert (listed.more_pairs, listed.more_photos) == (80, 20 * (4 + 3 + 2 + 1))
    assert listed.shown == 600
    assert all(cell.figures and not cell.right for cell in listed.pairs)


@pytest.mark.parametrize(("n", "rows", "pairs"), [(40, 40, 0), (41, 0, 41)])
def test_forty_classes_are_a_table(n, rows, pairs):
    found = judged(np.arange(n), (np.arange(n) + 1) % n, [0.5] * n, n)
    shown = matrix.matrix(found, made(found))
    assert (len(shown.rows), len(shown.pairs), shown.shown) == (rows, pairs, n)


def test_the_budget_of_bytes_is_kept():
    """Names count as they are written: an ampersand takes five bytes."""
    found = judged(np.zeros(100, int), np.where(np.arange(100) < 30, 1, 0), [0.9] * 100)
    assert matrix.matrix(found, made(found)).shown == 30 + 24
    some = matrix.matrix(found, made(found), 20_000)
    figures = [figure for cell in some.galleries for figure in cell.figures]
    assert 20_000 - 1300 < sum(figure.size for figure in figures) <= 20_000
    assert (some.shown, len(some.galleries)) == (len(figures), 1)
    assert some.rows[0][0].figures == ()
    assert some.rows[0][1].count == 30
    assert thumbnails.Figure("&&&&", None, ()).size - thumbnails.Figure("aaaa", None, ()).size == 16


def test_photos_that_are_gone_have_no_picture():
    found = judged([0, 1], [1, 1], [0.9, 0.9])
    assert matrix.pictures(found, 1, lambda _n: None) == {0: None, 1: None}


def test_a_picture_is_a_jpeg():
    import base64
    import io

    from PIL import Image

    pixels = np.zeros((20, 30, 3), np.uint8) + np.uint8([200, 100, 50])
    kind, _, data = thumbnails.jpeg(pixels).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (30, 20)
        assert np.asarray(picture)[10, 15] == pytest.approx([200, 100, 50], abs=4)
