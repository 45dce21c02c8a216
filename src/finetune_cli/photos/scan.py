"""Each photo's header and digest, before anything is built: names in, samples and bad photos out.

Nothing is decoded here: damage that only decoding shows is reported by the feature pass, through the same `refuse_bad`.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files, places
from finetune_cli.cache.digests import DigestCache, Facts, Recorded
from finetune_cli.errors import BadImage, BadPhotos, ChangedPhoto, DataError
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos import codecs, decode, objects
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.listing import ListedPhoto, Listing
from finetune_cli.places import Place, place
from finetune_cli.progress import Advance
from finetune_cli.storage import is_address
from finetune_cli.text import counted, shown

_MOST_BAD = 0.1
_SHOWN = 20
# Photos that a thread takes at once: few enough to share the work out, many enough for one look into the cache.
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """A good photo. `name` is its posix path below its root, `digest` the SHA-256 of its bytes in hexadecimal.

    fold: in which it is held out when the training photos are cross-validated, from 1; None for one that never is.
    """

    path: Place
    name: str
    label: int
    digest: str
    group: str | None = None
    fold: int | None = None


@dataclass(frozen=True, slots=True)
class BadPhoto:
    """A photo that cannot be used, and why, in one line."""

    path: Place
    name: str
    reason: str


def may_skip(bad: Sequence[BadPhoto], total: int, on_bad: str) -> bool:
    """Whether `bad` photos out of `total` may be left out; `on_bad`: ``error`` allows none, ``skip`` up to a tenth."""
    return not bad or (on_bad == "skip" and len(bad) <= _MOST_BAD * total)


def refuse_bad(bad: Sequence[BadPhoto], total: int, on_bad: str) -> None:
    """Raise `DataError` that lists the first `bad` photos out of `total`, unless `may_skip` lets them be left out.

    It is a `BadPhotos` where ``skip`` would let them.
    """
    if may_skip(bad, total, on_bad):
        return
    problem = f"{len(bad)} of {counted(total, 'photo')} cannot be used"
    if may_skip(bad, total, "skip"):
        raise BadPhotos(problem + listed(bad), "repair or remove them, or leave them out: data.on_bad_image=skip")
    raise DataError(
        f"{problem}, which is more than the {_MOST_BAD:.0%} that could be skipped{listed(bad)}",
        "repair or remove them; so many may mean that the wrong folder was named",
    )


def listed(bad: Sequence[BadPhoto]) -> str:
    """A line for each of the first photos, with its reason, and how many more there are; each after a line break."""
    lines = "".join(f"\n  {shown(photo.path)}: {shown(photo.reason)}" for photo in bad[:_SHOWN])
    return lines + (f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")


def _no_group(_name: str) -> None:
    return None


@dataclass(frozen=True)
class Rules:
    """How a listed photo becomes a sample: its label is the position of its class in `classes`.

    `max_pixels`: a photo with more is bad. `group`: gives the group of a name that has none from its table.
    """

    classes: Sequence[str]
    max_pixels: int
    group: Callable[[str], str | None] = _no_group


def preflight(
    listings: Mapping[str, Listing],
    rules: Rules,
    cache: DigestCache,
    advance: Advance,
    look: objects.Look | None = None,
) -> tuple[dict[str, list[Sample]], list[BadPhoto]]:
    """The samples of each listing, and all bad photos.

    Header and digest of a photo come from `cache`, or are read in a few threads; of objects whose version a store
    tells, by `look`. `advance` counts photos and learns their total.
    """
    labels, max_pixels = {name: i for i, name in enumerate(rules.classes)}, rules.max_pixels
    total = sum(len(listing.photos) for listing in listings.values())
    bad: list[BadPhoto] = []
    parts: dict[str, list[Sample]] = {}
    for name, listing in listings.items():
        samples = parts[name] = []
        known = _facts(listing.photos, cache, lambda count: advance(count, total))
        unknown = [i for i, facts in enumerate(known) if facts is None]
        wanted = None if look is None else functools.partial(look, name, split_is_made="val" in listings)
        read = objects.examine([listing.photos[i] for i in unknown], cache, wanted)
        for i, found in zip(unknown, read, strict=True):
            known[i] = found
            advance(1, total)
        for photo, facts in zip(listing.photos, known, strict=True):
            if not isinstance(facts, Facts):
                bad.append(BadPhoto(place(photo.path), photo.name, facts or ""))
            elif facts.width * facts.height > max_pixels:
                reason = codecs.too_large(facts.width, facts.height, max_pixels)
                bad.append(BadPhoto(place(photo.path), photo.name, reason))
            else:
                own_group = photo.group or rules.group(photo.name) or None
                samples.append(Sample(place(photo.path), photo.name, labels[photo.label], facts.digest, own_group))
    return parts, bad


def examine(path: Path) -> Facts:
    """Open the file at `path` once for its header and digest. Raises `BadImage` if it is not a readable image."""
    try:
        with files.open_regular(path) as file:
            return objects.facts_of(file)
    except BadImage as exc:
        raise BadImage(path, exc.reason) from exc
    except (OSError, codecs.Refused) as exc:
        raise codecs.unreadable(path, exc) from exc


def decode_sample(sample: Sample, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pixels of `sample`, whose bytes must still be those that were indexed.

    Raises `BadImage` when it cannot be decoded, `ChangedPhoto` when the file changed since: its feature would be filed
    under another photo's digest.
    """
    return decode_bytes(sample, read_sample(sample), settings)


