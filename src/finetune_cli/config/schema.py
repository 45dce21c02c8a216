"""The configuration: every key, its default and its limits, in one place.

A YAML file and overrides (``key=value`` text or Python values) go in, a frozen `Config` comes out, or one `ConfigError`
that lists every problem with its line. Paths in a file are relative to that file, in overrides to the current folder;
in a `Config` they are absolute. `Config.dump` writes them back for another folder.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StrictFloat, StrictInt, ValidationError, field_validator

from finetune_cli.config import generator, messages, yaml_file
from finetune_cli.errors import ConfigError

# Values have the types of `yamlfile`, and pydantic converts none of them (a `true` is no weight of 1) but for these:
# `yes` and `on`, which YAML 1.1 had, for true; and text for a path.
_Flag = Annotated[bool, Field(strict=False)]
_Path = Annotated[Path, Field(strict=False)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Range = float | Annotated[list[float], Field(min_length=2, max_length=2)]
# For Keras, a whole number means whole pixels, and 2 draws from -1, 0, 1 where 2.0 draws any number between -2 and 2.
_Shift = StrictInt | StrictFloat | Annotated[list[StrictInt | StrictFloat], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class DataConfig(Section):
    """Where the photos are and how they are split."""

    train: _Path
    val: _Path | None = None
    test: _Path | None = None
    val_split: Annotated[float, Field(gt=0, lt=1)] = 0.2
    group_regex: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"


class ImageConfig(Section):
    """How a photo becomes a square of pixels."""

    size: Annotated[int, Field(ge=32, le=1024)] = 224
    resize: Literal["crop", "squash", "pad"] = "crop"
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000


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


class RuntimeConfig(Section):
    """Where and how the backbone is run."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    feature_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    cache_dir: _Path | None = None


class OutputConfig(Section):
    """Where runs go."""

    directory: _Path = Path("runs")
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=100)] | None = None


# Keys that only the solvers of Keras read; with L-BFGS one is an error, because it would do nothing.
KERAS_ONLY = ("epochs", "batch_size", "learning_rate", "early_stopping_patience")


class Config(Section):
    """All sections. Made by `load`; paths are absolute."""

    data: DataConfig
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    augmentation: AugmentationConfig | None = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: Literal["temperature", "none"] = "temperature"
    fine_tuning: FineTuningConfig | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    _typed_absolute: frozenset[str] = PrivateAttr(frozenset())

    @field_validator("fine_tuning", mode="before")
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
        if self.data.val is not None:
            del values["data"]["val_split"]
        for section, key in _path_keys(values):
            typed_absolute = f"{section}.{key}" in self._typed_absolute
            if not typed_absolute:
                values[section][key] = Path(os.path.relpath(values[section][key], folder)).as_posix()
        return values


def load(path: Path | None, overrides: Sequence[str] | Mapping[str, Any] = (), own: bool = False) -> Config:
    """The configuration of a YAML file with overrides on top.

    overrides: ``section.key=value`` text as on the command line, or plain values by section, such as
    ``{"training": {"seed": 1}, "calibration": "none"}``. own: the file is the config in a run, and may not be a link.
    Raises `ConfigError` that lists all problems at once, each with file and line.
    """
    document = yaml_file.read(path, _is_text, own) if path is not None else yaml_file.Document()
    values: dict[str, Any] = document.values
    values.setdefault("data", {})  # so that what is missing is said to be `data.train`
    problems = [
        f"{path}, line {line}: `{'.'.join(map(str, keys))}` is given twice" for keys, line in document.duplicates
    ]
    if isinstance(overrides, Mapping):
        origin, overridden = "arguments", merge(values, overrides)
    else:
        origin, overridden = "command line", _apply_overrides(values, overrides, problems)

    def place(keys: yaml_file.Keys) -> str:
        if overridden & {str(keys[0]), ".".join(map(str, keys[:2]))}:
            return origin
        for end in range(len(keys), 0, -1):
            if keys[:end] in document.lines:
                return f"{path}, line {document.lines[keys[:end]]}"
        return str(path) if path is not None else origin

    absolute, wrong = _resolve_paths(values, path.parent if path is not None else Path(), overridden)
    problems += [f"{place(keys)}: {text}" for keys, text in wrong]
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        problems += messages.describe(exc, Config, place)
    if config is not None and config.augmentation is not None:
        for name, text in generator.problems(config.augmentation.arguments()).items():
            problems.append(f"{place(('augmentation', name))}: `augmentation.{name}` {text}")
    problems += [f"{place(keys)}: {text}" for keys, text in _contradictions(values)]
    if problems or config is None:
        raise ConfigError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration\n"
            + "\n".join(f"  {problem}" for problem in problems),
            "docs/config.md lists every key, and `finetune init PHOTOS` writes a config that works",
        )
    config._typed_absolute = absolute
    return config


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> frozenset[str]:
    names = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.split(".")
        if not equals or not all(keys) or len(keys) > 2:
            problems.append(f"command line: {override!r} is not of the form section.key=value")
            continue
        try:
            value = yaml_file.parse_argument(text, tuple(keys), _is_text)
        except ValueError as exc:
            problems.append(f"command line: {override!r} holds a malformed value: {exc}")
            continue
        if len(keys) == 1:
            values[name] = value
        else:
            section = values.get(keys[0])
            if not isinstance(section, dict):
                section = {}
            values[keys[0]] = {**section, keys[1]: value}
        names.add(name)
    return frozenset(names)


def merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> frozenset[str]:
    """Put `overrides`, by section, into `values`, key by key; return the dotted names of what was given."""
    names: set[str] = set()
    for section, given in overrides.items():
        if isinstance(given, Mapping):
            before = values.get(section)
            values[section] = {**(before if isinstance(before, dict) else {}), **given}
            names |= {f"{section}.{key}" for key in given}
        else:
            values[section] = given
            names.add(section)
    return frozenset(names)


def _is_text(keys: yaml_file.Keys) -> bool:
    """Whether `keys` name a key that takes any text or a path, and nothing else but null."""
    section = messages.section_of(Config.model_fields[str(keys[0])]) if keys[0] in Config.model_fields else None
    if section is None or len(keys) != 2 or keys[1] not in section.model_fields:
        return False
    return bool(messages.kinds(section.model_fields[str(keys[1])].annotation) & {str, Path})


def is_backbone_file(name: str) -> bool:
    """Whether `model.backbone` names a file rather than a known backbone."""
    return name.endswith(".keras") or "/" in name or os.sep in name


def _path_keys(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The (section, key) pairs of `values` that hold a path."""
    always = [("data", ("train", "val", "test")), ("model", ("start_from",))]
    always += [("runtime", ("cache_dir",)), ("output", ("directory",))]
    for section, keys in always:
        for key in keys:
            if isinstance(values.get(section), dict) and isinstance(values[section].get(key), str):
                yield section, key
    model = values.get("model")
    if isinstance(model, dict):
        if isinstance(model.get("weights"), str) and model["weights"] != "imagenet":
            yield "model", "weights"
        if isinstance(model.get("backbone"), str) and is_backbone_file(model["backbone"]):
            yield "model", "backbone"


def _resolve_paths(
    values: dict[str, Any], base: Path, overridden: frozenset[str]
) -> tuple[frozenset[str], list[tuple[yaml_file.Keys, str]]]:
    """Make the paths in `values` absolute.

    Returns the dotted names of those that were typed so, and for what cannot be a path its keys and the reason.
    """
    output = values.setdefault("output", {})
    if isinstance(output, dict) and "directory" not in output:
        # A default is nobody's typed path: runs go under the current folder, where later commands look for them.
        output["directory"] = str(Path("runs").absolute())
    absolute: set[str] = set()
    wrong: list[tuple[yaml_file.Keys, str]] = []
    for section, key in list(_path_keys(values)):
        text = values[section][key]
        if "\0" in text:
            wrong.append(((section, key), f"`{section}.{key}` is {text!r}: a path cannot hold a NUL character"))
            continue
        try:
            typed = Path(text).expanduser()
        except RuntimeError:
            user = Path(text).parts[0]
            wrong.append(
                ((section, key), f"`{section}.{key}` is {text!r}: there is no user {user[1:]}; for a folder: ./{user}")
            )
            continue
        if typed.is_absolute() and (section, key) != ("output", "directory"):
            absolute.add(f"{section}.{key}")
        folder = Path() if overridden & {section, f"{section}.{key}"} else base
        values[section][key] = os.path.abspath(folder / typed)  # noqa: PTH100 - unlike resolve() it keeps links, which people mean
    return frozenset(absolute), wrong


def _contradictions(values: dict[str, Any]) -> Iterator[tuple[yaml_file.Keys, str]]:
    """Keys that are each legal but cannot stand together."""

    def section(name: str) -> dict[str, Any]:
        value = values.get(name)
        return value if isinstance(value, dict) else {}

    data, training, augmentation = section("data"), section("training"), section("augmentation")
    if isinstance(data.get("group_regex"), str):
        try:
            re.compile(data["group_regex"])
        except re.error as exc:
            yield ("data", "group_regex"), f"`data.group_regex` is no regular expression: {exc}"
    if data.get("val") is not None and "val_split" in data:
        yield ("data", "val_split"), "`data.val` and `data.val_split` exclude each other; delete one"
    if training.get("solver", TrainingConfig.model_fields["solver"].default) == "lbfgs":
        for key in KERAS_ONLY:
            if key in training:
                yield (
                    ("training", key),
                    f"`training.{key}` has no effect with solver lbfgs; add `solver: adam`",
                )
        if section("model").get("dropout"):
            yield (
                ("model", "dropout"),
                "`model.dropout` has no effect with solver lbfgs; add `solver: adam`",
            )
    if augmentation.get("cval") and augmentation.get("fill_mode", "nearest") != "constant":
        yield ("augmentation", "cval"), "`augmentation.cval` has no effect without `fill_mode: constant`"
