"""`finetune backbones`: the known backbones, as a table or JSON."""

import json
from typing import Annotated

import typer

from finetune_cli.cli.options import DebugOption, ResultFormat, new_console


def backbones(
    format: Annotated[ResultFormat, typer.Option(help="How to write the list.")] = ResultFormat.table,  # noqa: A002
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """List the backbones, their sizes, and where their ImageNet weights come from."""
    from finetune_cli.backbones.listing import backbones as list_backbones

    console = new_console()
    rows = list(list_backbones())
    if format is ResultFormat.json:
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
    console.print("the names of keras.applications (ResNet50) also work, and so does the path of a .keras file")
