"""`finetune cache`: show the feature cache, empty it, or make it smaller."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.cli.options import DebugOption, new_console

group = typer.Typer(name="cache", help="Show the feature cache, empty it, or make it smaller.", no_args_is_help=True)
CacheOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="The cache folder. [default: the user's]", show_default=False),
]


def info(folder: CacheOption = None, debug: DebugOption = False) -> None:  # noqa: ARG001
    """Show where the cache is and how large it is."""
    from finetune_cli.cache import maintenance

    for line in maintenance.info(_cache_folder(folder)):
        new_console().print(line)


def clear(folder: CacheOption = None, debug: DebugOption = False) -> None:  # noqa: ARG001
    """Remove all features, digests and converted backbones; they are made again when needed."""
    from finetune_cli.cache import maintenance

    new_console().print(maintenance.clear(_cache_folder(folder)))


def prune(
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Such as 5GB or 500MB.")],
    folder: CacheOption = None,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Remove features, and then backbones, until the cache is no larger than SIZE: the oldest first."""
    from finetune_cli.cache import maintenance

    new_console().print(maintenance.prune(_cache_folder(folder), max_size))


def _cache_folder(folder: Path | None) -> Path:
    from finetune_cli.cache.folder import own_folder

    return own_folder(folder)


# In the order of `finetune cache --help`.
COMMANDS = (info, clear, prune)
