"""`finetune preview`: a contact sheet of augmented views."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.cli.options import (
    ConfigArgument,
    DebugOption,
    OverridesArgument,
    QuietOption,
    check_png,
    load_config,
    new_console,
)


def preview(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file to write.")] = Path("preview.png"),
    photos: Annotated[int, typer.Option(min=1, max=100, help="How many photos to show.")] = 6,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Draw a contact sheet of augmented views: photos by rows, views by columns."""
    console = new_console(quiet)
    check_png(output)
    loaded = load_config(config, overrides)
    from finetune_cli.cache import folder
    from finetune_cli.training import near, prepare, settings
    from finetune_cli.training.preview import contact_sheet

    data = prepare.index(settings.data_settings(loaded), folder.locate(loaded.runtime.cache_dir), console)
    contact_sheet(data, settings.augmenter(loaded), settings.image_settings(loaded), output, photos)
    console.print(f"wrote {output}")
    if line := near.may_split_otherwise(data, loaded.data.near_duplicates):
        console.print(line)
