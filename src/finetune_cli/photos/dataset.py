"""Folders or tables in, a `Dataset` out: classes, and for each split its samples with label and content digest.

    sources -> listings (names only) -> preflight (header and digest of each file) -> checks -> split

Nothing is decoded and nothing is written. All problems are collected and reported together.
"""

import difflib
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_cli.cache.digests import DigestCache
from finetune_cli.errors import DataError
from finetune_cli.photos import fixes, folders, objects, split, table
from finetune_cli.photos.decode import EXTENSIONS
from finetune_cli.photos.groups import Proposal, propose
from finetune_cli.photos.listing import SPLITS, Listing, byte_order
from finetune_cli.photos.scan import BadPhoto, Rules, Sample, listed, preflight
from finetune_cli.places import Address, Place
from finetune_cli.progress import Advance
from finetune_cli.text import counted, shown

_SHOWN = 20


@dataclass(frozen=True)
class Dataset:
    """All photos of a configuration; ``classes[sample.label]`` is a sample's class.

    `roots` maps each split that has photos to the folder that their names are relative to. `notes` and `warnings` are
    for the user; warnings report what makes the numbers look better than they are. `proposal`: likely groups, if none
    were given. `val_split`: the share of the training photos that validates, `None` if the user chose these photos,
    or if all validate in folds. `fixes`: the table that was applied, as it was read.
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    roots: dict[str, Place]
    proposal: Proposal | None = None
    val_split: float | None = None
    fixes: bytes | None = None

    @property
    def splits(self) -> dict[str, tuple[Sample, ...]]:
        """The good photos of train, val and, if there are any, test."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: samples for name, samples in parts.items() if samples}

    @property
    def photos(self) -> int:
        """How many photos there are, good and bad."""
        return sum(map(len, self.splits.values())) + len(self.bad)


@dataclass(frozen=True)
class DataSettings:
    """Where the photos are and how they are split.

    Validation photos come from `val`, else from the table's column `split`, else from a folder beside the training
    photos, else from a share `val_split` of the training photos. With `folds` there are none: every training photo
    validates in one of so many folds. `group_regex`: finds the group in a photo's name. `max_pixels`: photos with more
    are bad. `trained_on`: digests of photos that must not validate, because `model.start_from` was trained on them.
    `fixes`: a table that `photos/fixes.py` reads and applies.
    """

    train: Place
    val: Place | None = None
    test: Place | None = None
    val_split: float | None = None
    group_regex: str | None = None
    max_pixels: int = 100_000_000
    trained_on: frozenset[str] = frozenset()
    fixes: Path | None = None
    folds: int | None = None


@dataclass(frozen=True)
class Labelled:
    """Photos to evaluate on, labelled by the classes of a run."""

    samples: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...]
    notes: tuple[str, ...]
    root: Place


