"""Photos, and a backbone whose frozen features are poor, for trainings that tune it and may be stopped."""

import shutil
from pathlib import Path

import runs_fixture

from finetune_cli.config.load import load_config
from finetune_cli.config.schema import Config
from finetune_cli.errors import Interrupted
from finetune_cli.keras_setup import import_keras
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run
from finetune_cli.training import pipeline

CLASSES = ("ant", "bee", "wasp")
EPOCHS = 8


class Place:
    """Photos, a cache, and a backbone of two features: too few for three classes unless they are made for them."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.cache, self.backbone = folder / "photos", folder / "cache", folder / "narrow.keras"
        self.cache.mkdir()
        runs_fixture.draw_photos(self.photos, CLASSES)
        self.alone = shutil.copytree(self.photos / "train", folder / "photos alone")
        keras = import_keras()
        keras.utils.set_random_seed(4)
        inputs = keras.Input((runs_fixture.SIZE, runs_fixture.SIZE, 3))
        x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
        x = keras.layers.Conv2D(12, 5, strides=4, padding="same", activation="relu", name="lower_conv")(x)
        x = keras.layers.Conv2D(12, 3, strides=2, padding="same", activation="relu", name="upper_conv")(x)
        x = keras.layers.BatchNormalization(name="upper_bn")(x)
        x = keras.layers.Conv2D(2, 1, name="narrow_conv")(x)
        keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)).save(self.backbone)

    def config(self, folder: Path, *overrides: str, folds: int | None = None) -> Config:
        """The photos of val validate or, with `folds`, all training photos, which have a folder of their own then."""
        train, held_out = self.photos / "train", f"data.val={self.photos / 'val'}"
        if folds is not None:
            train, held_out = self.alone, f"data.folds={folds}"
        return load_config(
            None,
            [
                f"data.train={train}",
                held_out,
                f"data.test={self.photos / 'test'}",
                f"model.backbone={self.backbone}",
                f"image.size={runs_fixture.SIZE}",
                f"runtime.cache_dir={self.cache}",
                "runtime.feature_precision=float32",
                "runtime.device=cpu",
                f"output.directory={folder / 'runs'}",
                "augmentation.views=2",
                "augmentation.horizontal_flip=true",
                f"fine_tuning.epochs={EPOCHS}",
                "fine_tuning.learning_rate=0.02",
                "fine_tuning.batch_size=7",  # of 49 photos: a smaller last batch would be a second graph to build
                *overrides,
            ],
        )

    def train(self, folder: Path, *overrides: str, folds: int | None = None, observer: Silent | None = None) -> Run:
        return pipeline.train(self.config(folder, *overrides, folds=folds), observer or Silent())


class StoppedAfter(Silent):
    """Stops the training, as a signal would, when a note begins so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith(self.beginning):
            raise Interrupted(15)
