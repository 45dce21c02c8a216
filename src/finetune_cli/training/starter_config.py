"""`finetune init`: index a folder of photos and write a commented config that can be used as it is."""

import os
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from finetune_cli.cache import folder as cache_folder
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config, DataConfig
from finetune_cli.errors import BadImage, DataError
from finetune_cli.photos.dataset import Dataset, DataSettings, refuse_empty
from finetune_cli.photos.decode import read_header
from finetune_cli.photos.groups import Proposal
from finetune_cli.photos.scan import Sample, refuse_bad
from finetune_cli.places import Address, Place
from finetune_cli.progress import Observer, Silent
from finetune_cli.text import shown
from finetune_cli.training import near, prepare, settings

_MAX_CLASSES, _MAX_HEADERS = 30, 300
# Below this many photos, what a fifth of them tells is off by two points and more; measured in docs/training.md.
FEW_PHOTOS, FOLDS = 1000, 5

_TEMPLATE = """\
{found}
# Train with:                    finetune train {target}
# See the augmented views with:  finetune preview {target}
# Paths in this file are relative to this file. Keys that are left out have their defaults; docs/config.md lists them.

data:
{data}

image:
  size: 224                       # the backbone was trained with squares of this many pixels
  resize: crop                    # the middle of the photo; or pad (all of it, with borders), squash

model:
  backbone: efficientnet_lite0    # bundled, fast on a CPU; resnet50 downloads 95 MB and takes six times as long

augmentation:
  views: 4                        # each photo as it is and three transforms of it
  horizontal_flip: true           # write false if a mirrored photo would be wrong: text, traffic signs
  width_shift_range: 0.1          # sideways, up to a tenth of the width
  height_shift_range: 0.1

training:
{training}

# unknown:                        # answer `unknown` for photos that show none of the classes: docs/unknown.md
#   false_rejects: 0.05           # the share of photos that do show one, and are refused with them
"""


def starter_config(data: Place, target: Path, observer: Observer) -> str:
    """The text of a config for the photos in `data`, to be written to `target`; paths in it are relative to that.

    Raises `DataError` for photos that could not be trained on, with the reason.
    """
    config = Config(data=DataConfig(train=data.absolute(), on_bad_image="skip"))
    photos, cache = settings.data_settings(config), cache_folder.locate(config.runtime.cache_dir)
    found = prepare.index(photos, cache, observer)
    refuse_bad(found.bad, found.photos, "skip")
    refuse_empty(found.classes, found.splits, found.bad)
    if found.photos < FEW_PHOTOS:
        found, photos = _cross_validated(photos, cache) or (found, photos)
    prepare.warn_of_series(found, photos.max_pixels, observer)
    proposal = found.proposal
    if proposal is not None:
        observer.note(
            f"{shown(target)} sets data.group_regex to keep such groups together; remove it if they are not groups"
        )
        found = prepare.index(replace(photos, group_regex=proposal.regex), cache, Silent())
    folder = target.absolute().parent
    return _TEMPLATE.format(
        found="\n".join(f"# {line}".rstrip() for line in _description(data, found, config.image.max_pixels)),
        target=shown(target),
        data="\n".join(_data_section(_relative(data, folder), data.is_file(), photos.folds is not None, proposal)),
        training="\n".join(_training_section(found)),
    )


def _cross_validated(photos: DataSettings, folder: CacheFolder) -> tuple[Dataset, DataSettings] | None:
    """The photos in folds; None if some are set aside for validation, or if they or their groups fill no folds."""
    photos = replace(photos, folds=FOLDS)
    try:
        found = prepare.index(photos, folder, Silent())
        if found.proposal is not None:
            prepare.index(replace(photos, group_regex=found.proposal.regex), folder, Silent())
    except DataError:
        return None
    return found, photos


def _description(data: Place, found: Dataset, max_pixels: int) -> Iterator[str]:
    """What was found, for the head of the file."""
    yield f"Written by `finetune init {shown(data)}`."
    yield ""
    splits = {"training": found.train, "validation": found.val, "test": found.test}
    counts = [f"{len(samples)} for {name}" for name, samples in splits.items() if samples]
    if any(sample.fold for sample in found.train):
        counts[0] += f", and for validation in {FOLDS} folds"
    total = sum(map(len, splits.values()))
    yield f"Found {total} photos of {len(found.classes)} classes: {', '.join(counts)}.{_sizes(found.train, max_pixels)}"
    per_class = Counter(sample.label for samples in splits.values() for sample in samples)
    if line := near.may_split_otherwise(found, "together"):
        yield line[0].upper() + line[1:] + "."
    width = max(len(shown(name)) for name in found.classes[:_MAX_CLASSES])
    for label, name in enumerate(found.classes[:_MAX_CLASSES]):
        yield f"  {shown(name):{width}}  {per_class[label]:>6}"
    if len(found.classes) > _MAX_CLASSES:
        yield f"  and {len(found.classes) - _MAX_CLASSES} more"
    yield from map(shown, (*found.notes, *found.warnings))
    if found.bad:
        yield f"{len(found.bad)} cannot be read, such as {shown(found.bad[0].name)}: {shown(found.bad[0].reason)}"
    yield ""


def _sizes(samples: Sequence[Sample], max_pixels: int) -> str:
    """The median size of some photos, spread over the set."""
    sizes = []
    for sample in samples[:: max(len(samples) // _MAX_HEADERS, 1)]:
        try:
            header = read_header(sample.path, max_pixels)
        except BadImage:
            continue
        sizes.append((header.width, header.height))
    if not sizes:
        return ""
    width, height = (round(statistics.median(sides)) for sides in zip(*sizes, strict=True))
    return f" Typical size: {width} x {height} pixels."


def _data_section(train: str, is_table: bool, in_folds: bool, proposal: Proposal | None) -> Iterator[str]:
    yield f"  train: {yaml_text(train)}"
    yield "  on_bad_image: skip              # photos that cannot be decoded are left out and listed; or error"
    given = "a column `split` is" if is_table else "val and test folders beside train are"
    if in_folds:
        yield f"  folds: {FOLDS}                        # few photos: all are trained on, and each validates once"
        yield "  # with many photos, a fifth for validation is enough, in place of folds:"
    else:
        yield f"  # {given} used as they are; without, a part is kept for validation:"
    yield "  # val_split: 0.2"
    if proposal is not None:
        text = (
            f"A guess: {proposal}. That is so without the next line, which keeps each group together when "
            "validation photos are taken from the training photos. Remove it if these are no groups."
        )
        yield from (f"  # {line}" for line in textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False))
        yield f"  group_regex: {yaml_text(proposal.regex)}"


def _training_section(found: Dataset) -> Iterator[str]:
    counts = Counter(sample.label for sample in found.train).values()
    yield "  seed: 0                         # the same seed gives the same model"
    if max(counts) >= 3 * min(counts):
        yield "  class_weights: balanced         # the largest class has at least 3 times the photos of the smallest"


def _relative(path: Place, folder: Path) -> str:
    """`path`, relative to the folder that the config will be in where that is possible."""
    if isinstance(path, Address):
        return path.text
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return path.absolute().as_posix()


def yaml_text(text: str) -> str:
    """`text` as a YAML scalar: as it is where that is safe and means the same, else in double quotes with escapes."""
    import yaml

    if re.fullmatch(r"[\w/.-]+", text, re.ASCII) and yaml.safe_load(text) == text:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
