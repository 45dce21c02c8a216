"""What a training needs before it begins: valid settings, files, writable folders and space.

Nothing heavy is imported, so that a wrong setting is reported at once.
"""

import difflib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from finetune_cli import files
from finetune_cli.backbones import build
from finetune_cli.cache import folder
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config
from finetune_cli.errors import ConfigError, StorageError
from finetune_cli.photos.dataset import Dataset
from finetune_cli.runs.run import Run

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


def check_settings(config: Config) -> None:
    """Check everything but the photos, before minutes of work and without TensorFlow.

    Raises `ConfigError` for an unknown backbone, too small an image, and missing files; `RunError` for a `start_from`
    that is not a finished run; `StorageError` when the output folder cannot be written.
    """
    with _named("output.directory"):
        files.check_writable(config.output.directory)
    info = build.resolve(config.model.backbone)
    problems = []
    if config.image.size < info.min_size:
        problems.append(f"image.size: {info.name} needs at least {info.min_size} pixels, not {config.image.size}")
    for key, path in (("backbone", info.path), ("weights", config.model.weights)):
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
    if config.model.start_from is not None:
        Run.load(config.model.start_from)


def _meant(key: str, name: str) -> str:
    if key != "weights":
        return ""
    meant = "null" if name.lower() in {"none", "random"} else "imagenet"
    alike = meant == "null" or difflib.get_close_matches(name.lower(), [meant], cutoff=0.7)
    return f"; did you mean {meant}?" if alike else ""


def start_digest(config: Config) -> str | None:
    """SHA-256 of the model of `model.start_from`; `None` without one. Raises `RunError` when it is damaged."""
    source = config.model.start_from
    return None if source is None else files.sha256(Run.load(source).file("model.keras"))


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Add to the remedy which config key sets another folder."""
    try:
        yield
    except StorageError as exc:
        exc.remedy = f"{exc.remedy}, or set {key} to another folder"
        raise


def check_room(config: Config, data: Dataset, views: int, backbone: Sized) -> None:
    """Raise `StorageError` unless there is room for the features and for the run, before hours go into them."""
    rows = views * len(data.train) + len(data.val) + len(data.test)
    with _named("runtime.cache_dir"):
        # The features are in the cache, and in the scratch file.
        files.free_space_check(cache_folder(config).scratch, 2 * 4 * backbone.width * rows)
    head = 4 * (backbone.width + 1) * len(data.classes)
    model = 4 * backbone.parameters + head
    # The model in two forms; up to four checkpoints, each with the head, the best head and Adam's two moments.
    with _named("output.directory"):
        files.free_space_check(config.output.directory, 2 * model + 4 * 4 * head + _TABLES_AND_FIGURES)


def cache_folder(config: Config) -> CacheFolder:
    """The folder of the caches for `runtime.cache_dir`, by default the user's cache folder."""
    return folder.locate(config.runtime.cache_dir)
