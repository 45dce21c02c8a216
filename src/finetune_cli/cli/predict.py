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

from finetune_cli.cli.options import DebugOption, QuietOption, RunOption, find_run, new_console
from finetune_cli.errors import DataError, MissingExtra, UsageError
from finetune_cli.text import counted, shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.inference.predict import PredictionRow, Predictor
    from finetune_cli.places import Place

Write = Callable[["PredictionRow"], None]
Writer = Callable[[IO[Any], int], contextlib.AbstractContextManager[Write]]
_ROW_GROUP = 10_000  # rows of a Parquet file that are held in memory


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
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the predictions to FILE: .csv, .json, .jsonl or .parquet, or any name with --format.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it already exists.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Classify photos. Exits with 3 when some could not be read; the others are classified."""
    form = _output_format(format, output, force)
    from finetune_cli.inference.predict import Limits, RunPredictor
    from finetune_cli.inference.predict import predict as predict_photos
    from finetune_cli.parallel import cores
    from finetune_cli.photos.dataset import iter_photos

    console = new_console(quiet)
    single = len(paths) == 1 and os.path.isfile(paths[0])  # noqa: PTH113 - Path.is_file raises for a name too long
    predictor: Predictor
    if model is None:
        predictor = RunPredictor(find_run(console, run), workers=1 if single else cores(), latency=single)
    elif run is None:
        from finetune_cli.exports import opening

        predictor = opening.open_model(model, cores())
    else:
        raise UsageError("--run and --model cannot be combined", "drop one of them")
    ignored: Counter[str] = Counter()
    photos = iter_photos(_paths(paths), ignored)
    predictions = predict_photos(predictor, photos, top_k, Limits(min_confidence, unknown), at_once="-" in paths)
    first = next(predictions, None)
    if first is None:
        _note_ignored(console, ignored)
        raise DataError("no photo was found in the given paths", "name photos, or folders with photos in them")
    rows = itertools.chain([first], predictions)
    written, failed = write_predictions(rows, form, output, min(top_k, len(predictor.classes)))
    _note_ignored(console, ignored)
    if output is not None:
        console.print(f"wrote {counted(written, 'row')} to {output}")
    if failed:
        raise DataError(
            f"{failed} of {counted(written, 'photo')} could not be read; their rows say why",
            "correct the path, or repair or remove the file",
        )


def _note_ignored(console: "Console", ignored: Counter[str]) -> None:
    """Report which files in the folders were ignored."""
    from finetune_cli.photos.folders import describe_ignored

    for note in describe_ignored(ignored, "the folders"):
        console.note(note)


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
    from finetune_cli.tables import TableWriter

    writer = TableWriter(file)
    writer.row(_columns(top_k))

    def write(row: "PredictionRow") -> None:
        writer.row(
            "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell for cell in _cells(row, top_k)
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


@contextlib.contextmanager
def _parquet(file: IO[bytes], top_k: int) -> Iterator[Write]:
    arrow, parquet = import_pyarrow()
    names = _columns(top_k)
    types = [arrow.float64() if name.startswith(("probability", "p_value")) else arrow.string() for name in names]
    schema = arrow.schema(list(zip(names, types, strict=True)))
    rows: list[dict[str, object]] = []
    with parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(arrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(row: "PredictionRow") -> None:
            rows.append({name: _utf8(cell) for name, cell in zip(names, _cells(row, top_k), strict=True)})
            if len(rows) == _ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()


def import_pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`. Raises `MissingExtra`."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("the format parquet", "parquet") from exc
    return pa, parquet


def _columns(top_k: int) -> list[str]:
    others = [f"{what}_{i}" for i in range(2, top_k + 1) for what in ("label", "probability")]
    return ["path", "label", "probability", *others, "error", "p_value"]


def _cells(row: "PredictionRow", top_k: int) -> list[str | float | None]:
    """What belongs in the columns; the second class and those after it are there whatever the label is."""
    others = [cell for pair in row.top[1:] for cell in pair]
    empty = [None] * (2 * (top_k - 1) - len(others))
    return [row.path, row.label, row.probability, *others, *empty, row.error, row.p_value]


def _utf8(cell: str | float | None) -> str | float | None:
    """Parquet's text is UTF-8: bytes of a file name that are not become visible escapes."""
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


WRITERS: dict[str, Writer] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "jsonl": _json_lines,
    "parquet": _parquet,
}
