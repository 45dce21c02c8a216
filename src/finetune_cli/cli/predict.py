"""`finetune predict`: lines for a person, or rows of CSV, JSON and Parquet for a program, as they come."""

import contextlib
import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from finetune_cli.cli.options import (
    DebugOption,
    EngineName,
    EngineOption,
    QuietOption,
    RayAddressOption,
    RunOption,
    find_run,
    new_console,
    opened_engine,
)
from finetune_cli.errors import DataError, UsageError
from finetune_cli.text import counted, shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.inference.predict import Limits, PredictionRow, Predictor
    from finetune_cli.places import Place
    from finetune_cli.runs.run import Run

Write = Callable[["PredictionRow"], None]
Writer = Callable[[IO[Any], int], contextlib.AbstractContextManager[Write]]


class OutputFormat(StrEnum):
    """How `predict` writes its predictions."""

    table = "table"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"


def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Photos, folders, or - for paths on stdin.")],
    run: RunOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="An exported model instead of a run: its folder or file. A SavedModel is a program: use only one that "
            "you trust.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many classes to show for each photo.")] = 3,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Below this probability the label is `unsure`.")
    ] = 0.0,
    unknown: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="RATE",
            help="Answer `unknown` for photos that are less like the training photos than all but this share of "
            "held-out photos; 0: never. [default: unknown.false_rejects of the run]",
            show_default=False,
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        OutputFormat | None,
        typer.Option(help="How to write the predictions. [default: by FILE's suffix, else table]"),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER/",
            help="Write the predictions to FILE: .csv, .json, .jsonl or .parquet, or any name with --format. Into "
            "FOLDER/, a path or an address, it writes Parquet files of 10,000 photos; a repeated command continues.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE if it already exists; begin FOLDER/ anew.")
    ] = False,
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Classify photos. Exits with 3 when some could not be read; the others are classified."""
    folder = _output_folder(output, format)
    file = Path(output) if output is not None and folder is None else None
    form = "parquet" if folder is not None else _output_format(format, file, force)
    from finetune_cli.inference.predict import Flow, Limits
    from finetune_cli.inference.predict import predict as predict_photos
    from finetune_cli.photos.dataset import iter_photos

    console = new_console(quiet)
    on_ray = engine is EngineName.ray
    # Path.is_file raises for a name that is too long.
    single = not on_ray and len(paths) == 1 and os.path.isfile(paths[0])  # noqa: PTH113
    if model is not None and (run is not None or on_ray or folder is not None):
        other = "--run" if run is not None else "--engine ray" if on_ray else "--output FOLDER/"
        raise UsageError(f"{other} and --model cannot be combined", "drop one of them")
    chosen = find_run(console, run) if model is None else None
    predictor = _predictor(chosen, model, on_ray, single)
    limits = Limits(min_confidence, unknown)
    ignored: Counter[str] = Counter()
    with opened_engine(engine, ray_address, console, single) as opened:
        flow = Flow("-" in paths and folder is None, opened)

        def predictions(photos: "Iterable[Place]") -> "Iterator[PredictionRow]":
            return predict_photos(predictor, photos, top_k, limits, flow)

        photos = iter_photos(_paths(paths), ignored)
        if folder is not None:
            assert chosen is not None
            written, failed = _fill(folder, chosen, predictions, photos, top_k, limits, force, console)
        elif (first := next(rows := predictions(photos), None)) is not None:
            rows = itertools.chain([first], rows)
            written, failed = write_predictions(rows, form, file, min(top_k, len(predictor.classes)))
        else:
            written = failed = 0
    _note_ignored(console, ignored)
    if not written:
        raise DataError("no photo was found in the given paths", "name photos, or folders with photos in them")
    if output is not None:
        console.print(f"wrote {counted(written, 'row')} to {output}")
    if failed:
        raise DataError(
            f"{failed} of {counted(written, 'photo')} could not be read; their rows say why",
            "correct the path, or repair or remove the file",
        )


def _predictor(run: "Run | None", model: Path | None, on_ray: bool, single: bool) -> "Predictor":
    """What answers: a run, or the export `model`."""
    from finetune_cli.parallel import cores

    if run is None:
        from finetune_cli.exports import opening

        assert model is not None
        return opening.open_model(model, cores())
    from finetune_cli.inference.predictor import RunPredictor, Source

    if on_ray:  # its workers get the files of the model
        from finetune_cli.runs import novelty

        return RunPredictor(Source.of(run, novelty.read(run)), cores())
    return RunPredictor(run, workers=1 if single else cores(), latency=single)


def _fill(
    folder: "Place",
    run: "Run",
    predictions: "Callable[[Iterable[Place]], Iterator[PredictionRow]]",
    photos: "Iterable[Place]",
    top_k: int,
    limits: "Limits",
    force: bool,
    console: "Console",
) -> tuple[int, int]:
    """Write partitions into `folder`; how many rows it has then, and how many of them are errors."""
    from finetune_cli.inference import partitions

    asked = partitions.question(run, min(top_k, len(run.classes)), limits)
    partitions.begin(folder, asked, force)
    with console.stage("photos", None) as advance:
        found = partitions.write(folder, asked, photos, predictions, advance)
    if found.kept:
        console.note(f"{counted(found.kept, 'row')} of these were there already")
    return found.rows, found.failed


def _note_ignored(console: "Console", ignored: Counter[str]) -> None:
    """Report which files in the folders were ignored."""
    from finetune_cli.photos.folders import describe_ignored

    for note in describe_ignored(ignored, "the folders"):
        console.note(note)


def _output_folder(output: str | None, wanted: OutputFormat | None) -> "Place | None":
    """The folder for partitions, if `output` names one: it ends with a slash, or is an address, or is a folder."""
    from finetune_cli.places import Address, place

    if output is None:
        return None
    where = place(output)
    if isinstance(where, Path) and not output.endswith(("/", os.sep)):
        if wanted is not OutputFormat.parquet or not where.is_dir():
            return None
    elif wanted not in (None, OutputFormat.parquet):
        raise UsageError(f"a folder of partitions is written as parquet, not as {wanted}", "use --format parquet")
    if isinstance(where, Address) and not output.endswith("/"):
        raise UsageError(
            f"{shown(output)} is not the address of a folder", "predictions are written below an address that ends in /"
        )
    from finetune_cli.inference.parquet import import_pyarrow

    import_pyarrow()
    return where


def _output_format(wanted: OutputFormat | None, output: Path | None, force: bool) -> str:
    """The format to write; raises `UsageError` before any work for an `output` that does not fit."""
    if output is None:
        if wanted is OutputFormat.parquet:
            raise UsageError(
                "parquet is a binary format, not for the terminal", "name a file for it: --output FILE.parquet"
            )
        return (wanted or OutputFormat.table).value
    from finetune_cli import files

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
        raise UsageError(f"{output} already exists", "choose another name, or replace it with --force")
    if output.is_file() or not output.exists():  # not /dev/null, nor a pipe
        files.check_writable(output.parent)
    if form is OutputFormat.parquet:
        from finetune_cli.inference.parquet import import_pyarrow

        import_pyarrow()
    return form.value


def _paths(arguments: list[str]) -> Iterator["Place"]:
    """Paths as given; `-` stands for those on standard input, one a line (or NUL-separated), read as they come."""
    from finetune_cli.places import Address, place
    from finetune_cli.storage import is_address

    for argument in arguments:
        if argument != "-":
            yield place(argument)
            continue
        for name in _names(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)):
            if name:
                text = os.fsdecode(name)
                yield Address(text) if is_address(text) else Path(text)


def _names(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of an unbuffered `stream`, or what NUL characters separate in it, as soon as they are there.

    Unbuffered, because a buffered stream is locked while a thread waits for it, and then Python cannot exit cleanly.
    """
    rest, separator = b"", b"\n"
    while data := stream.read(1 << 16):
        rest += data
        if b"\0" in rest:  # names may hold line ends then
            separator = b"\0"
        *names, rest = rest.split(separator)
        yield from names if separator == b"\0" else (name.removesuffix(b"\r") for name in names)
    yield rest if separator == b"\0" else rest.removesuffix(b"\r")


