"""Tables of photos: a CSV, TSV or Parquet file that names a photo and its label in each line."""

import contextlib
import csv
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_cli import places
from finetune_cli.errors import DataError, UsageError
from finetune_cli.photos.listing import SPLITS, ListedPhoto, Listing, byte_order, class_names
from finetune_cli.places import Address, Place
from finetune_cli.storage import is_address
from finetune_cli.tables import import_pyarrow
from finetune_cli.text import address, first_line, shown

SUFFIXES = frozenset((".csv", ".tsv", ".parquet"))
_COLUMNS = ("image_path", "label", "split", "group")
_LINES_SHOWN = 20
_ROWS_A_BATCH = 10_000
_Row = tuple[str, dict[str, str]]  # where it is, such as "line 3", and its cells by the names of `_COLUMNS`


def read(path: Place) -> Listing:
    """The photos of the table at `path`. Raises `DataError` that lists all wrong lines, and `MissingExtra`."""
    root = path.parent
    listing = Listing(path, root, is_table=True)
    problems: list[str] = []
    seen: set[tuple[str, str, str | None]] = set()
    repeated = 0
    real_folder = functools.cache(os.path.realpath)

    def real_name(photo: str) -> str:
        """The same for ``a.jpg`` and ``../x/a.jpg``; a link to a file is a photo of its own, as in a folder."""
        if is_address(photo):
            return photo
        folder, name = os.path.split(photo)
        return os.path.join(real_folder(folder), name)  # noqa: PTH118 - text, as in `ListedPhoto`

    try:
        for where, cells in _rows(path):
            photo = _photo_of(cells, root)
            if isinstance(photo, str):
                problems.append(f"{where}: {photo}")
            elif (key := (real_name(photo.path), photo.label, photo.split)) in seen:
                repeated += 1
            else:
                seen.add(key)
                listing.photos.append(photo)
    except OSError as exc:
        raise DataError(f"{shown(path)} cannot be read: {exc.strerror}", "name a table that you can read") from exc
    if problems:
        more = [f"and {len(problems) - _LINES_SHOWN} more"] if len(problems) > _LINES_SHOWN else []
        lines = "\n  ".join(problems[:_LINES_SHOWN] + more)
        raise DataError(f"invalid lines in {shown(path)}: {len(problems)}\n  {lines}", "correct or delete these lines")
    listing.photos.sort(key=lambda photo: byte_order(photo.name))
    listing.classes = class_names(listing.photos)
    if repeated:
        listing.notes.append(f"{repeated} lines of {shown(path)} repeat an earlier one and are ignored")
    return listing


def in_store(path: Place) -> bool:
    """Whether the first photo of a table is in a store; what is wrong with the table is for `read` to say."""
    with contextlib.suppress(OSError, DataError):
        for _where, cells in _rows(path):
            return is_address(cells["image_path"].strip())
    return False


def _rows(path: Place) -> Iterator[_Row]:
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _text_rows(path)


def _text_rows(path: Place) -> Iterator[_Row]:
    """The rows of a CSV or TSV file, with the numbers of their lines."""
    binary = places.opened(path)
    last = 0
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            # Strict: a quote that is never closed would make one label of all that follows.
            rows = csv.reader(file, delimiter=max("\t;,", key=header.count), strict=True)
            names = next(csv.reader([header], delimiter=rows.dialect.delimiter), [])
            columns = _positions(path, names, "the first line")
            last = 1
            for row in rows:
                first, last = last + 1, rows.line_num + 1
                if row:
                    cells = {name: row[i] if i < len(row) else "" for name, i in columns.items()}
                    yield (f"line {first}" if first == last else f"lines {first} to {last}"), cells
    except csv.Error as exc:
        start = f"{shown(path)}, from line {last + 1} on,"
        raise DataError(f"{start} is not a valid table: {shown(exc)}", "look for a quote that is not closed") from exc


def _parquet_rows(path: Place) -> Iterator[_Row]:
    """The rows of a Parquet file, of which some are in memory at a time; columns that are not needed are not read."""
    pa, parquet = import_pyarrow(f"tables in Parquet, such as {shown(path)}")
    with places.opened(path) as binary:
        try:
            table = parquet.ParquetFile(binary)
            header = table.schema_arrow.names
            columns = _positions(path, header, "the schema")
            number = 0
            for batch in table.iter_batches(_ROWS_A_BATCH, columns=[header[i] for i in columns.values()]):
                texts = [batch.column(header[i]).cast(pa.string()).to_pylist() for i in columns.values()]
                for cells in zip(*texts, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(columns, (cell or "" for cell in cells), strict=True))
        except (pa.ArrowException, ValueError) as exc:
            raise DataError(
                f"{shown(path)} cannot be read as Parquet: {shown(first_line(exc))}",
                "write the columns image_path, label, split and group as text",
            ) from exc


def _positions(path: Place, header: Sequence[str], where: str) -> dict[str, int]:
    """Where the columns are that count."""
    names = [name.strip().lower() for name in header]
    if twice := set(_COLUMNS) & {name for name in names if names.count(name) > 1}:
        raise DataError(f"{where} of {shown(path)} names {min(twice)} twice", "rename one of the columns")
    columns = {name: names.index(name) for name in _COLUMNS if name in names}
    if not {"image_path", "label"} <= columns.keys():
        raise DataError(
            f"{where} of {shown(path)} does not name the columns image_path and label; it reads: "
            f"{shown(', '.join(header))[:200]}",
            "write them there: image_path,label (also known: split, group)",
        )
    return columns


def _photo_of(cells: dict[str, str], root: Place) -> ListedPhoto | str:
    """The photo of a line, or what is wrong with the line."""

    def cell(name: str) -> str:
        return cells.get(name, "").strip()

    typed, label, group, split = cell("image_path"), cell("label"), cell("group") or None, None
    if not typed or not label:
        return f"no {'label' if typed else 'image_path'}"
    if "\0" in typed:
        return "image_path holds a NUL character"
    if any(line_break in label for line_break in "\r\n\0"):
        return "the label continues on the next line; is a quote not closed?"
    if "split" in cells:
        split = SPLITS.get(cell("split").lower())
        if split is None:
            found = f"{shown(cell('split'))!r}" if cell("split") else "empty"
            return f"split is {found}, not train, val or test"
    located = _located(typed, root)
    return located if isinstance(located, str) else ListedPhoto(*located, label, group, split)


def _located(typed: str, root: Place) -> tuple[str, str] | str:
    """The path and the name of what a line names, or what is wrong with it."""
    if is_address(typed):
        return _at_address(typed, root)
    if isinstance(root, Address):
        inside = None if typed.startswith(("/", "~")) else root.below(typed)
        if inside is None:
            return f"{shown(typed)} is outside of the bucket that the table is in"
        return inside.text, root.relative(inside.text) or inside.text
    if address(typed):
        return f"{shown(typed)} is an address, not a path"
    name = os.path.relpath(typed, root) if Path(typed).is_absolute() else os.path.normpath(typed)
    return str(root / typed), Path(name).as_posix()


def _at_address(typed: str, root: Place) -> tuple[str, str] | str:
    """As `_located`, of an address. A table in a store may be anybody's: it names no other kind of store."""
    try:
        there = places.place(typed)
    except UsageError as exc:
        return f"{exc.problem}; {exc.remedy}"
    if isinstance(root, Path):
        return typed, str(there)
    if typed.partition("://")[0].lower() != root.text.partition("://")[0].lower():
        return f"{shown(typed)} is in another kind of store than the table"
    return typed, root.relative(typed) or typed
