"""The Typer app: the list of commands, and the guard that turns their errors into exit codes.

Nothing heavy is imported at the top: `finetune --help` and a mistyped option answer at once.
"""

import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from finetune_cli import __version__, signals, streams
from finetune_cli.errors import FinetuneError, Interrupted, UsageError
from finetune_cli.storage import check, is_address, retries
from finetune_cli.text import address, shown

# In the order of `finetune --help`. Each is a module here with a function of that name, or, for a group of commands,
# with a Typer app `group` and a tuple of functions `COMMANDS`.
COMMANDS = (
    "train",
    "predict",
    "evaluate",
    "explain",
    "export",
    "backbones",
    "runs",
    "check",
    "doctor",
    "preview",
    "inspect",
    "init",
    "sample",
    "cache",
)

app = typer.Typer(
    name="finetune",
    help="A folder of photos in, an image classifier that you can trust out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

P = ParamSpec("P")


class _Command(TyperCommand):
    """A command whose errors about options start with what is wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as exc:
            exc.message = exc.message.removeprefix("Value error, ")  # pydantic's words, which Typer passes on
            raise


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """A folder of photos in, an image classifier that you can trust out."""
    if version:
        typer.echo(f"finetune-cli {__version__}")
        raise typer.Exit


def register(group: typer.Typer, function: Callable[..., None]) -> None:
    """Make `function` a command of `group`; its errors become two lines and an exit code."""
    group.command(cls=_Command)(_guarded(function))


def _guarded(function: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        signals.catch()
        try:
            try:
                _check_addresses(kwargs.values())
                function(*args, **kwargs)
                _note_retries(bool(kwargs.get("quiet")))
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
        except Exception as exc:  # noqa: BLE001 - the last line of defence: a bug is reported in two lines, too
            known = streams.translated(exc) if isinstance(exc, OSError) else None
            error = known or FinetuneError(
                f"unexpected {type(exc).__name__}: {exc}", "this is a bug; run again with --debug and report it"
            )
            error.__cause__ = exc
            _fail(error, bool(kwargs.get("debug")))

    return guarded


def _check_addresses(values: Iterable[object]) -> None:
    """Raise `UsageError` for an address that cannot be used, and for one in place of a path on this machine."""
    for value in values:
        for item in value if isinstance(value, list | tuple) else (value,):
            if is_address(item):
                check(str(item))
            typed = address(item) if isinstance(item, Path) else None
            if typed is not None and not item.exists():
                raise UsageError(
                    f"{shown(typed)} is an address, and this must be a path on this machine",
                    "download it, and name the file or folder",
                )


def _note_retries(quiet: bool) -> None:
    if retries():
        from finetune_cli.cli.console import Console

        Console(quiet).note(f"requests to a store that had to be made again: {retries()}")


def _fail(error: FinetuneError | Interrupted, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    from finetune_cli.cli.console import Console

    Console().error(error)
    raise typer.Exit(error.exit_code)


for name in COMMANDS:
    module = importlib.import_module(f"finetune_cli.cli.{name}")
    if hasattr(module, "group"):
        app.add_typer(module.group)
        for function in module.COMMANDS:
            register(module.group, function)
    else:
        register(app, getattr(module, name))
