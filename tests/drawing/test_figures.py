"""The PNG figures of a run: they are pictures, they hold what they should, and odd names do no harm."""

import numpy as np
import pytest
from PIL import Image

from finetune_cli.drawing import figures
from finetune_cli.metrics.scores import evaluate

HISTORY = [
    {"epoch": i + 1, "loss": 0.8**i, "val_loss": 0.9**i, "accuracy": 0.5 + 0.02 * i, "val_accuracy": 0.5 + 0.01 * i}
    for i in range(10)
]


def evaluation(n_classes, names=None):
    """Three photos in four of every class are right, the fourth is taken for the next class."""
    labels = np.repeat(np.arange(n_classes), 4)
    predicted = np.where(np.arange(len(labels)) % 4 == 3, (labels + 1) % n_classes, labels)
    return evaluate(np.eye(n_classes)[predicted], labels, names or [f"class {i}" for i in range(n_classes)])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_files_and_names(tmp_path):
    assert figures.write_figures(tmp_path, evaluation(3), HISTORY) == ["curves.png", "confusion_matrix.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion_matrix.png", "curves.png"]
    assert pixels(tmp_path / "curves.png").std() > 5


def test_without_a_history_there_are_no_curves(tmp_path):
    assert figures.write_figures(tmp_path, evaluation(3)) == ["confusion_matrix.png"]
    assert not (tmp_path / "curves.png").exists()


def test_a_history_without_validation(tmp_path):
    figures.curves(tmp_path / "c.png", [{"epoch": 1, "loss": 1.0}])
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_every_cell_is_there_and_large_enough_to_read(tmp_path, n_classes):
    figures.confusion_matrix(tmp_path / "c.png", evaluation(n_classes))
    found = pixels(tmp_path / "c.png")
    # A diagonal cell is dark blue: three quarters of its row. There are as many dark runs as classes, one below the
    # other, and each is as high as the cell.
    dark = (found[..., 2] - found[..., 0] > 60) & (found[..., 0] < 90)
    columns = np.flatnonzero(dark.sum(axis=0) > 8)
    rows = np.flatnonzero(dark.sum(axis=1) > 8)
    assert (columns[-1] - columns[0]) / n_classes >= 20
    assert (rows[-1] - rows[0]) / n_classes >= 20
    assert abs((columns[-1] - columns[0]) - (rows[-1] - rows[0])) <= 3


def test_names_are_text_whatever_they_hold(tmp_path):
    names = ["$x^2$", r"$\frac{", "<img src=x onerror=alert(1)>", "日本語", "a\nb\x1b[31m", "long " * 30]
    figures.write_figures(tmp_path, evaluation(6, names), HISTORY)
    assert pixels(tmp_path / "confusion_matrix.png").shape[1] < 2500


def test_equal_runs_have_equal_figures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figures.write_figures(tmp_path / name, evaluation(4), HISTORY)
    for name in ("curves.png", "confusion_matrix.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
