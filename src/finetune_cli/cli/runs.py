"""`finetune runs`: the runs in a folder, as a table or JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import DebugOption, ResultFormat, new_console
from finetune_cli.text import brief, counted

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.runs.listing import Row


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The folder that holds the runs.")] = Path(
        "runs"
    ),
    format: Annotated[ResultFormat, typer.Option(help="How to write the list.")] = ResultFormat.table,  # noqa: A002
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """List the runs in a folder, the newest last, including unfinished and damaged ones."""
    from finetune_cli.runs.listing import runs as list_runs

    console = new_console()
    found = list_runs(directory)
    if format == ResultFormat.json:
        console.print(json.dumps([row.to_json() for row in found], indent=2))
    elif found:
        _table(console, found)
    else:
        console.print(f"there are no runs in {directory}")


def _table(console: "Console", rows: "Sequence[Row]") -> None:
    console.table(
        ("run", "date", "photos", "classes", "accuracy", "on", "backbone", "kind"),
        [
            (
                row.folder.name,
                "-" if row.created is None else row.created[:10],
                "-" if row.photos is None else row.photos,
                "-" if row.classes is None else len(row.classes),
                "-" if row.accuracy is None else f"{row.accuracy:.1%}",
                {"val": "validation", "folds": "cross-validation", "test": "test"}.get(row.split or "", "-"),
                brief(row.backbone or "-"),
                row.kind or row.state,
            )
            for row in rows
        ],
        right=(2, 3, 4),
    )
    for row in rows:
        if row.state == "damaged":
            console.print(f"damaged: {row.problem}")
    if unfinished := [row for row in rows if row.state == "unfinished"]:
        console.print(
            f"{counted(len(unfinished), 'unfinished run')}; resume with: "
            f"finetune train --resume {unfinished[-1].folder}"
        )
