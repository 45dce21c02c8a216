"""`finetune check`: every photo decoded, or what differs from where a run was trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import (
    DebugOption,
    OptionalConfigArgument,
    OverridesArgument,
    QuietOption,
    config_or_override,
    find_run,
    load_config,
    nearby,
    new_console,
    skippable,
)
from finetune_cli.errors import UsageError
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.training.check import Report
    from finetune_cli.training.reproduce import Reproduction


def check(
    config: OptionalConfigArgument = None,
    overrides: OverridesArgument = None,
    reproduce: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Report instead what differs here from where RUN was trained.", show_default=False
        ),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Decode every photo of a config and report every problem, without training."""
    console = new_console(quiet)
    if (config is None) == (reproduce is None):
        raise UsageError("check needs either CONFIG or --reproduce RUN", "name one of them")
    if reproduce is not None:
        from finetune_cli.training.reproduce import reproduce as compare_with_here

        _print_differences(console, compare_with_here(find_run(console, reproduce), console))
        return
    path, overrides = config_or_override(config, overrides)
    loaded = load_config(path, overrides)
    from finetune_cli.training.check import check as check_photos
    from finetune_cli.training.near import may_split_otherwise

    with skippable(path, overrides):
        report = check_photos(loaded, console)
        _print_photos(console, report)
    if line := may_split_otherwise(report.data, loaded.data.near_duplicates):
        console.print(line)


def _print_photos(console: "Console", report: "Report") -> None:
    """The end of `check`: photos by class and split."""
    splits = [split for split in ("train", "val", "test") if any(row[split] for row in report.counts.values())]
    console.table(
        ("class", *splits),
        [(name, *(row[split] for split in splits)) for name, row in report.counts.items()],
        right=range(1, len(splits) + 1),
    )
    for photo in report.bad:
        console.print(f"would skip {shown(photo.path)}: {shown(photo.reason)}")
    console.print("every photo was decoded" if not report.bad else f"{len(report.bad)} bad photos would be skipped")


def _print_differences(console: "Console", found: "Reproduction") -> None:
    """The end of `check --reproduce`: what differs here from where a run was trained."""
    folder = shown(nearby(found.run.folder))
    if found.environment:
        rows = [(difference.what, difference.before or "-", difference.now or "-") for difference in found.environment]
        console.table(("", f"{folder} was trained with", "here"), rows)
    for line in found.weights:
        console.print(shown(line))
    for line in found.photos:
        console.print(f"photos {shown(line)}")
    if found.photos_problem:
        console.print(f"the photos could not be compared: {shown(found.photos_problem)}")
    if found.same:
        console.print(
            f"nothing differs here from where {folder} was trained; the same weights come from:\n"
            f"  finetune train {folder}/config.yaml"
        )
    else:
        console.print("so training again may give other weights")
