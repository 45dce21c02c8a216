"""Which photos seem to belong together (a person, a patient, a video, a burst), judged by names or recording times.

Photos of one group on both sides of a split make the validation accuracy look better than it is, and nothing else shows
it. So likely groups are searched for, and a `data.group_regex` is proposed. It is a guess, and every message says so.

A few patterns are tried. A pattern counts if nearly all names match it, most photos share their group with others, and
the groups are many, none is large, and they are not the classes under another name. Of several such patterns, the one
with the fewest groups is taken: too large a group costs some validation photos, too small a one the honest accuracy.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos import decode
from finetune_cli.places import Place
from finetune_cli.text import brief

# Group 1 of each pattern is the group of a name such as ``class/session 3/p012-left_4.jpg``. Without backslashes, so
# that they read the same in YAML and in a shell; the last one excludes files that are named after their folder, because
# folders such as 3f/ of 3f09ab.jpg only spread the files.
_PATTERNS = (
    "(?:^|/)([^-_. /]+)[-_. ][^/]+[.][^./]+$",  # before the first separator: p012
    "(?:^|/)([^/]+)[-_. ][^-_. /]+[.][^./]+$",  # before the last separator: p012-left
    "(?:^|/)([A-Za-z]*[0-9]+)[A-Za-z]+[.][^./]+$",  # a number and letters behind it: 12 of 12a.jpg
    "(?:^|/)([^/]*[^0-9/])[0-9]+[.][^./]+$",  # before the last number: clip3frame of clip3frame012.jpg
    r"(?:^|/)([^/]+)/(?!\1)[^/]+$",  # the folder: session 3
)
_LEAST_MATCHED = 0.8  # of all names
_LEAST_SHARED = 0.6  # of all photos: in a group with others
_LEAST_GROUPS = 5
_LEAST_GROUPS_PER_CLASS = 3  # on average
_LARGEST = 0.3  # of all photos
_FIRST_LOOK = 1000  # names that a pattern is tried on before it is tried on all

_SERIES_GAP = timedelta(seconds=3)
_MOST_DATED = 10_000  # photos whose recording time is read
_LEAST_IN_SERIES = 0.1  # of all photos that have a recording time

Photos = Sequence[tuple[str, str]]
_Groups = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Proposal:
    """A `group_regex` and what it finds: `groups` groups, of which the two names `example` belong to one.

    `shared` maps val and test to how many of the groups are in train, too, and folds to how many are in several folds;
    those that share none are left out.
    """

    regex: str
    groups: int
    shared: dict[str, int]
    example: tuple[str, str]

    def __str__(self) -> str:
        """What was found, without the remedy."""
        first, second = (brief(name, 60) for name in self.example)
        shared = [
            f"{number} of them are in " + ("several folds" if split == "folds" else f"both train and {split}")
            for split, number in self.shared.items()
        ]
        found = f"photos such as {first} and {second} seem to belong together, by their names, in {self.groups} groups"
        return "; ".join([found, *(shared or ["none of them is on both sides of the split"])])


def propose(splits: Mapping[str, Photos], folds: Iterable[int | None] = ()) -> Proposal | None:
    """The likely groups of the photos of train and val, each given as (name, class); None if names show no groups.

    `folds`: the fold of each photo of train, if they are cross-validated.
    """
    photos = [*splits.get("train", ()), *splits.get("val", ())]
    found = [
        (pattern, groups)
        for pattern in _PATTERNS
        if _matches_most(pattern, photos) and _plausible(groups := _grouped(pattern, photos), photos)
    ]
    if not found:
        return None
    pattern, groups = min(found, key=lambda pair: len(pair[1]))
    parts = {split: _grouped(pattern, members) for split, members in splits.items()}
    both = {split: sorted(parts[split].keys() & parts["train"].keys()) for split in ("val", "test") if split in parts}
    example = max(groups.values(), key=len)
    names = (example[0][0], example[-1][0])
    if both.get("val"):
        group = both["val"][0]
        names = (parts["train"][group][0][0], parts["val"][group][0][0])
    shared: dict[str, int] = {split: len(groups_of) for split, groups_of in both.items() if groups_of}
    sides: dict[str, set[int | None]] = defaultdict(set)
    for (name, _label), fold in zip(splits.get("train", ()), folds, strict=False):
        if match := re.search(pattern, name):
            sides[match[1]].add(fold)
    if divided := sum(len(found) > 1 for found in sides.values()):
        shared["folds"] = divided
    return Proposal(_shortened(pattern, groups, photos), len(groups), shared, names)


def _grouped(pattern: str, photos: Photos) -> _Groups:
    search = re.compile(pattern).search
    groups: _Groups = defaultdict(list)
    for photo in photos:
        if match := search(photo[0]):
            groups[match[1]].append(photo)
    return dict(groups)


def _matches_most(pattern: str, photos: Photos) -> bool:
    """A quick look at some names, spread over all."""
    some = photos[:: max(len(photos) // _FIRST_LOOK, 1)]
    return sum(re.search(pattern, name) is not None for name, _label in some) >= _LEAST_MATCHED * len(some)


def _plausible(groups: _Groups, photos: Photos) -> bool:
    sizes = [len(members) for members in groups.values()]
    if len(groups) < _LEAST_GROUPS or max(sizes) > _LARGEST * len(photos):
        return False
    # 0001_small.jpg in the folder of every class is a running number: files of the same name do not share a group.
    shared = sum(len(members) for members in groups.values() if len({_file(name) for name, _label in members}) > 1)
    if sum(sizes) < _LEAST_MATCHED * len(photos) or shared < _LEAST_SHARED * len(photos):
        return False
    of_class: dict[str, set[str]] = defaultdict(set)
    for group, members in groups.items():
        for _name, label in members:
            of_class[label].add(group)
    per_class = [len(found) for found in of_class.values()]
    if min(per_class) < 2 or sum(per_class) < _LEAST_GROUPS_PER_CLASS * len(per_class):
        return False
    once_a_class = sum(per_class) == sum(sizes)
    across = sum(len({label for _name, label in members}) > 1 for members in groups.values()) > len(groups) / 2
    if once_a_class and all(group.isdigit() for group in groups):
        return False  # 0001-cat.jpg, 0001-dog.jpg: a running number and the class
    # convertible_s_0012.jpg: words that stay within a class are kinds of it; persons and locations occur in several.
    return across or sum(any(map(str.isdigit, group)) for group in groups) > len(groups) / 2


def _file(name: str) -> str:
    return name.rpartition("/")[2]


def _shortened(pattern: str, groups: _Groups, photos: Photos) -> str:
    """A pattern that is easier to read and finds the same groups, such as ``(?:^|/)(p[0-9]+)``, or `pattern`."""
    shapes = {re.sub("[0-9]+", "0", group) for group in groups}
    shape = shapes.pop()
    if not shapes and re.fullmatch("[A-Za-z0 _-]+", shape):
        short = f"(?:^|/)({shape.replace('0', '[0-9]+')})"
        if _grouped(short, photos) == groups:
            return short
    return pattern


def series(splits: Mapping[str, Sequence[Place]], max_pixels: int) -> str | None:
    """A sentence about photos that were taken within seconds of each other but are apart; None if few were.

    splits: the photos of train, and of val or, of cross-validated ones, of each fold; those of test do not count. A
    `group_regex` cannot express times, so this is only a warning. Of very many photos, only the first ones are read.
    """
    photos = [(path, split) for split, paths in splits.items() if split != "test" for path in paths][:_MOST_DATED]
    times = ordered_map(lambda photo: decode.recorded(photo[0], max_pixels), photos, cores())
    dated = sorted((time, split) for time, (_path, split) in zip(times, photos, strict=True) if time is not None)
    found: list[list[str]] = []
    last = None
    for time, split in dated:
        if last is None or time - last > _SERIES_GAP:
            found.append([])
        found[-1].append(split)
        last = time
    found = [sides for sides in found if len(sides) > 1]
    count, split_series = sum(map(len, found)), sum(len(set(sides)) > 1 for sides in found)
    # One time for many photos is not a recording time, but something that a program wrote into all of them.
    if not split_series or count < _LEAST_IN_SERIES * len(dated) or max(map(len, found)) > _LARGEST * len(dated):
        return None
    return (
        f"{count} of {len(dated)} photos with a recording time (Exif) were taken within {_SERIES_GAP.seconds} s of "
        f"another; {split_series} such series are in {'both train and val' if 'val' in splits else 'several folds'}"
    )
