"""Where something is: a `Path` in the file system, or an `Address` in a store.

Both know their name, join with ``/`` and can say whether they are a folder, so that code which finds and reads photos
does not ask which of the two it has. What is read comes through `read`.
"""

import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from finetune_cli import files, storage


@dataclass(frozen=True, slots=True)
class Address:
    """An object in a store, or what its objects have in common up to a slash: a folder.

    `text` is the whole address, as it was typed; a `Path` would make one slash of two.
    """

    text: str

    def __str__(self) -> str:
        """The address."""
        return self.text

    def __truediv__(self, name: str) -> "Address":
        """The address of `name` below this one."""
        return Address(storage.join(self.text, name)) if name not in ("", ".") else self

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Address":
        """The folder that it is in; of a bucket, the bucket."""
        protocol, rest = self._parts()
        return Address(f"{protocol}://{rest.rpartition('/')[0] or rest}")

    def is_dir(self) -> bool:
        """Whether there is an object below it. Raises `StorageError`."""
        return storage.is_folder(self.text)

    def is_file(self) -> bool:
        """Whether it is an object. Raises `StorageError`."""
        return storage.exists(self.text)

    def exists(self) -> bool:
        """Whether it is an object or a folder. Raises `StorageError`."""
        return self.is_file() or self.is_dir()

    def absolute(self) -> "Address":
        """The address itself."""
        return self

    def relative(self, other: str) -> str | None:
        """How the address `other` is named from here, such as ``../b/c.jpg``; None in another bucket or store."""
        protocol, rest = self._parts()
        if not storage.is_address(other):
            return None
        its_protocol, its_rest = Address(other)._parts()
        if (protocol, rest.partition("/")[0]) != (its_protocol, its_rest.partition("/")[0]):
            return None
        return posixpath.relpath(its_rest, rest)

    def below(self, name: str) -> "Address | None":
        """The address of the relative path `name`, in which ``..`` is the folder above; None outside of the bucket."""
        protocol, rest = self._parts()
        bucket = rest.partition("/")[0]
        whole = posixpath.normpath(f"{rest}/{name}")
        return Address(f"{protocol}://{whole}") if whole.startswith(f"{bucket}/") and bucket else None

    def _parts(self) -> tuple[str, str]:
        protocol, _, rest = self.text.partition("://")
        return protocol, rest.rstrip("/")


Place: TypeAlias = Path | Address


def place(text: str | os.PathLike[str] | Address) -> Place:
    """What `text` names. Raises `UsageError` for an address that cannot be used, see `storage.check`."""
    if isinstance(text, Address):
        return text
    if storage.is_address(text):
        storage.check(str(text))
        return Address(str(text))
    return Path(text)


def join(folder: Place, name: str) -> Place:
    """The place of `name`: an address, or a path that is relative to `folder` or absolute."""
    if storage.is_address(name):
        return place(name)
    return folder / name if isinstance(folder, Path) else folder.below(name) or folder / name


def read(where: Place) -> bytes:
    """The whole content. Raises `OSError` as `files.open_regular` does, and `StorageError` when a store fails."""
    return storage.read(where.text) if isinstance(where, Address) else files.read_regular(where)


def opened(where: Place) -> BufferedReader | BytesIO:
    """The content as a binary file, of an object the whole of it at once. Raises as `read` does."""
    return BytesIO(storage.read(where.text)) if isinstance(where, Address) else files.open_regular(where)


def stored(photos: Iterable[Place]) -> bool:
    """Whether `photos` are in a store, by the first of them."""
    return isinstance(next(iter(photos), None), Address)


def threads(workers: int, photos: Iterable[Place]) -> int:
    """How many threads read `photos` on `workers` cores: more of them where the photos are in a store."""
    return storage.readers(workers) if stored(photos) else workers
