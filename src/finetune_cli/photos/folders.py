"""Finds photos: folders of train, val and test, a folder per class, and the walk through folders.

No photo is opened here. A folder or a table goes in, a `Listing` of (path, name, label) comes out, in bytewise order of
the names, with a count of everything that was left out.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_cli import storage
from finetune_cli.errors import DataError
from finetune_cli.photos import table
from finetune_cli.photos.decode import EXTENSIONS
from finetune_cli.photos.listing import SPLITS, ListedPhoto, Listing, byte_order
from finetune_cli.places import Address, Place
from finetune_cli.text import address, counted, shown

# What macOS and Synology leave in folders: copies and thumbnails that look like photos.
_NEVER_PHOTOS = frozenset(("__MACOSX", "@eaDir"))
_KINDS_SHOWN = 8


@dataclass(frozen=True)
class Sources:
    """A folder or a table for each split; `notes` report those that were found beside the training photos."""

    train: Place
    val: Place | None
    test: Place | None
    notes: tuple[str, ...] = ()


def find_sources(train: Place, val: Place | None, test: Place | None) -> Sources:
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
    found: dict[str, Place | None] = {"val": val, "test": test}
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


def read(source: Place) -> Listing:
    """The photos of a folder with a folder per class, or of a table. Raises `DataError`, and `StorageError`."""
    if source.is_dir():
        return _read_folders(source) if isinstance(source, Path) else _read_objects(source)
    if source.suffix.lower() in table.SUFFIXES and source.is_file():
        return table.read(source)
    if isinstance(source, Path) and (typed := address(source)):
        raise DataError(f"{shown(typed)} is an address, not a path", "download the photos, and name their folder")
    is_other = "is neither a folder nor a regular file named .csv, .tsv or .parquet"
    state = is_other if source.exists() else "does not exist"
    raise DataError(f"{shown(source)} {state}", "name the folder that holds one folder per class, or a table of photos")


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
        subfolder = folder / name
        try:
            identity = _identity(subfolder)
            if identity in seen:
                ignored["links to folders that were already seen"] += 1
                continue
            seen.add(identity)
            entries = _entries(subfolder, ignored)
        except OSError as exc:
            failed(subfolder, exc)
            continue
        prefix = f"{name}/" if name else ""
        pending += [(prefix + entry, not is_folder) for entry, is_folder in reversed(entries)]


def objects(folder: Address, ignored: Counter[str]) -> Iterator[storage.Stored]:
    """As `walk`, of all objects below an address; names that end with a slash are those of empty folders.

    Names that could not be those of files, such as ``a/../b.jpg``, are left out, too. Raises `StorageError`.
    """
    for entry in storage.entries(folder.text, deep=True):
        *folders, name = entry.name.split("/")
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - as in `_entries`
        if {"", ".", ".."} & {*folders, name or "folder"}:
            ignored["objects with . or .. or nothing between slashes"] += 1
        elif any(part.startswith(".") or part in _NEVER_PHOTOS for part in (*folders, name)):
            ignored["hidden"] += 1
        elif not name or suffix in EXTENSIONS:
            yield entry
        else:
            ignored[f"{suffix} files" if suffix else "files without an extension"] += 1


def describe_ignored(ignored: Counter[str], where: str) -> list[str]:
    """One note that says what was left out, or no note if nothing was."""
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
    found = []
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
                found.append((entry.name, is_folder))
            elif is_file:
                ignored[f"{suffix} files" if suffix else "files without an extension"] += 1
            else:
                ignored["broken links" if entry.is_symlink() else "pipes, sockets or devices"] += 1
    # A folder's photos are compared by what follows its name: a slash.
    return sorted(found, key=lambda pair: byte_order(pair[0] + "/" * pair[1]))


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
            listing.photos.append(ListedPhoto(os.path.join(folder, name), f"{label}/{name}", label))  # noqa: PTH118 - text
    if problems:
        raise DataError(
            "\n  ".join([f"{counted(len(problems), 'folder')} cannot be read", *problems]), "grant yourself access"
        )
    listing.classes = tuple(sorted((label for label, is_folder in entries if is_folder), key=byte_order))
    if loose:
        ignored["photos outside of any class folder"] += loose
    listing.notes += describe_ignored(ignored, shown(root))
    return listing


def _read_objects(root: Address) -> Listing:
    """As `_read_folders`, of a folder in a store."""
    listing = Listing(root, root)
    ignored: Counter[str] = Counter()
    labels: set[str] = set()
    for entry in objects(root, ignored):
        label, slash, rest = entry.name.partition("/")
        if not slash:
            ignored["photos outside of any class folder"] += 1
            continue
        labels.add(label)
        if not rest.endswith("/") and rest:
            path = storage.join(root.text, entry.name)
            listing.photos.append(ListedPhoto(path, entry.name, label, version=entry.version))
    listing.classes = tuple(sorted(labels, key=byte_order))
    listing.notes += describe_ignored(ignored, shown(root))
    return listing


def _named_splits(folder: Place) -> dict[str, list[Place]]:
    """The folders in `folder` that are named like a split, whatever their case."""
    found: dict[str, list[Place]] = {}
    for name in _subfolders(folder):
        if name.lower() in SPLITS:
            found.setdefault(SPLITS[name.lower()], []).append(folder / name)
    return found


def _subfolders(folder: Place) -> list[str]:
    if isinstance(folder, Address):
        names = (entry.name for entry in storage.entries(folder.text))
        return [name[:-1] for name in names if name.endswith("/") and not name.startswith(".")]
    with contextlib.suppress(OSError):
        return [name for name, is_folder in _entries(folder, Counter()) if is_folder]
    return []


def _not_used(folder: Place, splits: Mapping[str, list[Place]]) -> list[str]:
    """A note on folders beside ``train/`` that are not splits. Raises `DataError` if train/ may be a class too."""
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
