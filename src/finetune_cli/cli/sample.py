"""`finetune sample`: the drawn practice set."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.cli.options import DebugOption, QuietOption, new_console


def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    photos: Annotated[int, typer.Option(min=2, max=10_000, help="Pictures per class.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other pictures.")] = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Draw a small practice set of city and forest scenes; they are drawings, not photos."""
    from finetune_cli.practice.sample import draw

    console = new_console(quiet)
    with console.stage("drawing", 2 * photos, "pictures") as advance:
        written = draw(folder, photos, seed, advance)
    console.print(f"drew {len(written)} pictures of city and forest in {folder} (drawings, to practise with)")
