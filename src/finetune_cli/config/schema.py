"""The configuration: every key, its default and its limits. `load.load_config` makes a `Config` of a YAML file.

Paths in a `Config` are absolute; `Config.dump` makes them relative to another folder.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    WrapValidator,
    field_validator,
)

from finetune_cli.config import image
from finetune_cli.config.paths import is_backbone_file, path_keys
from finetune_cli.engines.opening import ADDRESS
from finetune_cli.places import Address, Place
from finetune_cli.storage import is_address

# `yaml_file` gives values their types, and pydantic converts none of them (`true` is not a weight of 1) but for these:
# `yes` and `on`, which mean true in YAML 1.1; and text for a path.
_Flag = Annotated[bool, Field(strict=False)]
_Path = Annotated[Path, Field(strict=False)]
if TYPE_CHECKING:
    _Place = Place
else:  # a path in messages, and for pydantic but for addresses, which `paths.resolve_paths` has checked
    _Place = Annotated[
        Path,
        Field(strict=False),
        WrapValidator(lambda value, path: Address(str(value)) if is_address(str(value)) else path(value)),
        PlainSerializer(str),
    ]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Range = float | Annotated[list[float], Field(min_length=2, max_length=2)]
# For Keras, a whole number means whole pixels, and 2 draws from -1, 0, 1 where 2.0 draws any number between -2 and 2.
_Shift = StrictInt | StrictFloat | Annotated[list[StrictInt | StrictFloat], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class DataConfig(Section):
    """Where the photos are and how they are split."""

    train: _Place
    val: _Place | None = None
    test: _Place | None = None
    val_split: Annotated[float, Field(gt=0, lt=1)] = 0.2
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    group_regex: str | None = None
    fixes: _Path | None = None
    near_duplicates: Literal["together", "ignore"] = "together"
    on_bad_image: Literal["error", "skip"] = "error"


class ImageConfig(Section):
    """How a photo becomes a square of pixels."""

    size: Annotated[int, Field(ge=image.SMALLEST_SIZE, le=image.LARGEST_SIZE)] = 224
    resize: image.Resizing = "crop"
    max_pixels: Annotated[int, Field(ge=image.LEAST_MAX_PIXELS)] = 100_000_000


class ModelConfig(Section):
    """The frozen backbone and what the head starts from."""

    backbone: str = "resnet50"
    weights: str | _Path | None = "imagenet"
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    dropout: _Fraction = 0.0
    start_from: _Path | None = None


class AugmentationConfig(Section):
    """The number of views, and the augmenting arguments of Keras's `ImageDataGenerator` under their own names."""

    views: Annotated[int, Field(ge=1, le=1000)] = 4
    horizontal_flip: _Flag = False
    vertical_flip: _Flag = False
    width_shift_range: _Shift = 0.0
    height_shift_range: _Shift = 0.0
    rotation_range: Annotated[float, Field(ge=0, le=180)] = 0.0
    zoom_range: _Range = 0.0
    shear_range: Annotated[float, Field(ge=-180, le=180)] = 0.0
    brightness_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    channel_shift_range: Annotated[float, Field(ge=0, le=255)] = 0.0
    fill_mode: Literal["nearest", "constant", "reflect", "wrap"] = "nearest"
    cval: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """The arguments of `ImageDataGenerator`, without `views`."""
        return self.model_dump(exclude={"views"})


class TrainingConfig(Section):
    """How the head is fitted."""

    solver: Literal["lbfgs", "adam", "sgd"] = "lbfgs"
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = 5
    label_smoothing: _Fraction = 0.0
    l2: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class FineTuningConfig(Section):
    """Which part of the backbone learns together with the head, and how; `auto` is decided by the number of photos."""

    unfreeze: Annotated[str, Field(min_length=1)] = "auto"
    epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 32
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    scratch_gb: Annotated[float, Field(ge=0)] = 10.0


class UnknownConfig(Section):
    """How photos that show none of the classes are refused: how many of the run's own kind may be refused with them."""

    false_rejects: Annotated[float, Field(gt=0, le=0.5)] = 0.05


class RuntimeConfig(Section):
    """Where and how the backbone runs."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    feature_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    cache_dir: _Path | None = None
    engine: Literal["local", "ray"] = "local"
    ray_address: Annotated[str, Field(pattern=ADDRESS)] | None = None


class OutputConfig(Section):
    """Where runs go."""

    directory: _Path = Path("runs")
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=100)] | None = None


# Keys that only the solvers of Keras read; with L-BFGS they are errors, because they would do nothing.
KERAS_ONLY = ("epochs", "batch_size", "learning_rate", "early_stopping_patience")


class Config(Section):
    """All sections. Made by `load_config`; paths are absolute."""

    data: DataConfig
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    augmentation: AugmentationConfig | None = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: Literal["temperature", "none"] = "temperature"
    fine_tuning: FineTuningConfig | None = None
    unknown: UnknownConfig | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    _typed_absolute: frozenset[str] = PrivateAttr(frozenset())

    @field_validator("fine_tuning", "unknown", mode="before")
    @classmethod
    def _auto_is_all_defaults(cls, value: Any) -> Any:
        return {} if value == "auto" else value

    @property
    def is_named_backbone(self) -> bool:
        """Whether `model.backbone` is a known name rather than a file."""
        return not is_backbone_file(self.model.backbone)

    def dump(self, folder: Path) -> dict[str, Any]:
        """The resolved values for a YAML file in `folder`, without keys that have no effect.

        Relative paths stay relative, but to `folder`. `output.name` is left out: a second run cannot have the name of
        the first. But for that, the result loads to an equal `Config`.
        """
        values = self.model_dump(mode="json")
        del values["output"]["name"]
        if self.training.solver == "lbfgs":
            for key in KERAS_ONLY:
                del values["training"][key]
        if self.data.val is not None or self.data.folds is not None:
            del values["data"]["val_split"]
        for section, key in path_keys(values):
            typed_absolute = f"{section}.{key}" in self._typed_absolute
            if not typed_absolute:
                values[section][key] = Path(os.path.relpath(values[section][key], folder)).as_posix()
        return values
