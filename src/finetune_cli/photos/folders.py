"""Where photos lie and what they are called: folders per class, tables, and the walk through folders.

No photo is opened here. A folder or a table goes in, a `Listing` of (path, name, label) comes out, in bytewise order of
the names, with a count of all that was left out.
"""

import contextlib
import csv
import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import DataError
from finetune_cli.photos.decode import EXTENSIONS
from finetune_cli.text import address, counted, shown

TABLE_SUFFIXES = frozenset((".csv", ".tsv"))
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# What macOS and Synology leave in folders: copies and thumbnails that look like photos.
_NEVER_PHOTOS = frozenset(("__MACOSX", "@eaDir"))
_LINES_SHOWN = 20
_KINDS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Found:
    """A photo that a folder or a table names; `name` is its posix path relative to the listing's root.

    `path` is text, because a `Path` takes several times the memory, and there may be a million of them.
    """

    path: str
    name: str
    label: str
    group: str | None = None
    split: str | None = None


@dataclass
class Listing:
    """The photos of `source`, a folder or a table; their names are relative to `root`.

    `classes` are those that it names, also the empty ones, sorted bytewise.
    """

    source: Path
    root: Path
    photos: list[Found] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    is_table: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sources:
    """A folder or a table for each split; `notes` say which of them were found and not named."""

    train: Path
    val: Path | None
    test: Path | None
    notes: tuple[str, ...] = ()


def byte_order(name: str) -> bytes:
    """The key that sorts names bytewise; bytes that are not UTF-8 count as they are."""
    return name.encode("utf-8", "surrogateescape")


def find_sources(train: Path, val: Path | None, test: Path | None) -> Sources:
    """What ``data.train``, ``data.val`` and ``data.test`` stand for.

    `train` may name the folder above ``train/``; a folder ``val``, ``valid`` or ``validation`` and a folder ``test``
    beside ``train/`` count where `val` and `test` are `None`. Raises `DataError` when that is ambiguous.
    """
    if not train.is_dir():
        return Sources(train, val, test)
    inside = _named_splits(train)
    beside = _named_splits(train.absolute().parent) if train.absolute().name.lower() == "train" else {}
    notes = []
    if "train" in inside and _subfolders(inside["train"][0]):
        notes += _not_used(train, inside)
        train, beside = inside["train"][0], inside
    found: dict[str, Path | None] = {"val": val, "test": test}
    for split, words in (("val", "validation"), ("test", "test")):
        folders = beside.get(split, [])
        if found[split] is not None or not folders:
            continue
        if len(folders) > 1:
            raise DataError(
                f"{' and '.join(shown(f) for f in folders)} both look like the {words} photos",
                f"rename the one that does not count, or name the other in a config as data.{split}",
            )
        if not _subfolders(folders[0]):
            notes.append(f"{shown(folders[0])} has no class folders and is not used")
            continue
        found[split] = folders[0]
        notes.append(f"{words} photos: {shown(folders[0])}, found beside the training photos")
    return Sources(train, found["val"], found["test"], tuple(notes))


def read(source: Path) -> Listing:
    """The photos of a folder with a folder per class, or of a CSV or TSV file. Raises `DataError`."""
    if source.is_dir():
        return _read_folders(source)
    if source.suffix.lower() in TABLE_SUFFIXES and source.is_file():
        return _read_table(source)
    if typed := address(source):
        raise DataError(f"{shown(typed)} is an address, not a path", "download the photos, and name their folder")
    state = "is neither a folder nor a regular file named .csv or .tsv" if source.exists() else "does not exist"
    raise DataError(f"{shown(source)} {state}", "name the folder that holds one folder per class, or a table of photos")


def only(listing: Listing, splits: Set[str | None]) -> Listing:
    """The photos of `listing` that its table gives to `splits`; a listing of folders has none but `None`."""
    photos = [photo for photo in listing.photos if photo.split in splits]
    classes = _classes(photos) if listing.is_table else listing.classes
    notes = list(listing.notes) if None in splits else []
    return Listing(listing.source, listing.root, photos, classes, listing.is_table, notes)


def walk(folder: Path, ignored: Counter[str], failed: Callable[[Path, OSError], None]) -> Iterator[str]:
    """The names of all photos under `folder`, as posix paths relative to it, lazily and in bytewise order.

    Links to folders are followed, each folder once, so that loops end. What is left out is counted in `ignored`;
    folders that cannot be read go to `failed`.
    """
    seen: set[tuple[int, int]] = set()
    for above in {*folder.resolve().parents, *folder.absolute().parents}:  # a link up there would bring in everything
        with contextlib.suppress(OSError):
            seen.add(_identity(above))
    pending = [("", False)]
    while pending:
        name, is_photo = pending.pop()
        if is_photo:
            yield name
            continue
        place = folder / name
        try:
            identity = _identity(place)
            if identity in seen:
                ignored["links to folders that were seen already"] += 1
                continue
            seen.add(identity)
            entries = _entries(place, ignored)
        except OSError as exc:
            failed(place, exc)
            continue
        prefix = f"{name}/" if name else ""
        pending += [(prefix + entry, not is_folder) for entry, is_folder in reversed(entries)]


