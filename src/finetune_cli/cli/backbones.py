"""`finetune backbones`: which backbones there are."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from finetune_cli.cli.app import DebugOption, app, command, new_console


class BackbonesFormat(StrEnum):
    """How `backbones` writes its list."""

    table = "table"
    json = "json"


@command(app)
def backbones(
    format: Annotated[BackbonesFormat, typer.Option(help="How to write it.")] = BackbonesFormat.table,  # noqa: A002
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """List the backbones, their sizes, and where their ImageNet weights come from."""
    from finetune_cli.backbones import listing as command_backbones

    console = new_console()
    rows = list(command_backbones.backbones())
    if format is BackbonesFormat.json:
        console.print(json.dumps([row.to_json() for row in rows], indent=2))
        return
    sources = {"bundled": "bundled", "keras-cache": "in Keras's cache", "download": "download"}
    console.table(
        ("backbone", "million weights", "MB", "input", "weights"),
        [
            (row.name, f"{row.parameters / 1e6:.1f}", f"{row.megabytes:.0f}", row.input_size, sources[row.weights])
            for row in rows
        ],
        right=(1, 2, 3),
    )
    console.print("input: the side in pixels that the weights were trained with; image.size may be another")
    console.print("the names of keras.applications (ResNet50) are understood, too; so is the path of a .keras file")