def load(
    settings: DataSettings,
    cache: DigestCache,
    advance: Advance,
    contradictions: bool = False,
    look: objects.Look | None = None,
) -> Dataset:
    """Find, check and split the photos of a configuration; `advance` counts photos and learns their total.

    `look` reads those that are in a store.

    Bad photos are listed, not refused. Raises `DataError` that lists what is wrong: missing, unknown or empty classes,
    a photo under two labels (unless `contradictions` are allowed), and a split without a good photo.
    """
    sources = folders.find_sources(settings.train, settings.val, settings.test)
    listings = _listings(sources)
    classes = listings["train"].classes
    _check_classes(listings)
    _check_folds(settings.folds, listings)
    rules = Rules(classes, settings.max_pixels, grouping(settings.group_regex))
    parts, bad = preflight(listings, rules, cache, advance, look)
    notes = [*sources.notes, *(note for listing in listings.values() for note in listing.notes)]
    roots = {name: listing.root for name, listing in listings.items()}
    fixed_by = None
    if settings.fixes is not None:
        fixed_by, wanted = fixes.read(settings.fixes)
        parts, done = fixes.apply(wanted, parts, roots.values(), classes)
        notes += done
    if not contradictions:
        _raise(_contradictions(parts, classes), "give each photo one label, perhaps by finetune doctor and data.fixes")
    for name, samples in parts.items():
        if not samples:
            raise DataError(f"no photo for {name} can be used{listed(bad)}", "repair or replace them")
    if settings.group_regex is not None:
        notes += _ungrouped(parts["train"], settings.group_regex)
    val_is_given = "val" in parts
    if settings.folds is not None:
        parts["train"] = into_folds(parts["train"], settings.folds)
        notes += _never_held_out(parts["train"], classes)
    elif not val_is_given:
        if settings.val_split is None:
            raise DataError("there are no validation photos", "set data.val, or data.val_split: 0.2")
        parts["train"], parts["val"] = _split_off_validation(parts["train"], settings.val_split, settings.trained_on)
        roots["val"] = roots["train"]
    notes += _copies(parts["train"], "training photo") + _lonely(parts, classes)
    proposal = None
    if all(sample.group is None for samples in parts.values() for sample in samples):
        proposal = propose(
            {name: [(sample.name, classes[sample.label]) for sample in samples] for name, samples in parts.items()},
            [sample.fold for sample in parts["train"]],
        )
    warnings = [*_overlaps(parts), *_alike(classes), *_shared_groups(proposal, val_is_given)]
    ready = {name: tuple(parts.get(name, ())) for name in ("train", "val", "test")}
    roots = {name: root for name, root in roots.items() if ready[name]}
    return Dataset(
        classes=classes,
        train=ready["train"],
        val=ready["val"],
        test=ready["test"],
        bad=tuple(bad),
        notes=tuple(notes),
        warnings=tuple(warnings),
        roots=roots,
        proposal=proposal,
        val_split=None if val_is_given or settings.folds is not None else settings.val_split,
        fixes=fixed_by,
    )


def in_store(settings: DataSettings) -> bool:
    """Whether training photos are in a store: of a table, the first one decides."""
    source = settings.train
    return isinstance(source, Address) or (source.suffix.lower() in table.SUFFIXES and table.in_store(source))


def split_again(data: Dataset, together: Iterable[Collection[str]], trained_on: Set[str]) -> Dataset:
    """`data` with photos that stay together, given by their digests, each as one group; copies stay together anyway.

    Where the validation photos were not chosen by the user, they are chosen again. Raises `DataError` if no photo is
    left to validate with.
    """
    parts = {name: list(samples) for name, samples in data.splits.items()}
    everything = [sample for samples in parts.values() for sample in samples]
    groups = split.merged([(sample.digest, sample.group) for sample in everything], together)
    of_photo = {sample.digest: group for sample, group in zip(everything, groups, strict=True)}
    parts = {
        name: [replace(sample, group=of_photo[sample.digest]) for sample in samples] for name, samples in parts.items()
    }
    if data.val_split is not None:
        pool = [*parts["train"], *parts["val"]]
        parts["train"], parts["val"] = _split_off_validation(pool, data.val_split, trained_on)
    return _with_splits(data, parts)


def without(data: Dataset, bad: Sequence[BadPhoto]) -> Dataset:
    """`data` after `bad` photos, which were thought to be good, turned out to be unusable."""
    paths = {photo.path for photo in bad}
    good = {name: [s for s in samples if s.path not in paths] for name, samples in data.splits.items()}
    return _with_splits(replace(data, bad=(*data.bad, *bad)), good)


def split_as_recorded(data: Dataset, recorded: Mapping[tuple[str, str], tuple[str, str | None]]) -> Dataset:
    """`data` with the split and the group that each photo had before, by its (digest, name).

    Only where the user did not choose the validation photos. Photos that are not in `recorded` stay where they are.
    """
    parts: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for name, samples in data.splits.items():
        for sample in samples:
            before, group = recorded.get((sample.digest, sample.name), (name, sample.group))
            side = before if data.val_split is not None and "test" not in (name, before) else name
            parts[side].append(replace(sample, group=group))
    if data.val_split is not None:
        parts = {name: _in_order(samples) for name, samples in parts.items()}
    return _with_splits(data, parts)


