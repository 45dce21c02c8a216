"""Charts of the report: numbers land where they should, and stay within the picture."""

import numpy as np
import pytest

from finetune_cli.metrics.calibration import calibration_scores
from finetune_cli.metrics.scores import coverage_table
from finetune_cli.report import charts
from finetune_cli.report.charts import HEIGHT, WIDTH


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.points.split()]


def inside(chart):
    """Every point and dot lies within the axes."""
    places = [place for line in chart.lines for place in points(line)]
    places += [(dot.x, dot.y) for line in chart.lines for dot in line.dots]
    assert places
    for x, y in places:
        assert chart.left - 0.1 <= x <= chart.right + 10
        assert chart.top - 0.1 <= y <= chart.bottom + 0.1
    for x, _text in chart.x_ticks:
        assert chart.left - 0.1 <= x <= WIDTH
    for y, _text in chart.y_ticks:
        assert 0 <= y <= HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.85, 1, [0.85, 0.9, 0.95, 1]),
        (0, 293, [0, 50, 100, 150, 200, 250]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_learning_curves():
    history = [
        {"epoch": i, "loss": 2 - i / 10, "val_loss": 2.0, "accuracy": i / 10, "val_accuracy": 0.5} for i in range(10)
    ]
    loss, accuracy = charts.learning(history)
    assert [line.label for line in loss.lines] == ["training", "validation"]
    assert (loss.title, accuracy.title) == ("loss", "accuracy")
    first, last = points(accuracy.lines[0])[0], points(accuracy.lines[0])[-1]
    assert first[1] > last[1]  # upwards is less in pixels
    assert last[0] == accuracy.right
    for chart in (loss, accuracy):
        inside(chart)


def test_one_epoch_and_no_validation():
    (loss,) = charts.learning([{"epoch": 1, "loss": 0.7}])
    assert len(loss.lines) == 1
    inside(loss)


def test_reliability_shows_each_bin():
    # Four answers at 0.9, three of them right; two at 0.6, both right.
    p = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    scores = calibration_scores(p, [0, 0, 0, 1, 0, 0])
    chart = charts.reliability(None, scores)
    inside(chart)
    guide, line = chart.lines
    assert (guide.style, line.label) == ("guide", "")
    scale = charts.Scale((0, 1), (0, 1))
    assert {(dot.x, dot.y) for dot in line.dots} == {scale.at(0.9, 0.75), scale.at(0.6, 1)}
    for dot in line.dots:
        assert dot.high <= dot.y <= dot.low
    assert "75% of 4 photos" in line.dots[1].title
    both = charts.reliability(scores, scores)
    assert [line.label for line in both.lines] == ["", "without temperature", "with temperature"]


def test_coverage_ends_at_the_accuracy():
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, True, False])
    chart = charts.coverage(confidence, right, coverage_table(confidence, right))
    inside(chart)
    scale = charts.Scale((0, 1), (0.6, 1))
    # The two photos at 0.8 are accepted together.
    assert points(chart.lines[0]) == [scale.at(0.2, 1), scale.at(0.6, 2 / 3), scale.at(0.8, 0.75), scale.at(1, 0.6)]
    assert chart.lines[0].dots[0].x == scale.x(0.2)


def test_many_photos_are_few_points():
    rng = np.random.default_rng(0)
    confidence = rng.random(5000)
    chart = charts.coverage(confidence, rng.random(5000) < confidence, ())
    assert len(points(chart.lines[0])) <= 200
    inside(chart)


def test_accuracy_by_photos_and_sparks():
    chart = charts.by_photos((10, 20, 30, 40), [0.5, 0.7, 0.8, 1.0])
    inside(chart)
    assert len(chart.lines[0].dots) == 4
    assert charts.spark([0.5, 0.5, 1.0, 1.0], 0.5) == "4.0,21.0 28.0,21.0 52.0,3.0 76.0,3.0"
    assert charts.spark([1.0, 1.0], 1.0) == "4.0,21.0 76.0,21.0"
