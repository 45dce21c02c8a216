"""Options that several commands share, and the helpers that turn what was typed into a run or a config.

Nothing heavy is imported at the top: `finetune --help` and a mistyped option answer at once.
"""

import contextlib
import shlex
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.errors import BadPhotos, UsageError
from finetune_cli.text import listed

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.config.schema import Config
    from finetune_cli.engines.engine import Engine
    from finetune_cli.runs.run import Run

_MOST_CLASSES = 8  # that are named when a run is chosen


class ResultFormat(StrEnum):
    """How a command writes its result: for a person, or as JSON for a program."""

    table = "table"
    json = "json"


class EngineName(StrEnum):
    """Where photos are processed."""

    local = "local"
    ray = "ray"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Changes to the config, such as training.seed=1.", show_default=False),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="The run directory, or its name under runs/. [default: the newest finished one there]",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="ROOT", help="The folder that holds the run's own photos now.")
]
EngineOption = Annotated[
    EngineName | None,
    typer.Option("--engine", help="Where photos are processed: local threads or a Ray cluster. [default: local]"),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="The Ray cluster: auto or ray://HOST:10001. [default: start one on this machine]",
        show_default=False,
    ),
]
OptionalConfigArgument = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show results, warnings and errors only.")]


def new_console(quiet: bool = False) -> "Console":
    """The terminal; Rich is imported here and not before."""
    from finetune_cli.cli.console import Console

    return Console(quiet)


def load_config(path: Path | None, overrides: list[str] | None, own: bool = False) -> "Config":
    """The config of a YAML file and ``key=value`` overrides; `own`: it is in a run, and must not be a link."""
    from finetune_cli.config import load

    return load.load_config(path, overrides or (), own)


def engine_overrides(engine: EngineName | None, ray_address: str | None) -> list[str]:
    """`--engine` and `--ray-address` as changes to a config."""
    named = {"runtime.engine": engine, "runtime.ray_address": ray_address}
    return [f"{key}={value}" for key, value in named.items() if value is not None]


@contextlib.contextmanager
def opened_engine(
    engine: EngineName | None, ray_address: str | None, console: "Console", single: bool = False
) -> "Iterator[Engine]":
    """The engine for a command without a config; `single`: one thread, for one photo. Raises `UsageError`."""
    from finetune_cli.engines import opening

    if ray_address is not None:
        opening.check_address(ray_address)
        if engine is not EngineName.ray:
            raise UsageError("--ray-address has no effect without --engine ray", "add --engine ray")
    name: opening.Name = "ray" if engine is EngineName.ray else "local"
    with opening.opened(name, ray_address, 1 if single else "auto", console) as opened:
        yield opened


@contextlib.contextmanager
def skippable(config: Path | str | None, overrides: list[str] | None, *options: str) -> Iterator[None]:
    """Complete the error about bad photos in the block with the command that trains without them."""
    try:
        yield
    except BadPhotos as exc:
        named = [str(config)] if config is not None else []
        words = ["finetune", "train", *named, *(overrides or []), "data.on_bad_image=skip", *options]
        exc.remedy = f"repair or remove them, or leave them out: {shlex.join(words)}"
        raise


def config_or_override(config: str | None, overrides: list[str] | None) -> tuple[Path | None, list[str] | None]:
    """The path of the config and the overrides; without CONFIG, the first override is in its position."""
    if config is not None and "=" in config and not Path(config).exists():
        return None, [config, *(overrides or [])]
    return (Path(config) if config is not None else None), overrides


def check_png(path: Path) -> None:
    """Raise `UsageError` unless `path` can be the name of a PNG file; called before the work starts."""
    if path.is_dir() or path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not the name of a PNG file", "name a file that ends in .png")


def find_run(console: "Console", folder: Path | None) -> "Run":
    """The named run; or the newest finished one, with a note that names it, its date and its classes."""
    from finetune_cli.runs import run

    if folder is not None:
        return run.Run.load(run.located(folder))
    found = run.Run.load(run.find(run.DIRECTORY))
    console.note(
        f"run: {found.folder} of {found.manifest.created[:10]}, classes: {listed(found.classes, _MOST_CLASSES)}"
    )
    return found


def nearby(path: Path) -> Path:
    """`path` relative to the current folder if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
