"""The command line: options -> config -> one call -> render. The frame is in `cli_app`."""

import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from finetune_cli.cli.app import (
    DebugOption,
    OverridesArgument,
    QuietOption,
    ResultFormat,
    RunOption,
    app,
    check_png,
    command,
    config_or_override,
    find_run,
    load_config,
    new_console,
    skippable,
)
from finetune_cli.errors import DataError, UsageError
from finetune_cli.exports import registry
from finetune_cli.text import counted

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from finetune_cli.cli.console import Console
    from finetune_cli.config.schema import Config
    from finetune_cli.runs.run import Run

__all__ = ["app"]

DEFAULT_FORMAT = "savedmodel"


class OutputFormat(StrEnum):
    """How `predict` writes its answers."""

    table = "table"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"


@command(app)
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)] = None,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run, named in place of CONFIG, or the newest unfinished in runs/."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the stages with their seconds and disk space; train nothing.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The run's name. [default: the photo folder's, with a number]", show_default=False
        ),
    ] = None,
    print_run: Annotated[
        bool, typer.Option("--print-run", help="Print the path of the finished run, and nothing else, on stdout.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Train a classifier on a folder of photos."""
    from finetune_cli.cli import render

    console = new_console(quiet)
    if print_run:
        console.results_to_stderr()
    path, overrides = config_or_override(config, overrides)
    if resume and dry_run:
        raise UsageError("--dry-run and --resume exclude each other", "plan a new run: leave out --resume")
    if dry_run:
        _plan(console, load_config(path, overrides))
        return
    finished = _resume(console, path, overrides, name) if resume else _train(console, path, overrides, name)
    render.trained(console, finished)
    if print_run:
        typer.echo(os.fsencode(finished.folder.absolute()))


def _plan(console: "Console", config: "Config") -> None:
    """Show what a training would take."""
    from finetune_cli.cli import render_tuning
    from finetune_cli.training.tuning import budget

    render_tuning.planned(console, budget.budget(config, console))


def _train(console: "Console", path: Path | None, overrides: list[str] | None, name: str | None) -> "Run":
    if name in {"", "null"}:  # which `output.name=` takes for no name
        raise UsageError(f"{name!r} cannot be the name of a run", "choose another --name")
    named = [f"output.name={name}"] if name is not None else []
    loaded = load_config(path, [*(overrides or []), *named])
    from finetune_cli.training import pipeline as command_train  # after the config is known to be good

    with skippable(path, overrides, *(["--name", name] if name is not None else [])):
        return command_train.train(loaded, console)


def _resume(console: "Console", run_folder: Path | None, overrides: list[str] | None, name: str | None) -> "Run":
    from finetune_cli.runs import run

    if name is not None:
        raise UsageError("--name and --resume exclude each other", "a resumed run keeps its name")
    named = run.DIRECTORY if run_folder is None else run.located(run_folder)
    if run_folder and not named.is_dir():
        what = "a file" if named.is_file() else "not there"
        raise UsageError(
            f"{named} is no run directory: it is {what}",
            "name the run to go on with, such as finetune train --resume runs/NAME; for a new run, leave --resume out",
        )
    allowed = ("training.epochs=", "training.early_stopping_patience=", "runtime.", "data.")
    for override in overrides or ():
        if not override.startswith(allowed):
            raise UsageError(
                f"{override.split('=')[0]} cannot change when a run is resumed",
                "only training.epochs, training.early_stopping_patience, data and runtime can; or train a new run",
            )
    # Not by config.yaml, which the folder of a project has as well.
    is_run = (named / "split.csv").is_file() or (named / run.MANIFEST).is_file()
    folder = named if is_run else run.find_unfinished(named)
    from finetune_cli.training import pipeline as command_train

    console.note(f"resuming {folder}")
    return command_train.resume(folder, load_config(folder / "config.yaml", overrides, own=True), console)


@command(app)
def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Photos, folders, or - for paths on stdin.")],
    run: RunOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="An exported model instead of a run: its folder or file. A SavedModel is a program: trust its source.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many classes to tell of a photo.")] = 3,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Below this probability the label is `unsure`.")
    ] = 0.0,
    format: Annotated[  # noqa: A002
        OutputFormat | None,
        typer.Option(help="How to write the answers. [default: what FILE's suffix says, else table]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the answers to FILE: .csv, .json, .jsonl or .parquet, or any name with --format.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there already.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Say what is on photos. Exits 3 when some could not be read; the others are answered."""
    from finetune_cli.cli import render_predictions

    form = _output_format(format, output, force)
    from finetune_cli.inference import predict as command_predict
    from finetune_cli.parallel import cores
    from finetune_cli.photos.dataset import iter_photos

    console = new_console(quiet)
    one = len(paths) == 1 and os.path.isfile(paths[0])  # noqa: PTH113 - Path.is_file raises for a name too long
    predictor: command_predict.Predictor
    if model is None:
        predictor = command_predict.RunPredictor(find_run(console, run), workers=1 if one else cores(), latency=one)
    elif run is None:
        from finetune_cli.exports import opening

        predictor = opening.open_model(model, cores())
    else:
        raise UsageError("--run and --model exclude each other", "drop one of them")
    ignored: Counter[str] = Counter()
    photos = iter_photos(_paths(paths), ignored)
    predictions = command_predict.predict(predictor, photos, top_k, min_confidence=min_confidence, at_once="-" in paths)
    first = next(predictions, None)
    if first is None:
        _note_ignored(console, ignored)
        raise DataError("no photo was found under the given paths", "name photos, or folders with photos in them")
    rows = itertools.chain([first], predictions)
    written, failed = render_predictions.predictions(rows, form, output, min(top_k, len(predictor.classes)))
    _note_ignored(console, ignored)
    if output is not None:
        console.print(f"wrote {counted(written, 'row')} to {output}")
    if failed:
        raise DataError(
            f"{failed} of {counted(written, 'photo')} could not be read; their rows say why",
            "correct the path, or repair or remove the file",
        )


def _note_ignored(console: "Console", ignored: Counter[str]) -> None:
    """Say which files of the folders were left out."""
    from finetune_cli.photos.folders import describe_ignored

    for note in describe_ignored(ignored, "the folders"):
        console.note(note)


def _output_format(wanted: OutputFormat | None, output: Path | None, force: bool) -> str:
    """The format to write; raises `UsageError` before any work for an `output` that does not go with it."""
    if output is None:
        if wanted is OutputFormat.parquet:
            raise UsageError("parquet is no text for the terminal", "name a file for it: --output FILE.parquet")
        return (wanted or OutputFormat.table).value
    from finetune_cli import files
    from finetune_cli.cli.render_predictions import import_pyarrow

    suffix = output.suffix.lower().removeprefix(".").replace("ndjson", "jsonl")
    implied = OutputFormat(suffix) if suffix in set(OutputFormat) - {OutputFormat.table} else None
    form = wanted or implied
    if form is None:
        raise UsageError(
            f"the name {output} does not say which format to write",
            "name a file that ends in .csv, .json, .jsonl or .parquet, or add --format",
        )
    if implied not in (None, form):
        raise UsageError(f"--format {form.value} contradicts the name {output}", "drop --format, or change the name")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", f"name a file, such as {output / 'answers'}.{form.value}")
    if output.is_file() and not force:
        raise UsageError(f"{output} exists already", "choose another name, or replace it with --force")
    if output.is_file() or not output.exists():  # not /dev/null, nor a pipe
        files.check_writable(output.parent)
    if form is OutputFormat.parquet:
        import_pyarrow()
    return form.value


def _paths(arguments: list[str]) -> Iterator[Path]:
    """Paths as given; `-` stands for those on standard input, one a line (or NUL-separated), read as they come."""
    for argument in arguments:
        if argument != "-":
            yield Path(argument)
            continue
        for name in _names(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)):
            if name:
                yield Path(os.fsdecode(name))


def _names(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of an unbuffered `stream`, or what NUL characters separate in it, as soon as they are there.

    Unbuffered, because a buffered one is locked while a thread waits for it, and Python cannot end in peace then.
    """
    rest, separator = b"", b"\n"
    while data := stream.read(1 << 16):
        rest += data
        if b"\0" in rest:  # names may hold line ends then
            separator = b"\0"
        *names, rest = rest.split(separator)
        yield from names if separator == b"\0" else (name.removesuffix(b"\r") for name in names)
    yield rest if separator == b"\0" else rest.removesuffix(b"\r")


@command(app)
def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
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
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the evaluation to this new or empty folder. [default: one under the run's evaluations/]",
            show_default=False,
        ),
    ] = None,
    format: Annotated[ResultFormat, typer.Option(help="How to write the result.")] = ResultFormat.table,  # noqa: A002
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Say how good a run is on labelled photos. Exits 3 when some could not be read; the others are judged."""
    from finetune_cli.cli import render
    from finetune_cli.evaluation import evaluate as command_evaluate
    from finetune_cli.runs.run import Run, located

    console = new_console(quiet)
    loaded = find_run(console, run)
    other = Run.load(located(compare)) if compare is not None else None
    write_report = None
    if report:
        from finetune_cli.report import html as command_report

        write_report = functools.partial(command_report.report, observer=console)
    target = command_evaluate.Target(name, output)
    result = command_evaluate.evaluate(loaded, console, data, root, target, other, write_report)
    if format == ResultFormat.json:
        console.print(json.dumps(result.to_json(), indent=2))
    else:
        render.evaluated(console, result)
    if fail_under is not None:
        command_evaluate.gate(result, fail_under)
    if bad := len(result.judged.bad):
        problem = f"{bad} of {bad + result.judged.evaluation.photos} photos were left out; see above"
        raise DataError(problem, "repair or remove those, to have all photos judged")


@command(app)
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
    from finetune_cli.cli import render
    from finetune_cli.evaluation import explain as command_explain

    console = new_console(quiet)
    check_png(output)
    render.explained(console, command_explain.explain(find_run(console, run), photo, class_name, output))


def _form_option(option: str, what: str) -> "OptionInfo":
    """An option of one form, as the registry knows it."""
    choices = registry.choices(option)
    text = f"{registry.owner(option).name}: {what}. [default: {choices[0]}]"
    return typer.Option(metavar="|".join(choices), help=text)  # type: ignore[no-any-return]


@command(app)
def export(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="A new or empty folder; several formats go into folders below it.")
    ],
    run: RunOption = None,
    format: Annotated[  # noqa: A002
        list[str] | None,
        typer.Option(
            metavar="FORMAT[,FORMAT...]",
            help=f"{', '.join(registry.FORMS)}, or {registry.ALL}. A SavedModel is a program: people must trust who "
            f"made it. [default: {DEFAULT_FORMAT}]",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        int | None, typer.Option(metavar="N", help="savedmodel: the version, DIR/N. [default: the next free number]")
    ] = None,
    quantize: Annotated[str | None, _form_option("quantize", "a smaller model")] = None,
    precision: Annotated[str | None, _form_option("precision", "its weights")] = None,
    root: Annotated[
        Path | None, typer.Option("--data", metavar="ROOT", help="Where the run's own photos are now.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there already.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Write a run in a form that other programs run, after proving on validation photos that it answers the same."""
    from finetune_cli.cli import render
    from finetune_cli.exports import export as command_export

    console = new_console(quiet)
    request = command_export.Request(
        names=registry.parse(format or [DEFAULT_FORMAT]),
        output=output,
        version=version,
        quantize=quantize,
        precision=precision,
        root=root,
        force=force,
    )
    result = command_export.export(find_run(console, run), request, console)
    render.exported(console, result)
    if result.not_installed:
        raise registry.missing_extras(result.not_installed)


from finetune_cli.cli import (  # noqa: E402 - registers the other commands, below these in the help
    backbones,  # noqa: F401
    runs,  # noqa: F401
    tools,  # noqa: F401
)