def load_labelled(
    path: Place, classes: Sequence[str], max_pixels: int, cache: DigestCache, advance: Advance
) -> Labelled:
    """The photos of a folder per class, or of a table, labelled by position in `classes`.

    Some classes may be absent; of a table with a column `split`, the rows for `test` count. Raises `DataError` for a
    class that is not in `classes`, a photo under two labels, or no photos at all.
    """
    listing = folders.read(path)
    if any(photo.split for photo in listing.photos):
        listing = listing.only({"test"})
        listing.notes.append(f"of {shown(path)}, the lines for the split test count")
    problems = _unknown(listing, classes, "the run")
    if not listing.photos and not problems:
        problems = [f"{shown(path)} holds no photos to evaluate on"]
    remedy = "name the folder that holds one folder per class of the run, with photos in them"
    if splits := [name for name in listing.classes if name.lower() in SPLITS and name not in classes]:
        remedy = f"these are splits; name one of them, such as {path / splits[0]}"
    _raise(problems, remedy)
    parts, bad = preflight({"test": listing}, Rules(classes, max_pixels), cache, advance)
    _raise(_contradictions(parts, classes), "give each photo one label")
    samples = tuple(parts["test"])
    return Labelled(samples, tuple(bad), (*listing.notes, *_copies(samples, "photo")), listing.root)


def iter_photos(paths: Iterable[Place], ignored: Counter[str] | None = None) -> Iterator[Place]:
    """Files as they are, whatever they are; of folders all photos, lazily, in bytewise order.

    An address with the suffix of a photo is an object, any other the folder of objects below it.

    What is left out of folders is counted in `ignored`, by kind. A folder that cannot be read comes as itself, so that
    whoever tries to decode it gives the reason.
    """
    ignored = Counter() if ignored is None else ignored
    for path in paths:
        if isinstance(path, Address):
            yield from _iter_objects(path, ignored)
            continue
        if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            yield path
            continue
        unreadable: dict[Path, OSError] = {}
        for name in folders.walk(path, ignored, unreadable.__setitem__):
            yield path / name
        yield from unreadable


def _iter_objects(where: Address, ignored: Counter[str]) -> Iterator[Address]:
    if where.suffix.lower() in EXTENSIONS and not where.text.endswith("/"):
        yield where
        return
    own: Counter[str] = Counter()
    names = (entry.name for entry in folders.objects(where, own) if not entry.name.endswith("/"))
    first = next(names, None)
    if first is not None:
        yield where / first
        yield from (where / name for name in names)
    elif not own:
        yield where  # whoever tries to read it gives the reason
    ignored.update(own)


def _listings(sources: folders.Sources) -> dict[str, Listing]:
    """A listing for each split that there is a source for."""
    whole = folders.read(sources.train)
    listings = {"train": whole.only({None, "train"})}
    listings |= {name: whole.only({name}) for name in ("val", "test")}
    for name, source in (("val", sources.val), ("test", sources.test)):
        if source is not None:
            if listings[name].photos:
                note = f"the lines of {shown(sources.train)} for {name} are not used, because data.{name} is set"
                listings["train"].notes.append(note)
            listing = folders.read(source)
            marked = any(photo.split == name for photo in listing.photos)
            listings[name] = listing.only({name}) if marked else listing
        elif not listings[name].photos:
            del listings[name]
    return listings


def _split_off_validation(
    samples: Sequence[Sample], val_split: float, trained_on: Set[str]
) -> tuple[list[Sample], list[Sample]]:
    samples = _in_order(samples)
    chosen = split.choose([(sample.label, sample.digest, sample.group) for sample in samples], val_split, trained_on)
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample, is_val in zip(samples, chosen, strict=True):
        sides[is_val].append(sample)
    if not sides[True] and trained_on:
        raise DataError(
            "no photo can be used for validation: the run of model.start_from was trained on all of them, or on photos "
            "of the same groups",
            "add photos that it has not seen, or set data.val",
        )
    if not sides[True]:
        raise DataError(
            "no photo can be used for validation: each class has only one photo, or one group of them",
            "add photos, set data.val, or choose a data.group_regex that makes more groups",
        )
    return sides


def _with_splits(data: Dataset, parts: Mapping[str, Sequence[Sample]]) -> Dataset:
    train, val, test = (tuple(parts.get(name, ())) for name in ("train", "val", "test"))
    return replace(data, train=train, val=val, test=test)


def _in_order(samples: Sequence[Sample]) -> list[Sample]:
    """By class and name, so that the order, which a resumed training must find again, is that of no history."""
    return sorted(samples, key=lambda sample: (sample.label, byte_order(sample.name)))


