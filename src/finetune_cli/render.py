"""Results as a person or a program reads them: tables on a `Console`, rows of CSV and JSON Lines."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from finetune_cli.console import Console
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.commands.check import Report
    from finetune_cli.commands.predict import Prediction
    from finetune_cli.runs.run import Run


def trained(console: Console, run: "Run") -> None:
    """The end of `train`: how good, how long, and what to try next."""
    manifest = run.manifest
    names = {"val": "selection (validation)", "test": "test"}
    console.print()
    console.title(f"{run.folder}: {manifest['backbone']['name']}, {len(run.classes)} classes")
    rows = [
        (
            names[split],
            f"{metrics['accuracy']:.1%}",
            f"{metrics['accuracy_interval'][0]:.1%} to {metrics['accuracy_interval'][1]:.1%}",
            f"{metrics['majority_baseline']:.1%}",
            metrics["count"],
        )
        for split, metrics in sorted(manifest["metrics"].items(), key=lambda item: item[0], reverse=True)
    ]
    console.table(("accuracy", "", "95 % interval", "always the largest class", "photos"), rows, right=(1, 2, 3, 4))
    seconds = manifest["seconds"]
    console.table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in seconds.items()], right=(1,))
    views = manifest["views"]
    console.print(
        f"views: {views['computed']} computed, {views['cached']} from the cache "
        f"({manifest['cache_bytes'] / 1e6:.0f} MB on disk)"
    )
    if manifest["bad_photos"]:
        console.print(f"skipped {len(manifest['bad_photos'])} bad photos; they are listed in run.json")
    console.print("\ntry next:")
    console.print(f"  finetune predict PHOTO --run {run.folder}")
    console.print(f"  finetune evaluate --run {run.folder}")


def predictions(
    console: Console, rows: "Iterable[Prediction]", form: str, output: Path | None, top_k: int
) -> tuple[int, int]:
    """Write `rows` as they come; returns how many there were and how many of them are errors."""
    told = failed = 0
    with _target(output) as file:
        write = {"table": _table_writer, "csv": _csv_writer, "jsonl": _jsonl_writer}[form](file, top_k)
        for row in rows:
            write(row)
            told += 1
            failed += row.error is not None
    if output is not None:
        console.print(f"wrote {told} rows to {output}")
    return told, failed


@contextmanager
def _target(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    from finetune_cli import files

    with files.atomic_path(output) as path, path.open("w", encoding="utf-8", errors="surrogateescape") as file:
        yield file


Write = Callable[["Prediction"], None]


def _table_writer(file: TextIO, _top_k: int) -> Write:
    def write(row: "Prediction") -> None:
        if row.error is not None:
            file.write(f"{shown(row.path)}: cannot be read: {shown(row.error)}\n")
            return
        others = ", ".join(f"{shown(label)} {p:.1%}" for label, p in row.top if label != row.label)
        best = f"{shown(row.label)} {row.probability:.1%}" if row.label == row.top[0][0] else shown(row.label)
        file.write(f"{shown(row.path)}: {best}{f' ({others})' if others else ''}\n")

    return write


def _csv_writer(file: TextIO, top_k: int) -> Write:
    from finetune_cli.tables import TableWriter

    writer = TableWriter(file)
    others = range(2, top_k + 1)
    writer.row(
        ["path", "label", "probability", *(f"{what}_{i}" for i in others for what in ("label", "probability")), "error"]
    )

    def write(row: "Prediction") -> None:
        cells: list[object] = [row.path, row.label or "", "" if row.probability is None else f"{row.probability:.6g}"]
        for i in others:
            cells += [row.top[i - 1][0], f"{row.top[i - 1][1]:.6g}"] if i <= len(row.top) else ["", ""]
        writer.row([*cells, row.error or ""])

    return write


def _jsonl_writer(file: TextIO, _top_k: int) -> Write:
    return lambda row: file.write(json.dumps(row.to_json()) + "\n") and None


def checked(console: Console, report: "Report") -> None:
    """The end of `check`: photos by class and split."""
    splits = [split for split in ("train", "val", "test") if any(row[split] for row in report.counts.values())]
    console.table(
        ("class", *splits),
        [(name, *(row[split] for split in splits)) for name, row in report.counts.items()],
        right=range(1, len(splits) + 1),
    )
    for photo in report.bad:
        console.print(f"would skip {shown(photo.path)}: {shown(photo.reason)}")
    console.print("every photo was decoded" if not report.bad else f"{len(report.bad)} bad photos would be skipped")