def describe_ignored(ignored: Counter[str], where: str) -> list[str]:
    """One note that says what was left out, or none."""
    if not ignored:
        return []
    kinds = sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0]))  # not in the order of the file system
    parts = [f"{count} {shown(what)}" for what, count in kinds[:_KINDS_SHOWN]]
    others = sum(count for _what, count in kinds[_KINDS_SHOWN:])
    return [f"ignored in {where}: {', '.join(parts + [f'{others} others'] * (others > 0))}"]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path, ignored: Counter[str]) -> list[tuple[str, bool]]:
    """(name, is a folder) of the photos and folders in `folder`, so that the whole paths come in bytewise order."""
    kept = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _NEVER_PHOTOS:
                ignored["hidden"] += 1
                continue
            try:
                is_folder = entry.is_dir()
                is_file = not is_folder and entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a Path for each entry takes ten times as long
            if is_folder or (is_file and suffix in EXTENSIONS):
                kept.append((entry.name, is_folder))
            elif is_file:
                ignored[f"{suffix} files" if suffix else "files without an extension"] += 1
            else:
                ignored["broken links" if entry.is_symlink() else "pipes, sockets or devices"] += 1
    # A folder's photos are compared by what follows its name: a slash.
    return sorted(kept, key=lambda pair: byte_order(pair[0] + "/" * pair[1]))


def _read_folders(root: Path) -> Listing:
    listing = Listing(root, root)
    ignored: Counter[str] = Counter()
    problems: list[str] = []
    loose = 0

    def failed(folder: Path, exc: OSError) -> None:
        problems.append(f"{shown(folder)} cannot be read: {exc.strerror}")

    try:
        entries = _entries(root, ignored)
    except OSError as exc:
        raise DataError(f"{shown(root)} cannot be read: {exc.strerror}", "name a folder that you can read") from exc
    for label, is_folder in entries:
        if not is_folder:
            loose += 1
            continue
        folder = root / label
        if (folder / "train").is_dir():
            listing.notes.append(f"{shown(folder)} counts as a class, but holds train/ as if it were a data set")
        for name in walk(folder, ignored, failed):
            listing.photos.append(Found(os.path.join(folder, name), f"{label}/{name}", label))  # noqa: PTH118 - text
    if problems:
        raise DataError(
            "\n  ".join([f"{counted(len(problems), 'folder')} cannot be read", *problems]), "grant yourself access"
        )
    listing.classes = tuple(sorted((label for label, is_folder in entries if is_folder), key=byte_order))
    if loose:
        ignored["photos outside of any class folder"] += loose
    listing.notes += describe_ignored(ignored, shown(root))
    return listing


def _named_splits(folder: Path) -> dict[str, list[Path]]:
    """The folders in `folder` that are named like a split, whatever their case."""
    found: dict[str, list[Path]] = {}
    for name in _subfolders(folder):
        if name.lower() in SPLITS:
            found.setdefault(SPLITS[name.lower()], []).append(folder / name)
    return found


def _subfolders(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name, is_folder in _entries(folder, Counter()) if is_folder]
    return []


def _not_used(folder: Path, splits: Mapping[str, list[Path]]) -> list[str]:
    """A note on folders beside ``train/`` that are no splits. Raises `DataError` if train/ may be a class like them."""
    others = [name for name in _subfolders(folder) if name.lower() not in SPLITS]
    if not others:
        return []
    listed = ", ".join(map(shown, others[:5])) + " ..." * (len(others) > 5)
    if len(splits) == 1:
        raise DataError(
            f"{shown(folder)} holds train/ and also {listed}: is train a class, or are these the training photos?",
            f"training photos: name {shown(folder / 'train')} instead; a class: give that folder another name",
        )
    return [f"not used, because they are beside {shown(folder / 'train')}: {listed}"]


def _read_table(path: Path) -> Listing:
    root = path.parent
    listing = Listing(path, root, is_table=True)
    problems: list[str] = []
    seen: set[tuple[str, str, str | None]] = set()
    repeated = 0
    real_folder = functools.cache(os.path.realpath)

    def real_name(photo: str) -> str:
        """The same for ``a.jpg`` and ``../x/a.jpg``; a link to a file is a photo of its own, as in a folder."""
        folder, name = os.path.split(photo)
        return os.path.join(real_folder(folder), name)  # noqa: PTH118 - text, as in `Found`

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
        place = f"{shown(path)}, from line {last + 1} on,"
        raise DataError(f"{place} is no table: {shown(exc)}", "look for a quote that is not closed") from exc
    except OSError as exc:
        raise DataError(f"{shown(path)} cannot be read: {exc.strerror}", "name a table that you can read") from exc
    if problems:
        more = [f"and {len(problems) - _LINES_SHOWN} more"] if len(problems) > _LINES_SHOWN else []
        lines = "\n  ".join(problems[:_LINES_SHOWN] + more)
        raise DataError(f"wrong lines in {shown(path)}: {len(problems)}\n  {lines}", "correct or delete these lines")
    listing.photos.sort(key=lambda photo: byte_order(photo.name))
    listing.classes = _classes(listing.photos)
    if repeated:
        listing.notes.append(f"{repeated} lines of {shown(path)} repeat an earlier one and are ignored")
    return listing


def _classes(photos: list[Found]) -> tuple[str, ...]:
    return tuple(sorted({photo.label for photo in photos}, key=byte_order))


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


def _photo_of(row: list[str], columns: dict[str, int], root: Path) -> Found | str:
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
        return "the label goes on in the next line; is a quote not closed?"
    if "split" in columns:
        split = SPLITS.get(cell("split").lower())
        if split is None:
            found = f"{shown(cell('split'))!r}" if cell("split") else "empty"
            return f"split is {found}, not train, val or test"
    name = os.path.relpath(typed, root) if Path(typed).is_absolute() else os.path.normpath(typed)
    return Found(str(root / typed), Path(name).as_posix(), label, group, split)
