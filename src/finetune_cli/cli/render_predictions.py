"""Answers of `predict` as they come: lines for a person, or rows of CSV, JSON and Parquet for a program."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune_cli.errors import MissingExtra
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.inference.predict import Prediction

Write = Callable[["Prediction"], None]
Writer = Callable[[IO[Any], int], contextlib.AbstractContextManager[Write]]
_ROW_GROUP = 10_000  # rows of a Parquet file that are held in memory


def predictions(rows: "Iterable[Prediction]", form: str, output: Path | None, top_k: int) -> tuple[int, int]:
    """Write `rows` as they come; returns how many there were and how many of them are errors.

    `output` is there as a whole or not at all; standard output is flushed after every row, for whoever waits for it.
    Raises `MissingExtra` for `parquet` without pyarrow.
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
    def write(row: "Prediction") -> None:
        if row.error is not None:
            file.write(f"{shown(row.path)}: error: {shown(row.error)}\n")
            return
        others = ", ".join(f"{shown(label)} {p:.1%}" for label, p in row.top if label != row.label)
        best = f"{shown(row.label)} {row.probability:.1%}" if row.label == row.top[0][0] else shown(row.label)
        file.write(f"{shown(row.path)}: {best}{f' ({others})' if others else ''}\n")

    yield write


@contextlib.contextmanager
def _csv(file: IO[str], top_k: int) -> Iterator[Write]:
    from finetune_cli.tables import TableWriter

    writer = TableWriter(file)
    writer.row(_columns(top_k))

    def write(row: "Prediction") -> None:
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

    def write(row: "Prediction") -> None:
        nonlocal before
        file.write(before + json.dumps(row.to_json()))
        before = ",\n"

    yield write
    file.write("[]\n" if before == "[\n" else "\n]\n")


@contextlib.contextmanager
def _parquet(file: IO[bytes], top_k: int) -> Iterator[Write]:
    arrow, parquet = import_pyarrow()
    names = _columns(top_k)
    types = [arrow.float64() if name.startswith("probability") else arrow.string() for name in names]
    schema = arrow.schema(list(zip(names, types, strict=True)))
    rows: list[dict[str, object]] = []
    with parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(arrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(row: "Prediction") -> None:
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
    return ["path", "label", "probability", *others, "error"]


def _cells(row: "Prediction", top_k: int) -> list[str | float | None]:
    """What belongs in the columns; the second class and those after it are there even when the first is `unsure`."""
    others = [cell for pair in row.top[1:] for cell in pair]
    return [row.path, row.label, row.probability, *others, *[None] * (2 * (top_k - 1) - len(others)), row.error]


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
