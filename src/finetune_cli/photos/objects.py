"""Photos in a store: what is known of an object without reading it, and what one reading of it tells."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader, BytesIO
from typing import Protocol, TypeAlias

from finetune_cli import storage
from finetune_cli.cache.digests import DigestCache, Facts, Recorded
from finetune_cli.errors import BadImage
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos import codecs, decode
from finetune_cli.photos.listing import ListedPhoto
from finetune_cli.places import Address

# Facts of a photo, or the reason why it is bad; and the version of the object that was read, if its store tells.
Examined: TypeAlias = tuple[Facts | str, str | None]


class Look(Protocol):
    """Reads photos of a split for their facts, and does with their content what would need it a second time."""

    def __call__(self, split: str, photos: Sequence[ListedPhoto], split_is_made: bool) -> Iterator[Examined]:
        """What was found out of each photo, in order; `split_is_made`: training photos stay training photos."""
        ...


def unchanged(photo: ListedPhoto, recorded: Recorded) -> Facts | None:
    """What is recorded of an object, if it has not been written since. Raises `StorageError`."""
    try:
        version = photo.version or storage.status(photo.path).version
    except OSError:
        return None
    return recorded.facts if recorded.is_of(version) else None


def examine(
    photos: Sequence[ListedPhoto],
    cache: DigestCache,
    look: Callable[[Sequence[ListedPhoto]], Iterator[Examined]] | None,
) -> Iterator[Facts | str]:
    """Read each of the objects `photos` once, by `look` if there is one; what is found out goes into `cache`.

    `look` is for objects whose version a store tells: of others, the next command cannot know what was done with them,
    and would do it again. Yields the facts of each photo in order, or the reason why it is bad; raises `StorageError`.
    """
    remembered = [photo.version is not None or storage.tells_version(photo.path) for photo in photos]
    by_look = look(photos) if look is not None and all(remembered) and photos else None
    for photo, (facts, version) in zip(photos, by_look or _examined(photos), strict=True):
        of = version or photo.version
        if of is not None and isinstance(facts, Facts):
            cache.put_object(photo.path, of, facts)
        yield facts


def read(where: Address) -> tuple[bytes, str | None]:
    """The content of an object, and its version if the store tells. Raises `BadImage` if there is none."""
    try:
        return storage.read_version(where.text)
    except OSError as exc:
        raise codecs.unreadable(where, exc) from exc


def facts_of(file: BufferedReader | BytesIO) -> Facts:
    """Header and digest of a photo. Raises `BadImage`."""
    header = decode.read_header(file, sys.maxsize)
    file.seek(0)
    return Facts(hashlib.file_digest(file, "sha256").hexdigest(), header.width, header.height)


def _examined(photos: Sequence[ListedPhoto]) -> Iterator[Examined]:
    def work(photo: ListedPhoto) -> Examined:
        try:
            data, version = read(Address(photo.path))
            return facts_of(io.BytesIO(data)), version
        except BadImage as exc:
            return exc.reason, None

    return ordered_map(work, photos, storage.readers(cores()))
