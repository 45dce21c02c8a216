"""Tables of photos: a CSV or TSV file that names a photo and its label in each line."""

import csv
import functools
import io
import os
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import DataError
from finetune_cli.photos.listing import SPLITS, ListedPhoto, Listing, byte_order, class_names
from finetune_cli.text import address, shown

SUFFIXES = frozenset((".csv", ".tsv"))
_LINES_SHOWN = 20


def read(path: Path) -> Listing:
    """The photos of the table at `path`. Raises `DataError` that lists all wrong lines."""
    root = path.parent
    listing = Listing(path, root, is_table=True)
    problems: list[str] = []
    seen: set[tuple[str, str, str | None]] = set()
    repeated = 0
    real_folder = functools.cache(os.path.realpath)

    def real_name(photo: str) -> str:
        """The same for ``a.jpg`` and ``../x/a.jpg``; a link to a file is a photo of its own, as in a folder."""
        folder, name = os.path.split(photo)
        return os.path.join(real_folder(folder), name)  # noqa: PTH118 - text, as in `ListedPhoto`

    try:
        binary = files.open_regular(path)
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            # Strict: a quote that is never closed would make one label of all that follows.
            rows = csv.reader(file, delimiter=max("\t;,", key=header.count), strict=True)
            columns = _columns(path, next(csv.reader([header], delimiter=rows.dialect.delimiter), []))
            last = 1
            for row in rows:
                first, last = last + 1, rows.line_num + 1
                if not row:
                    continue
                photo = _photo_of(row, columns, root)
                if isinstance(photo, str):
                    problems.append(f"line {first}: {photo}" if first == last else f"lines {first} to {last}: {photo}")
                elif (key := (real_name(photo.path), photo.label, photo.split)) in seen:
                    repeated += 1
                else:
                    seen.add(key)
                    listing.photos.append(photo)
    except csv.Error as exc:
        start = f"{shown(path)}, from line {last + 1} on,"
        raise DataError(f"{start} is not a valid table: {shown(exc)}", "look for a quote that is not closed") from exc
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


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    names = [name.strip().lower() for name in header]
    columns = {name: i for i, name in enumerate(names)}
    if twice := {"image_path", "label", "split", "group"} & {name for name in names if names.count(name) > 1}:
        raise DataError(f"the first line of {shown(path)} names {min(twice)} twice", "rename one of the columns")
    if not {"image_path", "label"} <= columns.keys():
        raise DataError(
            f"the first line of {shown(path)} does not name the columns image_path and label; it reads: "
            f"{shown(', '.join(header))[:200]}",
            "write them as the first line: image_path,label (also known: split, group)",
        )
    return columns


def _photo_of(row: list[str], columns: dict[str, int], root: Path) -> ListedPhoto | str:
    """The photo of a line, or what is wrong with the line."""

    def cell(name: str) -> str:
        return row[columns[name]].strip() if columns.get(name, len(row)) < len(row) else ""

    typed, label, group, split = cell("image_path"), cell("label"), cell("group") or None, None
    if not typed or not label:
        return f"no {'label' if typed else 'image_path'}"
    if address(typed):
        return f"{shown(typed)} is an address, not a path"
    if "\0" in typed:
        return "image_path holds a NUL character"
    if any(line_break in label for line_break in "\r\n\0"):
        return "the label continues on the next line; is a quote not closed?"
    if "split" in columns:
        split = SPLITS.get(cell("split").lower())
        if split is None:
            found = f"{shown(cell('split'))!r}" if cell("split") else "empty"
            return f"split is {found}, not train, val or test"
    name = os.path.relpath(typed, root) if Path(typed).is_absolute() else os.path.normpath(typed)
    return ListedPhoto(str(root / typed), Path(name).as_posix(), label, group, split)
