"""`runs`: what is in a folder of runs, finished, unfinished and damaged ones; nothing is opened but their tables."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetune_cli.errors import RunError
from finetune_cli.runs import run
from finetune_cli.runs.run import Run

State = Literal["finished", "unfinished", "damaged"]


@dataclass(frozen=True, slots=True)
class Row:
    """A run. What is unknown of an unfinished or damaged run is None; `problem` says what is wrong with it.

    photos: of all splits. accuracy: on the photos of `split`, test if the run has some, else val or folds. kind:
    "frozen", a head on a frozen backbone.
    """

    folder: Path
    state: State
    created: str | None = None
    photos: int | None = None
    classes: tuple[str, ...] | None = None
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    split: str | None = None
    backbone: str | None = None
    kind: str | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row for programs, under stable keys."""
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "state": self.state,
            "created": self.created,
            "photos": self.photos,
            "classes": None if self.classes is None else list(self.classes),
            "accuracy": self.accuracy,
            "accuracy_interval": None if self.accuracy_interval is None else list(self.accuracy_interval),
            "split": self.split,
            "backbone": self.backbone,
            "kind": self.kind,
            "problem": self.problem,
        }


def runs(directory: Path) -> list[Row]:
    """The runs in `directory`, the oldest first. Raises `RunError` when there is no such folder."""
    try:
        folders = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as exc:
        raise RunError(
            f"{directory} cannot be listed: {exc.strerror}",
            "name the folder that holds the runs: finetune runs DIRECTORY",
        ) from exc
    rows = [row for folder in folders if (row := _row(folder)) is not None]
    return sorted(rows, key=lambda row: (row.created or "", row.folder.name))


def _row(folder: Path) -> Row | None:
    """The run in `folder`, or None when it holds none, or one that cannot be resumed."""
    try:
        if (folder / run.MANIFEST).is_file():
            return _finished(Run.load(folder))
        if (folder / "split.csv").is_file():
            return _unfinished(folder)
    except RunError as exc:
        return Row(folder, "damaged", created=_written(folder), problem=exc.problem)
    return None


def _finished(found: Run) -> Row:
    manifest = found.manifest
    split = next((split for split in ("test", "val", "folds") if split in manifest.metrics), None)
    metrics = manifest.metrics[split] if split is not None else None
    return Row(
        folder=found.folder,
        state="finished",
        created=manifest.created,
        photos=sum(manifest.photos.values()),
        classes=manifest.classes,
        accuracy=None if metrics is None else metrics.accuracy,
        accuracy_interval=None if metrics is None else metrics.accuracy_interval,
        split=split,
        backbone=manifest.backbone.name,
        kind="frozen",
    )


def _unfinished(folder: Path) -> Row:
    rows = run.read_split(folder / "split.csv")
    return Row(
        folder=folder,
        state="unfinished",
        created=_written(folder),
        photos=len(rows),
        classes=tuple(sorted({row.label for row in rows})),
        problem="not finished",
    )


def _written(folder: Path) -> str | None:
    """When the table of photos was written, as ISO 8601 in UTC: the start of the training."""
    try:
        seconds = (folder / "split.csv").stat().st_mtime
    except OSError:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
