"""Predictions as the columns of a table, and as a Parquet file."""

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from finetune_cli import tables
from finetune_cli.inference.predict import PredictionRow

_ROW_GROUP = 10_000  # rows that are held in memory


def columns(top_k: int) -> list[str]:
    """The names of the columns."""
    others = [f"{what}_{i}" for i in range(2, top_k + 1) for what in ("label", "probability")]
    return ["path", "label", "probability", *others, "error", "p_value"]


def cells(row: PredictionRow, top_k: int) -> list[str | float | None]:
    """What belongs in the columns; the second class and those after it are there whatever the label is."""
    others = [cell for pair in row.top[1:] for cell in pair]
    empty = [None] * (2 * (top_k - 1) - len(others))
    return [row.path, row.label, row.probability, *others, *empty, row.error, row.p_value]


@contextlib.contextmanager
def writer(file: IO[bytes], top_k: int) -> Iterator[Callable[[PredictionRow], None]]:
    """Writes rows to a Parquet file, which is whole when the block ends. Raises `MissingExtra`."""
    arrow, parquet = import_pyarrow()
    names = columns(top_k)
    types = [arrow.float64() if name.startswith(("probability", "p_value")) else arrow.string() for name in names]
    schema = arrow.schema(list(zip(names, types, strict=True)))
    rows: list[dict[str, object]] = []
    with parquet.ParquetWriter(file, schema) as opened:

        def flush() -> None:
            opened.write_table(arrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(row: PredictionRow) -> None:
            rows.append({name: _utf8(cell) for name, cell in zip(names, cells(row, top_k), strict=True)})
            if len(rows) == _ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()


def import_pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`. Raises `MissingExtra`."""
    return tables.import_pyarrow("the format parquet")


def _utf8(cell: str | float | None) -> str | float | None:
    """Parquet's text is UTF-8: bytes of a file name that are not become visible escapes."""
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell
