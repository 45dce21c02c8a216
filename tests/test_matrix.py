"""The confusion matrix of the report: which photos are shown, within which budget, and for how many classes."""

from pathlib import Path

import numpy as np
import pytest

from finetune_cli.metrics import evaluate
from finetune_cli.photos.dataset import Sample
from finetune_cli.reporting import matrix, pictures
from finetune_cli.runs.judged import Answers, Judged, Photos
from finetune_cli.runs.run import Run

IMAGE = {"size": 64, "resize": "crop", "max_pixels": 10_000}


def judged(labels, predicted, confidence, n_classes=3) -> Judged:
    """Photos that do not exist, with the given answers."""
    probabilities = np.full((len(labels), n_classes), 0.0)
    probabilities += ((1 - np.asarray(confidence)) / (n_classes - 1))[:, None]
    probabilities[np.arange(len(labels)), predicted] = confidence
    samples = tuple(Sample(Path(f"/nowhere/{i}.jpg"), f"{i}.jpg", int(y), "00") for i, y in enumerate(labels))
    answers = Answers(samples, probabilities.astype(np.float32), np.zeros((len(labels), 2), np.float32), 1, ())
    classes = [f"class {i}" for i in range(n_classes)]
    run = Run(Path("/nowhere"), {"classes": classes, "image": IMAGE})
    return Judged(run, Photos("test", "photos", samples), answers, evaluate(probabilities, labels, classes), None)


def test_mistakes_are_sorted_by_confidence_and_right_ones_by_doubt():
    found = judged([0] * 6, [0, 0, 0, 1, 1, 1], [0.6, 0.9, 0.7, 0.5, 0.8, 0.65])
    cells = {(cell.true, cell.predicted): cell for cell in matrix.confusion_cells(found.answers, 2, 2, 100)}
    assert cells[0, 0].photos.tolist() == [0, 2, 1]
    assert cells[0, 1].photos.tolist() == [4, 5, 3]
    assert [cells[0, 0].shown, cells[0, 1].shown] == [2, 2]


def test_mistakes_come_first_and_every_cell_has_its_turn():
    labels = [0] * 10 + [1] * 10 + [2] * 10
    predicted = [0] * 4 + [1] * 6 + [1] * 9 + [2] + [2] * 10
    cells = {
        (cell.true, cell.predicted): cell.shown
        for cell in matrix.confusion_cells(judged(labels, predicted, [0.8] * 30).answers, 5, 5, 9)
    }
    # Six places for mistakes (5 and 1), then one for each of the three right cells.
    assert cells == {(0, 1): 5, (1, 2): 1, (0, 0): 1, (1, 1): 1, (2, 2): 1}


def test_levels_are_tenths_of_the_row():
    found = matrix.matrix(judged([0] * 20, [0] * 13 + [1] * 6 + [2], [0.9] * 20), 1, lambda _n: None)
    assert [gallery.level for gallery in found.rows[0] if gallery] == [6, 3, 1]
    assert found.rows[1] == (None, None, None)
    assert [(gallery.true, gallery.count) for gallery in found.confusions] == [("class 0", 6), ("class 0", 1)]


def test_a_hundred_classes_are_a_list_of_confusions():
    labels = np.repeat(np.arange(100), 3)
    predicted = np.where(np.arange(300) % 3 == 0, (labels + 1) % 100, labels)
    found = matrix.matrix(judged(labels, predicted, [0.5] * 300, 100), 2, lambda _n: None)
    assert found.rows == ()
    assert len(found.confusions) == 100
    assert len(found.galleries) == 200
    assert found.shown == 300
    assert all(figure.picture is None for gallery in found.galleries for figure in gallery.figures)


def test_the_budget_of_bytes_is_kept(monkeypatch):
    labels = np.zeros(100, int)
    predicted = np.where(np.arange(100) < 30, 1, 0)
    monkeypatch.setattr(matrix, "thumbnails", lambda samples, *_rest: ["x" * 1000] * len(samples))
    found = matrix.matrix(judged(labels, predicted, [0.9] * 100), 1, lambda _n: None)
    assert found.shown == 30 + 24
    monkeypatch.setattr(matrix, "BUDGET", 20_000)
    found = matrix.matrix(judged(labels, predicted, [0.9] * 100), 1, lambda _n: None)
    size = sum(len(figure.picture or "") for gallery in found.galleries for figure in gallery.figures)
    assert size <= 20_000
    assert found.shown == 20
    assert found.confusions[0].count == 30
    assert len(found.confusions[0].figures) == 20


def test_a_picture_is_a_jpeg():
    import base64
    import io

    from PIL import Image

    pixels = np.zeros((20, 30, 3), np.uint8) + np.uint8([200, 100, 50])
    kind, _, data = pictures.jpeg(pixels).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (30, 20)
        assert np.asarray(picture)[10, 15] == pytest.approx([200, 100, 50], abs=4)