def decode_bytes(sample: Sample, data: bytes, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pixels of `sample`, of which `data` was read. Raises `BadImage`."""
    try:
        return decode.decode(data, settings)
    except BadImage as exc:
        raise BadImage(sample.path, exc.reason) from exc


def read_sample(sample: Sample) -> bytes:
    """The bytes of `sample`. Raises `BadImage` when it cannot be read, `ChangedPhoto` when it was not indexed so."""
    try:
        data = places.read(sample.path)
    except OSError as exc:
        raise codecs.unreadable(sample.path, exc) from exc
    if hashlib.sha256(data).hexdigest() != sample.digest:
        raise ChangedPhoto(sample.path)
    return data


def _facts(
    photos: Sequence[ListedPhoto], cache: DigestCache, advance: Callable[[int], None]
) -> list[Facts | str | None]:
    """The facts of each photo, or the reason why it is bad; None for an object that has to be read."""
    chunks = [photos[start : start + _CHUNK] for start in range(0, len(photos), _CHUNK)]
    found: list[Facts | str | None] = []
    for known, answers in ordered_map(_read_unknown, (_look_up(chunk, cache) for chunk in chunks), cores()):
        for (photo, status, cached), facts in zip(known, answers, strict=True):
            if cached is None and isinstance(status, os.stat_result) and isinstance(facts, Facts):
                cache.put(Path(photo.path), status, facts)
            found.append(facts)
            if facts is not None:
                advance(1)
    return found


# A photo with the status of its file, if there is one, or what is recorded of its object; and the facts that are sure.
_Known = list[tuple[ListedPhoto, os.stat_result | Recorded | None, Facts | None]]


def _look_up(chunk: Sequence[ListedPhoto], cache: DigestCache) -> _Known:
    """Each photo with what is known of it without reading it."""
    statuses: list[os.stat_result | Recorded | None] = []
    recorded = iter(cache.objects([photo.path for photo in chunk if is_address(photo.path)]))
    for photo in chunk:
        try:
            statuses.append(next(recorded) if is_address(photo.path) else os.stat(photo.path))  # noqa: PTH116 - a Path would only be thrown away
        except (OSError, ValueError):
            statuses.append(None)
    both = list(zip(chunk, statuses, strict=True))
    present = [(Path(photo.path), status) for photo, status in both if isinstance(status, os.stat_result)]
    known = iter(cache.get(present))
    return [(photo, status, next(known) if isinstance(status, os.stat_result) else None) for photo, status in both]


def _read_unknown(known: _Known) -> tuple[_Known, list[Facts | str | None]]:
    answers: list[Facts | str | None] = []
    for photo, status, facts in known:
        if is_address(photo.path):
            answers.append(objects.unchanged(photo, status) if isinstance(status, Recorded) else None)
            continue
        try:
            answers.append(facts or examine(Path(photo.path)))
        except BadImage as exc:
            answers.append(exc.reason)
    return known, answers