def into_folds(samples: Sequence[Sample], folds: int) -> list[Sample]:
    """The `samples` with their folds, see `split.into_folds`.

    Raises `DataError` when there are too few photos or groups for so many folds.
    """
    found = split.into_folds([(sample.label, sample.digest, sample.group) for sample in samples], folds)
    filled = len(set(found) - {None})
    if filled < folds:
        raise DataError(
            f"data.folds is {folds}, but the photos, with copies and groups kept together, fill only {filled or 'no'} "
            f"fold{'s' * (filled != 1)}",
            f"set data.folds to {filled}, or add photos" if filled > 1 else "add photos, or set data.val",
        )
    return [replace(sample, fold=fold) for sample, fold in zip(samples, found, strict=True)]


def _never_held_out(samples: Sequence[Sample], classes: Sequence[str]) -> list[str]:
    """A note on the photos that no fold holds out, and on their classes."""
    labels = [sample.label for sample in samples if sample.fold is None]
    if not labels:
        return []
    names = _enumerated([name for i, name in enumerate(classes) if i in labels])
    many = counted(len(labels), "photo")
    return [f"not cross-validated, only trained on: {many} of {names}, because a class needs photos in two folds"]


def _check_classes(listings: Mapping[str, Listing]) -> None:
    """Check the names: too few classes, empty classes, and classes that only one split has."""
    train = listings["train"]
    filled = {photo.label for photo in train.photos}
    problems = []
    if len(train.classes) < 2:
        found = f"only the class {shown(train.classes[0])}" if train.classes else "no class"
        problems.append(f"{shown(train.source)} has {found} to train on; at least 2 are needed")
    problems += [f"class {shown(name)} has no photos: {shown(train.root / name)}" for name in train.classes
                 if name not in filled]  # fmt: skip
    remedy = "give the classes the same names in every split (an empty folder means: no photos of it)"
    if problems:
        remedy = "give a table with photos of at least 2 labels for train"
        if not train.is_table:
            remedy = "name the folder that holds a folder for each of at least 2 classes, with photos in all of them"
    for name, listing in listings.items():
        if name == "train":
            continue
        problems += _unknown(listing, train.classes, "the training photos")
        missing = [c for c in train.classes if c not in listing.classes]
        if missing and not listing.is_table:
            problems.append(f"{shown(listing.source)} lacks folders for: {_enumerated(missing)}")
        if not listing.photos:
            problems.append(f"{shown(listing.source)} has no photos for {name}")
    notes = [note for listing in listings.values() for note in listing.notes]
    _raise(problems, remedy, notes)


def _check_folds(folds: int | None, listings: Mapping[str, Listing]) -> None:
    """Raise `DataError` for validation photos beside folds, in which the training photos validate."""
    if folds is not None and "val" in listings:
        raise DataError(
            f"data.folds is {folds}, but there are validation photos: {shown(listings['val'].source)}",
            "leave out data.folds to validate with these; or move them to the training photos, to validate with all",
        )


def _unknown(listing: Listing, classes: Sequence[str], who: str) -> list[str]:
    known, lower = set(classes), {_folded(name): name for name in classes}
    unknown = [name for name in listing.classes if name not in known]
    if not unknown:
        return []
    close = (difflib.get_close_matches(_folded(name), lower, n=1) for name in unknown[:_SHOWN])
    meant = _enumerated(list(dict.fromkeys(lower[names[0]] for names in close if names)))
    hint = f"; close to them: {meant}" if meant else ""
    return [f"{shown(listing.source)} has classes unknown to {who}: {_enumerated(unknown)}{hint}"]


