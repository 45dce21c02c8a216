"""A YAML file and overrides (``key=value`` text or Python values) in, a frozen `Config` out, or one `ConfigError`.

The error lists every problem with its line: unknown keys, wrong values, and keys that contradict each other.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_cli.config import generator, messages, yaml_file
from finetune_cli.config.paths import resolve_paths
from finetune_cli.config.schema import KERAS_ONLY, Config, TrainingConfig
from finetune_cli.errors import ConfigError


def load_config(path: Path | None, overrides: Sequence[str] | Mapping[str, Any] = (), own: bool = False) -> Config:
    """The configuration of a YAML file with overrides on top.

    overrides: ``section.key=value`` text as on the command line, or plain values by section, such as
    ``{"training": {"seed": 1}, "calibration": "none"}``. own: the file is the config in a run, and may not be a link.
    Raises `ConfigError` that lists all problems at once, each with file and line.
    """
    document = yaml_file.read(path, _is_text, own) if path is not None else yaml_file.Document()
    values: dict[str, Any] = document.values
    values.setdefault("data", {})  # so that the missing key is reported as `data.train`
    problems = [
        f"{path}, line {line}: `{'.'.join(map(str, keys))}` is given twice" for keys, line in document.duplicates
    ]
    if isinstance(overrides, Mapping):
        origin, overridden = "arguments", merge(values, overrides)
    else:
        origin, overridden = "command line", _apply_overrides(values, overrides, problems)

    def position(keys: yaml_file.Keys) -> str:
        if overridden & {str(keys[0]), ".".join(map(str, keys[:2]))}:
            return origin
        for end in range(len(keys), 0, -1):
            if keys[:end] in document.lines:
                return f"{path}, line {document.lines[keys[:end]]}"
        return str(path) if path is not None else origin

    absolute, wrong = resolve_paths(values, path.parent if path is not None else Path(), overridden)
    problems += [f"{position(keys)}: {text}" for keys, text in wrong]
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        problems += messages.describe(exc, Config, position)
    if config is not None and config.augmentation is not None:
        for name, text in generator.problems(config.augmentation.arguments()).items():
            problems.append(f"{position(('augmentation', name))}: `augmentation.{name}` {text}")
    problems += [f"{position(keys)}: {text}" for keys, text in _contradictions(values)]
    if problems or config is None:
        raise ConfigError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration\n"
            + "\n".join(f"  {problem}" for problem in problems),
            "docs/config.md lists every key, and `finetune init PHOTOS` writes a config that works",
        )
    config._typed_absolute = absolute
    return config


def restored(values: Mapping[str, Any], folder: Path) -> Config:
    """The config of which this or an earlier version gave `values` as `Config.dump` in `folder`.

    Raises `ConfigError` when this version cannot use it.
    """
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    absolute, wrong = resolve_paths(copy, folder, frozenset())
    if wrong:
        raise ConfigError(wrong[0][1], "train a new run")
    try:
        config = Config.model_validate(copy)
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors()[0]["loc"]))
        raise ConfigError(f"`{where}`: {exc.errors()[0]['msg']}", "train a new run") from exc
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
    """Merge `overrides` by section into `values`, key by key; returns the dotted names of the overrides."""
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
    """Whether the key takes any text or a path, and nothing else but null."""
    section = messages.section_of(Config.model_fields[str(keys[0])]) if keys[0] in Config.model_fields else None
    if section is None or len(keys) != 2 or keys[1] not in section.model_fields:
        return False
    return bool(messages.kinds(section.model_fields[str(keys[1])].annotation) & {str, Path})


def _contradictions(values: dict[str, Any]) -> Iterator[tuple[yaml_file.Keys, str]]:
    """Keys that are each valid but contradict each other."""

    def section(name: str) -> dict[str, Any]:
        value = values.get(name)
        return value if isinstance(value, dict) else {}

    data, training, augmentation = section("data"), section("training"), section("augmentation")
    yield from _contradicting_folds(data)
    if isinstance(data.get("group_regex"), str):
        try:
            re.compile(data["group_regex"])
        except re.error as exc:
            yield ("data", "group_regex"), f"`data.group_regex` is not a regular expression: {exc}"
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
    yield from _contradicting_engine(section("runtime"))
    if augmentation.get("cval") and augmentation.get("fill_mode", "nearest") != "constant":
        yield ("augmentation", "cval"), "`augmentation.cval` has no effect without `fill_mode: constant`"


def _contradicting_folds(data: Mapping[str, Any]) -> Iterator[tuple[yaml_file.Keys, str]]:
    """What cannot be together with `data.folds`."""
    if data.get("folds") is None:
        return
    why = {
        ("data", "val"): "every training photo validates once; delete one",
        ("data", "val_split"): "every training photo validates once; delete one",
    }
    for keys, text in why.items():
        if data.get(keys[-1]) is not None:
            yield keys, f"`{'.'.join(keys)}` and `data.folds` exclude each other: {text}"


def _contradicting_engine(runtime: Mapping[str, Any]) -> Iterator[tuple[yaml_file.Keys, str]]:
    """What cannot be together with `runtime.engine`."""
    if runtime.get("ray_address") is not None and runtime.get("engine", "local") == "local":
        yield ("runtime", "ray_address"), "`runtime.ray_address` has no effect without `engine: ray`"
    if runtime.get("engine") == "ray" and runtime.get("device") == "gpu":
        yield ("runtime", "device"), "`runtime.engine: ray` uses the cores of CPUs; delete `device: gpu`"
