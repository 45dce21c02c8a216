"""pydantic's findings, told in the words of a YAML file: key, line, and what the person probably meant."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune_cli.config.generator import REFUSED

# Names that people know from Keras, Ultralytics, fastai and timm, and the key that does the same here.
KNOWN_ELSEWHERE = {
    "arch": "model.backbone",
    "architecture": "model.backbone",
    "batch": "training.batch_size",
    "bs": "training.batch_size",
    "bs_val": "runtime.batch_size",
    "class_weight": "training.class_weights",
    "cls_names": "data.train",
    "data_dir": "data.train",
    "degrees": "augmentation.rotation_range",
    "drop": "model.dropout",
    "drop_rate": "model.dropout",
    "epoch": "training.epochs",
    "fliplr": "augmentation.horizontal_flip",
    "flipud": "augmentation.vertical_flip",
    "hflip": "augmentation.horizontal_flip",
    "image_size": "image.size",
    "img_size": "image.size",
    "imgsz": "image.size",
    "item_tfms": "image.resize",
    "learn_rate": "training.learning_rate",
    "lr": "training.learning_rate",
    "lr0": "training.learning_rate",
    "model_name": "model.backbone",
    "num_workers": "runtime.workers",
    "optimizer": "training.solver",
    "output_dir": "output.directory",
    "patience": "training.early_stopping_patience",
    "pretrained": "model.weights",
    "project": "output.directory",
    "random_seed": "training.seed",
    "save_dir": "output.directory",
    "seed": "training.seed",
    "shear": "augmentation.shear_range",
    "smoothing": "training.label_smoothing",
    "split": "data.val_split",
    "target_size": "image.size",
    "train_dir": "data.train",
    "val_dir": "data.val",
    "valid_pct": "data.val_split",
    "validation_split": "data.val_split",
    "vflip": "augmentation.vertical_flip",
    "weight_decay": "training.l2",
    "workers": "runtime.workers",
}


# Where pydantic's words would be about patterns and unions.
_EXPECTED = {
    "model.weights_sha256": "64 hexadecimal digits",
    "output.name": "letters, digits, `_`, `-` and `.`, beginning with a letter, a digit or `_`",
    "training.class_weights": "none, balanced, or class names with numbers above 0, such as {wasps: 3}",
}
_NUMBERS = {"int_type", "float_type"}


def describe(exc: ValidationError, schema: type[BaseModel], place: Callable[[tuple[str | int, ...]], str]) -> list[str]:
    """One line per problem: where, which key, what is wrong, what to write instead.

    `place` tells file and line of a key path.
    """
    found: dict[str, str] = {}
    for error in exc.errors(include_url=False, include_context=True):
        keys = _keys(error["loc"], schema)
        name = ".".join(map(str, keys))
        if error["type"] == "extra_forbidden":
            text = _unknown(keys, schema)
        elif error["type"] == "missing":
            text = f"`{name}` is required" + (": the folder of photos, or a CSV file" if name == "data.train" else "")
        elif keys == ("fine_tuning",):
            text = "`fine_tuning` is not available in this version; leave it null"
        elif error["type"] in {"model_type", "model_attributes_type"}:
            null = ", or null" if name == "augmentation" else ""
            text = f"`{name}` is {error['input']!r}: write its keys below it{null}"
        elif name in _EXPECTED or error["type"] == "path_type":
            text = f"`{name}` is {error['input']!r}: write {_EXPECTED.get(name, 'a path')}"
        else:
            message = error["msg"][0].lower() + error["msg"][1:]
            if isinstance(error["input"], str) and any(map(str.isdigit, error["input"])) and error["type"] in _NUMBERS:
                message += "; a number has no quotes, leading zeros, underscores or colons"
            text = f"`{name}` is {error['input']!r}: {message}"
            if name in found:  # another branch of the same union
                text = found[name].split("\0", 1)[1] + f", or {message}"
        found[name] = f"{place(keys)}\0{text}"
    return [line.replace("\0", ": ") for line in found.values()]


def known_keys(schema: type[BaseModel]) -> Iterator[str]:
    """Every dotted key of `schema`."""
    for name, field in schema.model_fields.items():
        section = section_of(field)
        if section is None:
            yield name
        else:
            yield from (f"{name}.{key}" for key in section.model_fields)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that `field` holds, if it is one."""
    return next((kind for kind in kinds(field.annotation) if issubclass(kind, BaseModel)), None)


def kinds(annotation: Any) -> set[type]:
    """The classes that values of `annotation` may have, without what those hold; literals count for none."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin in {types.UnionType, typing.Union}:
        return set().union(*map(kinds, typing.get_args(annotation)))
    found = origin or annotation
    return {found} if isinstance(found, type) else set()


def _keys(location: tuple[str | int, ...], schema: type[BaseModel]) -> tuple[str | int, ...]:
    """`location` without the names of union branches that pydantic appends."""
    if location and isinstance(location[0], str) and location[0] in schema.model_fields:
        section = section_of(schema.model_fields[location[0]])
        rest = location[1:]
        if section is not None and rest and rest[0] == section.__name__:
            rest = rest[1:]
        return (location[0], *rest[:1]) if section is not None else location[:1]
    return location[:2]


def _unknown(keys: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    name, last = ".".join(map(str, keys)), str(keys[-1])
    if keys[0] == "augmentation" and last in REFUSED:
        return f"`{name}` is refused: {REFUSED[last]}"
    known = list(known_keys(schema))
    if last in KNOWN_ELSEWHERE:
        return f"`{name}` is not a key here; its name is `{KNOWN_ELSEWHERE[last]}`"
    same_name = [key for key in known if key.split(".")[-1] == last]
    close = same_name or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        by_last = {key.split(".")[-1]: key for key in known}
        close = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    if close:
        return f"`{name}` is unknown; did you mean `{close[0]}`?"
    siblings = [key for key in known if key.startswith(f"{keys[0]}.")] or list(schema.model_fields)
    return f"`{name}` is unknown; known are: {', '.join(siblings)}"
