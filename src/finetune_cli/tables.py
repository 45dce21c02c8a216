"""CSV files that are read back as they were written, and that cannot inject formulas into a spreadsheet; pyarrow."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from finetune_cli import files
from finetune_cli.errors import MissingExtra

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


class _Target(Protocol):
    def write(self, text: str, /) -> object: ...


class _UnixLines:
    """Python's csv module quotes a carriage return only if lines end with one; people want lines that do not."""

    def __init__(self, target: _Target) -> None:
        self._target = target

    def write(self, row: str) -> None:
        self._target.write(row.removesuffix("\r\n") + "\n")


class TableWriter:
    """Writes rows of CSV to `target`, with every text cell defused."""

    def __init__(self, target: _Target) -> None:
        self._writer = csv.writer(_UnixLines(target), lineterminator="\r\n")

    def row(self, cells: Iterable[object]) -> None:
        """Write one row."""
        self._writer.writerow([defuse(cell) for cell in cells])


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file atomically; names that are not UTF-8 are written byte for byte. Raises `StorageError`."""
    text = io.StringIO()
    writer = TableWriter(text)
    writer.row(header)
    for row in rows:
        writer.row(row)
    files.write_text(path, text.getvalue())


def write_records(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """As `write_csv`, of at least one record; the keys of the first are the header. Raises `StorageError`."""
    header = list(records[0])
    write_csv(path, header, [[record[key] for key in header] for record in records])


def read_csv(path: Path, header: Sequence[str]) -> list[list[str]]:
    """The rows below `header` of a file that `write_csv` wrote. Raises `ValueError` when it is another table."""
    return parse_csv(files.read_own(path), header)


def parse_csv(data: bytes, header: Sequence[str]) -> list[list[str]]:
    """As `read_csv`, of the content of a file."""
    text = data.decode("utf-8", "surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if (
        not rows
        or [undo_defuse(cell) for cell in rows[0]] != list(header)
        or any(len(row) != len(header) for row in rows)
    ):
        raise ValueError(f"it is not a table with the columns {', '.join(header)}")
    return [[undo_defuse(cell) for cell in row] for row in rows[1:]]


def import_pyarrow(purpose: str) -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`. Raises `MissingExtra`, which says that `purpose` needs them."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra(purpose, "parquet") from exc
    return pa, parquet


def parse_numbers(data: bytes) -> list[dict[str, float]]:
    """The rows of a table of numbers, by the names in its header, without empty cells.

    Raises `ValueError` when a cell is not a number.
    """
    text = io.StringIO(data.decode("utf-8"), newline="")
    return [{key: float(value) for key, value in row.items() if value != ""} for row in csv.DictReader(text)]


def defuse(cell: object) -> object:
    """Text that starts like a formula gets an apostrophe in front, as spreadsheets themselves mark text.

    Text that starts with an apostrophe gets one more, so that the change can be undone. Numbers stay as they are.
    Source: https://owasp.org/www-community/attacks/CSV_Injection
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def undo_defuse(cell: str) -> str:
    """The text that `defuse` was given."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
