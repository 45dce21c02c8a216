"""The photos that a folder or a table names, before any of them is opened."""

from collections.abc import Set
from dataclasses import dataclass, field

from finetune_cli.places import Place

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class ListedPhoto:
    """A photo that a folder or a table names; `name` is its posix path relative to the listing's root.

    Where the photo lies elsewhere than the root, in another store or bucket, its name is its whole address.

    `path` is text, because a `Path` takes several times the memory, and there may be a million of them. `version`: of
    an object in a store, if the listing tells it.
    """

    path: str
    name: str
    label: str
    group: str | None = None
    split: str | None = None
    version: str | None = None


@dataclass
class Listing:
    """The photos of `source`, a folder or a table; their names are relative to `root`.

    `classes` are those that it names, also the empty ones, sorted bytewise.
    """

    source: Place
    root: Place
    photos: list[ListedPhoto] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    is_table: bool = False
    notes: list[str] = field(default_factory=list)

    def only(self, splits: Set[str | None]) -> "Listing":
        """The photos that the table gives to `splits`; a listing of folders has none but `None`."""
        photos = [photo for photo in self.photos if photo.split in splits]
        classes = class_names(photos) if self.is_table else self.classes
        notes = list(self.notes) if None in splits else []
        return Listing(self.source, self.root, photos, classes, self.is_table, notes)


def byte_order(name: str) -> bytes:
    """The key that sorts names bytewise; bytes that are not UTF-8 count as they are."""
    return name.encode("utf-8", "surrogateescape")


def class_names(photos: list[ListedPhoto]) -> tuple[str, ...]:
    """The labels of `photos`, each once, in bytewise order."""
    return tuple(sorted({photo.label for photo in photos}, key=byte_order))
