"""The command line: options -> config -> one call -> render. The frame is in `cli_app`."""

import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli_app import (
    ConfigArgument,
    DebugOption,
    OverridesArgument,
    QuietOption,
    RunOption,
    app,
    command,
    find_run,
    load_config,
    new_console,
)
from finetune_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from finetune_cli.console import Console
    from finetune_cli.runs.run import Run

__all__ = ["app"]


class OutputFormat(StrEnum):
    """How `predict` writes its answers."""

    table = "table"
    csv = "csv"
    jsonl = "jsonl"


@command
def train(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="The YAML file.", show_default=False)] = None,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an unfinished run: the one named instead of CONFIG, or the newest."),
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The run's name.", show_default=False)] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Train a classifier on a folder of photos."""
    from finetune_cli import render

    console = new_console(quiet)
    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = [config, *(overrides or [])], None
    if resume:
        render.trained(console, _resume(console, config, overrides))
        return
    from finetune_cli.commands import train as command_train  # after the config is known to be good

    path = Path(config) if config is not None else None
    loaded = load_config(path, overrides)
    render.trained(console, command_train.train(loaded, console, path.stem if path else "run", name))


def _resume(console: "Console", run_folder: str | None, overrides: list[str] | None) -> "Run":
    from finetune_cli.runs import run

    if run_folder is not None and "=" in run_folder and not Path(run_folder).exists():
        overrides, run_folder = [run_folder, *(overrides or [])], None
    folder = Path(run_folder) if run_folder else run.find_unfinished(Path("runs"))
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} is not a run: it has no config.yaml", "name the run directory after --resume")
    allowed = ("training.epochs=", "training.early_stopping_patience=", "runtime.", "data.")
    for override in overrides or ():
        if not override.startswith(allowed):
            raise UsageError(
                f"{override.split('=')[0]} cannot change when a run is resumed",
                "only training.epochs, training.early_stopping_patience, data and runtime can; or train a new run",
            )
    from finetune_cli.commands import train as command_train

    console.note(f"resuming {folder}")
    return command_train.resume(folder, load_config(folder / "config.yaml", overrides), console)


@command
def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Photos, folders, or - for paths on stdin.")],
    run: RunOption = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many classes to tell of a photo.")] = 3,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Below this probability the label is `unsure`.")
    ] = 0.0,
    format: Annotated[OutputFormat, typer.Option(help="How to write the answers.")] = OutputFormat.table,  # noqa: A002
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers to FILE.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Say what is on photos. Exits 3 when some could not be read; the others are answered."""
    from finetune_cli import render
    from finetune_cli.commands import predict as command_predict
    from finetune_cli.parallel import cores
    from finetune_cli.photos.dataset import iter_photos

    console = new_console(quiet)
    loaded = find_run(console, run)
    one = len(paths) == 1 and Path(paths[0]).is_file()
    predictor = command_predict.RunPredictor(loaded, workers=1 if one else cores(), latency=one)
    photos = iter_photos(_paths(paths))
    predictions = command_predict.predict(predictor, photos, top_k, min_confidence=min_confidence)
    told, failed = render.predictions(console, predictions, format.value, output, min(top_k, len(predictor.classes)))
    if not told:
        raise DataError("no photo was found under the given paths")
    if failed:
        raise DataError(f"{failed} of {told} photos could not be read; their rows say why")


def _paths(arguments: list[str]) -> Iterator[Path]:
    """Paths as given; `-` stands for those on standard input, one a line (or NUL-separated), read as they come."""
    for argument in arguments:
        if argument != "-":
            yield Path(argument)
            continue
        for line in sys.stdin.buffer:
            for name in line.rstrip(b"\n").split(b"\0"):
                if name:
                    yield Path(os.fsdecode(name))


@command
def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Labelled photos: a folder of class folders, or a CSV file. [default: the run's test photos if it has "
            "some, else its validation photos]",
            show_default=False,
        ),
    ] = None,
    run: RunOption = None,
    root: Annotated[
        Path | None, typer.Option("--data", metavar="ROOT", help="Where the run's own photos are now.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The evaluation's name.", show_default=False)] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN2", help="Say whether RUN2 does better on the same photos.")
    ] = None,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="Exit 4 when the accuracy is below X.")
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html, too.")] = True,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Say how good a run is on labelled photos. Exits 3 when some could not be read; the others are judged."""
    from finetune_cli import render
    from finetune_cli.commands import evaluate as command_evaluate
    from finetune_cli.runs.run import Run

    console = new_console(quiet)
    loaded = find_run(console, run)
    other = Run.load(compare) if compare is not None else None
    result = command_evaluate.evaluate(loaded, console, data, root, name, other)
    if report:
        from finetune_cli.commands import report as command_report

        command_report.report(result.judged, result.folder, console)
    render.evaluated(console, result)
    if fail_under is not None:
        command_evaluate.gate(result, fail_under)
    if bad := len(result.judged.bad):
        raise DataError(f"{bad} of {bad + result.judged.evaluation.photos} photos were left out; see above")


@command
def explain(
    photo: Annotated[Path, typer.Argument(metavar="PATH", help="The photo.")],
    run: RunOption = None,
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="The class to map. [default: the answer]")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("heatmap.png"),
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Show which places of a photo speak for a class: an exact heat map, and the evidence for every class."""
    from finetune_cli import render
    from finetune_cli.commands import explain as command_explain

    console = new_console(quiet)
    render.explained(console, command_explain.explain(find_run(console, run), photo, class_name, output))


@command
def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Decode every photo of a config and report all that is wrong; trains nothing."""
    from finetune_cli import render

    console = new_console(quiet)
    loaded = load_config(config, overrides)
    from finetune_cli.commands import check as command_check

    render.checked(console, command_check.check(loaded, console))


@command
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
    loaded = load_config(config, overrides)
    from finetune_cli.commands import preview as command_preview
    from finetune_cli.runs import preparation

    data = preparation.index(loaded, console)
    augmenter = preparation.augmenter(loaded)
    command_preview.contact_sheet(data, augmenter, preparation.image_settings(loaded), output, photos)
    console.print(f"wrote {output}")


@command
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The folder of photos, or a CSV file.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The config to write.")] = Path("config.yaml"),
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Look at a folder of photos and write a commented config that trains as it is."""
    from finetune_cli import files
    from finetune_cli.commands import starter

    console = new_console()
    if output.exists():
        raise UsageError(f"{output} exists already", "choose another name with --output")
    files.write_text(output, starter.starter_config(data, output))
    console.print(f"wrote {output}; train with: finetune train {output}")


@command
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    photos: Annotated[int, typer.Option(min=2, max=10_000, help="Pictures a class.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other pictures.")] = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Draw a small practice set of city and forest scenes; they are drawings, not photos."""
    from finetune_cli.photos import sample as photos_sample

    console = new_console(quiet)
    with console.stage("drawing", 2 * photos, "pictures") as advance:
        written = photos_sample.draw(folder, photos, seed, advance)
    console.print(f"drew {len(written)} pictures of city and forest in {folder} (drawings, to practise with)")
