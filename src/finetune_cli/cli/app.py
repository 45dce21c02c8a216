"""The frame of the command line: the app, options that several commands share, and errors turned into exit codes.

Nothing heavy is imported at the top: `finetune --help` and a mistyped option answer at once.
"""

import contextlib
import functools
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from finetune_cli import __version__, signals, streams
from finetune_cli.errors import BadPhotos, FinetuneError, Interrupted, UsageError
from finetune_cli.text import address, listed, shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.config.schema import Config
    from finetune_cli.runs.run import Run

app = typer.Typer(
    name="finetune",
    help="A folder of photos in, an image classifier that you can trust out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

P = ParamSpec("P")
_MOST_CLASSES = 8  # that are named when a run is chosen


class ResultFormat(StrEnum):
    """How a command writes its result: for a person, or alone on stdout for a program."""

    table = "table"
    json = "json"


class _Command(TyperCommand):
    """A command whose complaints about options begin with what is wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as exc:
            exc.message = exc.message.removeprefix("Value error, ")  # pydantic's words, which Typer passes on
            raise


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
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show results, warnings and errors only.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """A folder of photos in, an image classifier that you can trust out."""
    if version:
        typer.echo(f"finetune-cli {__version__}")
        raise typer.Exit


def command(group: typer.Typer) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a function as a command of `group`; its errors become one or two lines and an exit code."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            signals.catch()
            try:
                try:
                    _refuse_addresses(kwargs.values())
                    function(*args, **kwargs)
                finally:
                    sys.stdout.flush()
            except (FinetuneError, Interrupted) as exc:
                _fail(exc, bool(kwargs.get("debug")))
            except BrokenPipeError:
                # The reader of our output (`| head`) has gone; Python must not complain when it flushes at exit.
                streams.drop_output()
                raise typer.Exit(0) from None
            except MemoryError as exc:
                error = FinetuneError(f"out of memory: {exc}", "close other programs; for train, lower runtime.workers")
                error.__cause__ = exc
                _fail(error, bool(kwargs.get("debug")))
            except Exception as exc:  # noqa: BLE001 - the last line of defence: a bug is told in a line, too
                known = streams.translated(exc) if isinstance(exc, OSError) else None
                error = known or FinetuneError(
                    f"unexpected {type(exc).__name__}: {exc}", "this is a bug; run again with --debug and report it"
                )
                error.__cause__ = exc
                _fail(error, bool(kwargs.get("debug")))

        return group.command(cls=_Command)(guarded)

    return register


def _refuse_addresses(values: Iterable[object]) -> None:
    """Raise `UsageError` for a web address in place of a path, among all that was typed."""
    for value in values:
        for each in value if isinstance(value, list | tuple) else (value,):
            typed = address(each) if isinstance(each, str | Path) else None
            if typed is not None and not Path(each).exists():
                raise UsageError(
                    f"{shown(typed)} is an address, not a path", "download it, and name the file or folder"
                )


def _fail(error: FinetuneError | Interrupted, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    from finetune_cli.cli.console import Console

    Console().error(error)
    raise typer.Exit(error.exit_code)


def new_console(quiet: bool = False) -> "Console":
    """The terminal; Rich is imported here and not before."""
    from finetune_cli.cli.console import Console

    return Console(quiet)


def load_config(path: Path | None, overrides: list[str] | None, own: bool = False) -> "Config":
    """The config of a YAML file and ``key=value`` overrides; `own`: it is in a run, and may not be a link."""
    from finetune_cli.config import schema

    return schema.load(path, overrides or (), own)


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
    """CONFIG may be left out; then the first override stands in its place."""
    if config is not None and "=" in config and not Path(config).exists():
        return None, [config, *(overrides or [])]
    return (Path(config) if config is not None else None), overrides


def check_png(path: Path) -> None:
    """Raise `UsageError` unless a PNG picture can be called `path`; it is looked at before the work."""
    if path.is_dir() or path.suffix.lower() != ".png":
        raise UsageError(f"{path} is no name for a PNG picture", "name a file that ends in .png")


def find_run(console: "Console", folder: Path | None) -> "Run":
    """The named run; or the newest finished one, and then a note says which it is, from when and of which classes."""
    from finetune_cli.runs import run

    if folder is not None:
        return run.Run.load(run.located(folder))
    found = run.Run.load(run.find(run.DIRECTORY))
    console.note(
        f"run: {found.folder} of {found.manifest.created[:10]}, classes: {listed(found.classes, _MOST_CLASSES)}"
    )
    return found
