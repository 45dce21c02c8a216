"""Pictures of a run as PNG: learning curves, and the confusion matrix from 2 to some hundred classes.

matplotlib without its global state (no pyplot), so that nothing depends on a display or on the user's settings.
"""

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_cli import files
from finetune_cli.metrics.scores import Evaluation
from finetune_cli.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
CONFUSION = "confusion_matrix.png"
_BLUE, _ORANGE, _GREY = "#2563a8", "#c2571a", "#777777"
_LONGEST_NAME = 28
_MOST_LABELS = 120
_FOLDER = "MPLCONFIGDIR"


def write_figures(
    folder: Path, evaluation: Evaluation, history: Sequence[Mapping[str, Any]] = (), root: Path | None = None
) -> list[str]:
    """Write confusion_matrix.png and, if there is a history, curves.png into `folder`; returns their names.

    `history`: a row for each epoch, as in history.csv; `root`: the run that `folder` is in (see `files.py`). Raises
    `StorageError`.
    """
    confusion_matrix(folder / CONFUSION, evaluation, root)
    if not history:
        return [CONFUSION]
    curves(folder / CURVES, history, root)
    return [CURVES, CONFUSION]


def _import_figure() -> type["Figure"]:
    """matplotlib's `Figure`, without the user's matplotlibrc and without creating folders in the home directory."""
    if "matplotlib.font_manager" not in sys.modules:
        before = os.environ.get(_FOLDER)
        with tempfile.TemporaryDirectory() as folder:
            os.environ[_FOLDER] = folder
            try:
                import matplotlib.font_manager  # noqa: F401 - lists the fonts, which takes tenths of a second
            finally:
                del os.environ[_FOLDER]
                if before is not None:
                    os.environ[_FOLDER] = before
    from matplotlib.figure import Figure

    return Figure


def curves(path: Path, history: Sequence[Mapping[str, Any]], root: Path | None = None) -> None:
    """Draw the columns `loss` and `accuracy` and their `val_` twins over the epochs. Raises `StorageError`."""
    Figure = _import_figure()  # noqa: N806
    drawn = [name for name in ("loss", "accuracy") if name in history[0] or f"val_{name}" in history[0]]
    figure = Figure(figsize=(4.6 * len(drawn), 3.4), dpi=130, layout="constrained")
    epochs = np.arange(1, len(history) + 1)
    for ax, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for key, label, colour in ((name, "training", _ORANGE), (f"val_{name}", "validation", _BLUE)):
            if key in history[0]:
                ax.plot(epochs, [float(row[key]) for row in history], color=colour, label=label, marker=".")
        if "val_loss" in history[0]:
            best = int(np.argmin([float(row["val_loss"]) for row in history])) + 1
            ax.axvline(best, color=_GREY, linewidth=1, linestyle=":", label=f"least validation loss ({best})")
        ax.set(title=name, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _plain(ax)
        ax.legend(frameon=False, fontsize=8)
    _save(figure, path, root)


def confusion_matrix(path: Path, evaluation: Evaluation, root: Path | None = None) -> None:
    """Draw the confusion matrix: rows true, columns predicted, counts in cells, colour by the share of the row.

    Raises `StorageError`.
    """
    Figure = _import_figure()  # noqa: N806
    counts, n = evaluation.confusion, len(evaluation.classes)
    names = [_short(name) for name in evaluation.classes]
    # Cells shrink as classes grow in number, down to two digits of 5 points; beyond, the picture grows.
    cell = float(np.interp(n, (2, 10, 40), (0.75, 0.55, 0.21)))
    font = float(np.interp(n, (2, 10, 40), (11, 9, 5)))
    names_width = 0.075 * max(map(len, names)) * font / 8 + 0.5
    side = min(n * cell, 60.0)
    figure = Figure(figsize=(side + names_width + 0.4, side + names_width + 0.6), dpi=130, layout="constrained")
    ax = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    readable = side / n > 0.15  # inches; smaller cells could not hold two digits
    edges = "#dddddd" if readable else "none"  # a million of them are slow
    ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors=edges, linewidth=0.4)
    for i, j in np.argwhere(counts) if readable else ():
        ink = "white" if shares[i, j] > 0.5 else "#1a1a1a"
        ax.text(j + 0.5, i + 0.5, f"{counts[i, j]}", ha="center", va="center", fontsize=font, color=ink)
    step = math.ceil(n / _MOST_LABELS)
    upright = 90 if n > 2 or max(map(len, names)) > 8 else 0
    ax.set_xticks(np.arange(0, n, step) + 0.5, names[::step], rotation=upright, fontsize=font, parse_math=False)
    ax.set_yticks(np.arange(0, n, step) + 0.5, names[::step], fontsize=font, parse_math=False)
    ax.tick_params(length=0)
    ax.set(aspect="equal", xlim=(0, n), ylim=(n, 0))
    size = max(font, 9)
    ax.set_xlabel("predicted", fontsize=size)
    ax.set_ylabel("true", fontsize=size)
    ax.set_title(f"{evaluation.accuracy.value:.1%} of {evaluation.photos} photos right", fontsize=size, loc="left")
    _save(figure, path, root)


def _short(name: str) -> str:
    name = shown(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _plain(ax: "Axes") -> None:
    ax.grid(color="#e5e5e5", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _save(figure: "Figure", path: Path, root: Path | None) -> None:
    with files.atomic_path(path, root=root) as temporary, warnings.catch_warnings():
        # A class name in a script that the built-in font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # The version of matplotlib in the file would make two equal runs differ.
        figure.savefig(temporary, format="png", metadata={"Software": None})
