"""Charts as geometry: numbers in, a `Chart` in pixels out, which the template draws as inline SVG.

Colours are names of CSS classes, so that light, dark and paper each have their own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_cli.metrics.calibration import CalibrationScores
from finetune_cli.metrics.scores import CoverageRow, wilson

WIDTH, HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 12, 44
_MOST_POINTS = 200
_FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)

Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A dot in pixels with a text for the pointer; `low` and `high` are the ends of its interval, if it has one."""

    x: float
    y: float
    radius: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """`points` as SVG wants them, or empty for dots alone; `style` is a CSS class; a `label` is for the legend."""

    style: str
    label: str
    points: str
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart in pixels, WIDTH x HEIGHT; ticks are (position, text)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


class Scale:
    """From numbers to pixels; the ranges are (low, high)."""

    def __init__(self, x: Point, y: Point) -> None:
        self.x_range, self.y_range = x, y

    def at(self, x: float, y: float) -> Point:
        """The position of a point."""
        return self.x(x), self.y(y)

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return round(_LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)

    def path(self, points: Sequence[Point]) -> str:
        """Points as SVG's `points`."""
        return " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most`."""
    raw = max(high - low, 1e-9) / most
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _percent(value: float) -> str:
    return f"{value:.1%}" if round(value * 100, 6) % 1 else f"{value:.0%}"


def learning(history: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Loss and accuracy over the epochs; a row of `history` for each epoch."""
    charts = []
    drawn = _spread(len(history))
    for name, text in (("loss", _plain), ("accuracy", _percent)):
        series = ((name, "training", "series-b"), (f"val_{name}", "validation", "series-a"))
        columns = [column for column in series if column[0] in history[0]]
        if not columns:
            continue
        values = [row[key] for row in history for key, _label, _style in columns]
        low = 0.0 if name == "loss" else math.floor(min(values) * 10) / 10
        scale = Scale((1, max(2, len(history))), (low, max(values) if name == "loss" else 1.0))
        lines = [
            Line(style, label, scale.path([(i + 1, history[i][key]) for i in drawn])) for key, label, style in columns
        ]
        x_ticks = [tick for tick in ticks(1, max(2, len(history))) if tick == int(tick)]
        charts.append(_chart(name, scale, _Axis("epoch", _plain, x_ticks), _Axis(name, text), lines))
    return charts


def _spread(count: int) -> list[int]:
    """All of `count` indexes or, of many, some evenly spread ones with the first and the last."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(int))]


def _plain(value: float) -> str:
    return f"{value:g}"


@dataclass(frozen=True)
class _Axis:
    """The label of an axis, its ticks (default: some round numbers), and how they are written."""

    label: str
    text: Callable[[float], str]
    ticks: Sequence[float] | None = None


def _chart(title: str, scale: Scale, x: _Axis, y: _Axis, lines: Sequence[Line]) -> Chart:
    x_ticks = ticks(*scale.x_range) if x.ticks is None else x.ticks
    y_ticks = ticks(*scale.y_range) if y.ticks is None else y.ticks
    return Chart(
        title,
        x.label,
        y.label,
        tuple((scale.x(tick), x.text(tick)) for tick in x_ticks),
        tuple((scale.y(tick), y.text(tick)) for tick in y_ticks),
        tuple(lines),
    )


def reliability(before: CalibrationScores | None, after: CalibrationScores) -> Chart:
    """The accuracy of predictions by their confidence: on the diagonal, the probabilities are calibrated.

    The dots of `after` carry 95 % intervals, and their area is the number of photos.
    """
    scale = Scale((0, 1), (0, 1))
    lines = [Line("guide", "", scale.path([(0, 0), (1, 1)]))]
    for scores, label, style in ((before, "without temperature", "series-b"), (after, "with temperature", "series-a")):
        if scores is None:
            continue
        total = sum(b.photos for b in scores.reliability)
        dots = []
        for b in scores.reliability:
            if b.confidence is None or b.accuracy is None:
                continue
            interval = wilson(round(b.accuracy * b.photos), b.photos)
            dots.append(
                Dot(
                    *scale.at(b.confidence, b.accuracy),
                    radius=round(2 + 10 * math.sqrt(b.photos / total), 1),
                    title=f"confidence {b.confidence:.0%}: {b.accuracy:.0%} of {b.photos} photos right ({label})",
                    low=scale.y(interval.low) if scores is after else None,
                    high=scale.y(interval.high) if scores is after else None,
                )
            )
        lines.append(Line(style, label if before is not None else "", "", tuple(dots)))
    x = _Axis("confidence", _percent, _FIFTHS)
    return _chart("reliability", scale, x, _Axis("accuracy", _percent), lines)


def coverage(confidence: NDArray[np.floating], right: NDArray[np.bool_], rows: Sequence[CoverageRow]) -> Chart:
    """The accuracy of the most confident part of the predictions; dots mark the rows of the coverage table."""
    order = np.argsort(-confidence, kind="stable")
    accuracy = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Equal confidences are accepted together or not at all.
    ends = np.flatnonzero(np.append(confidence[order][1:] != confidence[order][:-1], True))
    points = [(float(end + 1) / len(order), float(accuracy[end])) for end in ends[_spread(len(ends))]]
    low = min([share for _x, share in points] + [0.85])
    scale = Scale((0, 1), (math.floor(low * 20) / 20, 1))
    dots = tuple(
        Dot(
            *scale.at(row.coverage, row.precision.value),
            radius=5,
            title=f"accuracy {row.target:.0%}: accept from {row.threshold:.4f}, {row.coverage:.0%} of the photos",
        )
        for row in rows
        if row.precision is not None and row.threshold is not None
    )
    line = Line("series-a", "", scale.path(points), dots)
    x = _Axis("share of photos accepted, most confident first", _percent, _FIFTHS)
    return _chart("coverage", scale, x, _Axis("accuracy of those", _percent), [line])


def by_photos(photos: Sequence[int], accuracy: Sequence[float]) -> Chart:
    """Accuracy over the number of training photos."""
    low = math.floor(max(0.0, min(accuracy) - 0.03) * 20) / 20
    high = min(1.0, math.ceil((max(accuracy) + 0.01) * 20) / 20)
    scale = Scale((0, max(photos)), (low, high))
    points = list(zip(map(float, photos), accuracy, strict=True))
    dots = tuple(Dot(*scale.at(x, y), radius=4, title=f"{y:.1%} with {x:.0f} photos") for x, y in points)
    line = Line("series-a", "", scale.path(points), dots)
    return _chart("accuracy", scale, _Axis("training photos", _plain), _Axis("accuracy", _percent), [line])


def spark(values: Sequence[float], low: float) -> str:
    """Shares between `low` and 1 as the points of a small line, 80 x 24 pixels."""
    step, height = 72 / (len(values) - 1), 18 / max(1 - low, 0.05)
    return " ".join(f"{4 + i * step:.1f},{21 - height * (value - low):.1f}" for i, value in enumerate(values))
