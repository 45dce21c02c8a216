"""What a config asks for, as the values that the steps of a training take: they do not know the config.

`requirements.check_settings` makes all of them, once, for a training; a command that needs one takes that one.
"""

from dataclasses import dataclass
from functools import cached_property

from finetune_cli.backbones.source import Wanted
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config
from finetune_cli.devices import Device
from finetune_cli.inference import runtimes
from finetune_cli.parallel import worker_count
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import DataSettings
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs.run import Run


@dataclass(frozen=True, eq=False)
class Settings:
    """A checked config, and what was found out for it.

    `start`: the run that `model.start_from` names. `cache`: located once, so that all steps use the same folder.
    """

    config: Config
    photos: DataSettings
    image: ImageSettings
    augmenter: Augmenter
    backbone: Wanted
    start: Run | None
    cache: CacheFolder

    @property
    def workers(self) -> int:
        """Threads that decode and infer."""
        return worker_count(self.config.runtime.workers)

    @cached_property
    def device(self) -> Device:
        """Where the backbone runs. Raises `UsageError` when a GPU is demanded and there is none."""
        if self.config.runtime.engine == "ray":
            return "cpu"  # the cores of all machines, in place of a GPU of this one
        return runtimes.choose_device(self.config.runtime.device)

    @property
    def builds_backbone(self) -> bool:
        """Whether Keras builds the backbone in this process, because its weights change, or because a GPU runs it.

        Any other is converted once, and kept in the cache.
        """
        return self.changes_backbone or self.device == "gpu"

    @property
    def changes_backbone(self) -> bool:
        """Whether fine-tuning changes the weights of the backbone, or has changed those that `start` brings."""
        if self.config.fine_tuning is not None:
            return True
        return self.start is not None and self.start.manifest.backbone.tuned


def data_settings(config: Config) -> DataSettings:
    """Where the photos of `config` are and how they are split."""
    section = config.data
    return DataSettings(
        train=section.train,
        val=section.val,
        test=section.test,
        val_split=section.val_split,
        group_regex=section.group_regex,
        max_pixels=config.image.max_pixels,
        fixes=section.fixes,
        folds=section.folds,
    )


def image_settings(config: Config) -> ImageSettings:
    """How the photos of `config` are decoded."""
    return ImageSettings(config.image.size, config.image.resize, config.image.max_pixels)


def augmenter(config: Config) -> Augmenter:
    """The augmentation of `config`; no section means one view."""
    section = config.augmentation
    arguments = section.arguments() if section is not None else {}
    return Augmenter(arguments, section.views if section is not None else 1, config.training.seed, config.image.size)


def wanted_backbone(config: Config) -> Wanted:
    """What the backbone of `config` is built from."""
    model = config.model
    weights = None if model.weights is None else str(model.weights)
    return Wanted(model.backbone, weights, config.image.size, config.training.seed, model.weights_sha256)