def write_predictions(rows: "Iterable[PredictionRow]", form: str, output: Path | None, top_k: int) -> tuple[int, int]:
    """Write `rows` as they come; returns how many rows there were, and how many of them are errors.

    `output` is written completely or not at all; standard output is flushed after every row, for programs that wait
    for it. Raises `MissingExtra` for `parquet` without pyarrow.
    """
    written = failed = 0
    with _opened(output, form) as file, WRITERS[form](file, top_k) as write:
        for row in rows:
            write(row)
            if output is None:
                file.flush()
            written += 1
            failed += row.error is not None
    return written, failed


@contextlib.contextmanager
def _opened(output: Path | None, form: str) -> Iterator[IO[Any]]:
    if output is None:
        if form != "table" and isinstance(sys.stdout, io.TextIOWrapper):
            # As in a file: UTF-8 whatever the terminal shows, and names that are not UTF-8 keep their bytes.
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        return
    from finetune_cli import files

    with files.atomic_output(output) as path:
        if form == "parquet":
            with path.open("wb") as binary:
                yield binary
        else:
            with path.open("w", encoding="utf-8", errors="surrogateescape") as text:
                yield text


@contextlib.contextmanager
def _table(file: IO[str], _top_k: int) -> Iterator[Write]:
    from finetune_cli.inference.predict import UNKNOWN

    def write(row: "PredictionRow") -> None:
        if row.error is not None:
            file.write(f"{shown(row.path)}: error: {shown(row.error)}\n")
            return
        others = ", ".join(f"{shown(label)} {p:.1%}" for label, p in row.top if label != row.label)
        best = f"{shown(row.label)} {row.probability:.1%}" if row.label == row.top[0][0] else shown(row.label)
        if row.label == UNKNOWN and row.p_value is not None:
            best = f"{UNKNOWN} (p = {row.p_value:.2g})"
        file.write(f"{shown(row.path)}: {best}{f' ({others})' if others else ''}\n")

    yield write


@contextlib.contextmanager
def _csv(file: IO[str], top_k: int) -> Iterator[Write]:
    from finetune_cli.inference import parquet
    from finetune_cli.tables import TableWriter

    writer = TableWriter(file)
    writer.row(parquet.columns(top_k))

    def write(row: "PredictionRow") -> None:
        writer.row(
            "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell
            for cell in parquet.cells(row, top_k)
        )

    yield write


@contextlib.contextmanager
def _json_lines(file: IO[str], _top_k: int) -> Iterator[Write]:
    yield lambda row: print(json.dumps(row.to_json()), file=file)


@contextlib.contextmanager
def _json(file: IO[str], _top_k: int) -> Iterator[Write]:
    before = "[\n"

    def write(row: "PredictionRow") -> None:
        nonlocal before
        file.write(before + json.dumps(row.to_json()))
        before = ",\n"

    yield write
    file.write("[]\n" if before == "[\n" else "\n]\n")


def _parquet(file: IO[bytes], top_k: int) -> contextlib.AbstractContextManager[Write]:
    from finetune_cli.inference import parquet

    return parquet.writer(file, top_k)


WRITERS: dict[str, Writer] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "jsonl": _json_lines,
    "parquet": _parquet,
}
