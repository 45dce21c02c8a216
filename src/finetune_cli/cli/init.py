"""`finetune init`: a commented config for a folder of photos."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.cli.options import DebugOption, new_console
from finetune_cli.errors import UsageError


def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="The folder of photos, or a table.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The config to write.")] = Path("config.yaml"),
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Write a commented config for a folder of photos that is ready for training."""
    from finetune_cli import files
    from finetune_cli.places import place
    from finetune_cli.training.starter_config import starter_config

    console = new_console()
    if files.holds_something(output):
        raise UsageError(f"{output} already exists", "choose another name with --output")
    with files.atomic_output(output) as temporary:
        text = starter_config(place(data), output, console)
        temporary.write_text(text, "utf-8", "surrogateescape", newline="\n")
    console.print(f"wrote {output}; train with: finetune train {shlex.quote(str(output))}")
