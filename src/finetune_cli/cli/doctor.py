"""`finetune doctor`: what is wrong with a photo set."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import (
    DebugOption,
    EngineOption,
    OverridesArgument,
    QuietOption,
    RayAddressOption,
    config_or_override,
    engine_overrides,
    load_config,
    nearby,
    new_console,
)
from finetune_cli.errors import GateError, UsageError
from finetune_cli.text import counted

if TYPE_CHECKING:
    from finetune_cli.config.schema import Config


class Problem(StrEnum):
    """What `--fail-on` can name."""

    duplicate = "duplicate"
    near_duplicate = "near-duplicate"
    label = "label"
    outlier = "outlier"
    quality = "quality"


def doctor(
    source: Annotated[
        str | None, typer.Argument(metavar="CONFIG|RUN", help="The YAML file, or a run directory.", show_default=False)
    ] = None,
    overrides: OverridesArgument = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder for doctor.html and fixes.csv.", show_default="here")
    ] = Path(),
    fail_on: Annotated[
        list[Problem] | None,
        typer.Option(
            metavar="PROBLEM",
            help="Exit with code 4 if a photo has this problem; label: high ones only. Can be repeated.",
        ),
    ] = None,
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Look for copies, wrong labels, outliers and bad photos; nothing is changed."""
    console = new_console(quiet)
    named, overrides = config_or_override(source, overrides)
    if named is None and overrides is None:
        raise UsageError("there are no photos to examine", "name a config or a run, or data.train=FOLDER")
    path, config = _config(named, [*(overrides or []), *engine_overrides(engine, ray_address)])
    from finetune_cli import files
    from finetune_cli.doctor import examine, page, table

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file", "name a folder")
    before = table.decided(output / table.FILE)
    files.check_writable(output)
    found = examine.examine(config, console)
    files.make_folder(output)
    kept = table.write(output / table.FILE, found.findings, before)
    page.write(output / page.FILE, found, console)
    rows = [(problem, found.count(problem), found.count(problem, serious=True)) for problem in examine.PROBLEMS]
    console.table(("problem", "photos", "serious"), rows, right=(1, 2))
    if found.bad:
        console.print(f"{counted(len(found.bad), 'photo')} cannot be decoded; {page.FILE} lists them")
    if kept:
        console.print(f"{counted(kept, 'decision')} of the earlier {table.FILE} kept")
    console.print(f"wrote {nearby((output / page.FILE).absolute())} and {nearby((output / table.FILE).absolute())}")
    if found.findings:
        words = [str(nearby(path))] if path is not None else []
        words += [override for override in overrides or () if not override.startswith("data.fixes=")]
        words.append(f"data.fixes={nearby((output / table.FILE).absolute())}")
        console.print(f"edit its column action, then: finetune train {shlex.join(words)}")
    counts = {problem.value: found.count(problem.value, serious=problem == Problem.label) for problem in fail_on or ()}
    if any(counts.values()):
        listed = ", ".join(f"{count} with {problem}" for problem, count in counts.items() if count)
        raise GateError(f"there are photos with problems: {listed}", f"see {page.FILE} and {table.FILE}")


def _config(named: Path | None, overrides: list[str] | None) -> tuple[Path | None, "Config"]:
    """The config at `named`, or that of the run `named`, and where it is; without a name, what `overrides` say."""
    from finetune_cli.runs import run

    located = run.located(named) if named is not None else None
    if located is not None and located.is_dir():
        path = run.Run.load(located).file("config.yaml")
        return path, load_config(path, overrides, own=True)
    return named, load_config(named, overrides)
