"""What a training needs before it begins: valid settings, files, writable folders and space.

Nothing heavy is imported, so that a wrong setting is reported at once.
"""

import difflib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from finetune_cli import files
from finetune_cli.backbones import source
from finetune_cli.cache import folder
from finetune_cli.config.schema import Config
from finetune_cli.duplicates import thumbnails
from finetune_cli.errors import ConfigError, StorageError
from finetune_cli.photos.dataset import Dataset
from finetune_cli.runs import run
from finetune_cli.runs.run import Run
from finetune_cli.training import settings
from finetune_cli.training.settings import Settings

_TABLES_AND_FIGURES = 1_000_000


class Sized(Protocol):
    """What `check_room` needs to know of a backbone: how many numbers a feature and its weights are."""

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        ...

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        ...


def check_settings(config: Config) -> Settings:
    """Check everything but the photos, before minutes of work and without TensorFlow; return what `config` asks for.

    Raises `ConfigError` for an unknown backbone, too small an image, and missing files; `RunError` for a `start_from`
    that is not a finished run; `UsageError` when the run's name is taken; `StorageError` when the output folder cannot
    be written.
    """
    images, backbone = settings.image_settings(config), settings.wanted_backbone(config)
    photos, augmenter = settings.data_settings(config), settings.augmenter(config)
    run.check_target(config.output.directory, config.output.name)
    start_from = config.model.start_from
    start = Run.load(start_from) if start_from is not None else None
    if start is not None:
        photos = replace(photos, trained_on=frozenset(row.digest for row in start.split() if row.split == "train"))
    info = source.resolve(backbone.name)
    problems = []
    if images.size < info.min_size:
        problems.append(f"image.size: {info.name} needs at least {info.min_size} pixels, not {images.size}")
    for key, path in (("backbone", info.path), ("weights", backbone.weights)):
        if path is None or path == "imagenet":
            continue
        try:
            found = stat.S_ISREG(Path(path).stat().st_mode)
        except PermissionError:
            problems.append(f"model.{key}: no permission to read {path}")
            continue
        except OSError:
            found = False
        if not found:
            problems.append(f"model.{key}: there is no file {path}{_meant(key, Path(path).name)}")
    if problems:
        raise ConfigError("\n".join(problems), "correct the model section of the config")
    cache = folder.locate(config.runtime.cache_dir)
    with _named("output.directory"):
        files.check_writable(config.output.directory)
    return Settings(config, photos, images, augmenter, backbone, start, cache)


def _meant(key: str, name: str) -> str:
    if key != "weights":
        return ""
    meant = "null" if name.lower() in {"none", "random"} else "imagenet"
    alike = meant == "null" or difflib.get_close_matches(name.lower(), [meant], cutoff=0.7)
    return f"; did you mean {meant}?" if alike else ""


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Add to the remedy which config key sets another folder."""
    try:
        yield
    except StorageError as exc:
        exc.remedy = f"{exc.remedy}, or set {key} to another folder"
        raise


def check_room(wanted: Settings, data: Dataset, backbone: Sized) -> None:
    """Raise `StorageError` unless there is room for the features and for the run, before hours go into them."""
    rows = wanted.augmenter.views * len(data.train) + len(data.val) + len(data.test)
    folds = wanted.config.data.folds or 0
    if folds:
        rows += len(data.train)  # once more in float32
    size = 2 * 4 * backbone.width * rows  # the features are in the cache, and in the scratch file
    if wanted.config.data.near_duplicates != "ignore":
        # View 0 of all photos comes first, and is copied once; a thumbnail of each photo is in the cache.
        size += (2 * 4 * backbone.width + thumbnails.SIDE**2) * data.photos
    with _named("runtime.cache_dir"):
        files.free_space_check(wanted.cache.scratch, size)
    head = 4 * (backbone.width + 1) * len(data.classes)
    model = 4 * backbone.parameters + head
    # The model in two forms; up to four checkpoints, each with the head, the best head and Adam's two moments: of the
    # final head, and of that of every fold.
    checkpoints = 4 * 4 * head * (folds + 1)
    with _named("output.directory"):
        files.free_space_check(wanted.config.output.directory, 2 * model + checkpoints + _TABLES_AND_FIGURES)