def _enumerated(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more


def grouping(group_regex: str | None) -> Callable[[str], str | None]:
    """A photo's name -> its group: the first capture group of `group_regex`, or all that it matched."""
    if group_regex is None:
        return lambda _name: None
    try:
        pattern = re.compile(group_regex)
    except re.error as exc:
        raise DataError(
            f"data.group_regex {group_regex!r} is not a valid regular expression: {exc}",
            "see docs.python.org/3/library/re.html",
        ) from exc

    def group(name: str) -> str | None:
        match = pattern.search(name)
        return match[1 if pattern.groups else 0] if match is not None else None

    return group


def refuse_empty(classes: Sequence[str], parts: Mapping[str, Sequence[Sample]], bad: Sequence[BadPhoto]) -> None:
    """Raise `DataError` when the `bad` photos left a class without a training photo, or a split without any."""
    filled = {sample.label for sample in parts["train"]}
    problems = [f"no good photo of class {shown(name)} is left" for i, name in enumerate(classes) if i not in filled]
    problems += [f"no good photo for {name} is left" for name, samples in parts.items() if not samples]
    if problems:
        raise DataError("\n".join(problems) + listed(bad), "repair or replace the photos that cannot be used")


def _contradictions(parts: Mapping[str, Sequence[Sample]], classes: Sequence[str]) -> list[str]:
    first: dict[str, Sample] = {}
    problems = []
    for sample in (sample for samples in parts.values() for sample in samples):
        other = first.setdefault(sample.digest, sample)
        if other.label != sample.label:
            as_first = f" as {shown(other.path)}" if other.path != sample.path else ""
            problems.append(
                f"the same photo is {shown(classes[other.label])}{as_first} "
                f"and {shown(classes[sample.label])} as {shown(sample.path)}"
            )
    return problems


def _copies(samples: Sequence[Sample], noun: str) -> list[str]:
    copies = len(samples) - len({sample.digest for sample in samples})
    if copies == 1:
        return [f"1 {noun} is an exact copy of another"]
    return [f"{copies} {noun}s are exact copies of others"] if copies else []


def _alike(classes: Sequence[str]) -> list[str]:
    """Warnings of classes whose names differ in case, blanks or Unicode form only: most likely one class."""
    first: dict[str, str] = {}
    found = []
    for name in classes:
        other = first.setdefault(_folded(name), name)
        if other != name:
            how = "have almost the same name"
            if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name):
                how = "have the same name, but for its Unicode form (composed or decomposed accents)"
            found.append(f"the classes {shown(other)} and {shown(name)} {how}: are they one class?")
    return found


def _folded(name: str) -> str:
    """`name` without what makes no difference to a reader: case, blanks around it, and Unicode form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", name).casefold()).strip()


def _overlaps(parts: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Warnings of photos and groups that are in two splits."""
    found = []
    digests = {name: {sample.digest for sample in samples} for name, samples in parts.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sum(sample.digest in digests.get(a, ()) for sample in parts.get(b, ()))
        if shared:
            both = counted(shared, "photo")
            found.append(f"{both} of {b} also in {a}: the accuracy on {b} will look better than it is")
        groups = {sample.group for sample in parts.get(a, ())} & {sample.group for sample in parts.get(b, ())} - {None}
        if groups:
            found.append(f"{counted(len(groups), 'group')} with photos in both {a} and {b}")
    return found


def _shared_groups(proposal: Proposal | None, val_is_given: bool) -> list[str]:
    """A warning of likely groups with photos in two splits."""
    if proposal is None or not proposal.shared:
        return []
    remedy = "make the split by these groups"
    if not val_is_given and proposal.shared.keys() & {"val", "folds"}:
        remedy = f"keep each on one side with {shlex.quote(f'data.group_regex={proposal.regex}')}"
    return [f"{proposal}, so the accuracy may look better than it is; {remedy}"]


def _lonely(parts: Mapping[str, Sequence[Sample]], classes: Sequence[str]) -> list[str]:
    """Notes on classes without photos in a split that others have."""
    notes = []
    for name in ("val", "test"):
        filled = {sample.label for sample in parts.get(name, ())}
        absent = [c for i, c in enumerate(classes) if i not in filled]
        if filled and absent:
            notes.append(f"no photos for {name} of: {_enumerated(absent)}")
    return notes


def _ungrouped(samples: Sequence[Sample], group_regex: str) -> list[str]:
    alone = sum(sample.group is None for sample in samples)
    if alone == len(samples):
        raise DataError(
            f"data.group_regex {group_regex!r} matches no photo's name, such as {shown(samples[0].name)}",
            "names are paths below the data folder, with / between folders",
        )
    return [f"data.group_regex does not match {counted(alone, 'photo')}; each is a group of its own"] if alone else []


def _raise(problems: Sequence[str], remedy: str, notes: Sequence[str] = ()) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        heading = f"{len(problems)} problem{'s' * (len(problems) > 1)} with the photos"
        raise DataError("\n  ".join([heading, *problems[:_SHOWN], *more, *notes]), remedy)
