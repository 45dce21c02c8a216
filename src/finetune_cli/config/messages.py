"""Validation errors of pydantic in the terms of a YAML file: key, line, and what was probably meant."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune_cli.config.generator import REFUSED

# Names that people know from Keras, Ultralytics, fastai, timm and torchvision, in lower case and without underscores,
# and the key that does the same here.
_ELSEWHERE = {
    "augmentation.brightness_range": "brightness colorjitter hsvv maxlighting randombrightness",
    "augmentation.channel_shift_range": "channelshift",
    "augmentation.height_shift_range": "heightshift",
    "augmentation.horizontal_flip": "doflip fliplr hflip horizontalflips randomflip randomhorizontalflip",
    "augmentation.rotation_range": "degrees maxrotate randomrotation rotate rotation rotationdegrees",
    "augmentation.shear_range": "randomshear shear",
    "augmentation.vertical_flip": "flipud flipvert randomverticalflip vflip",
    "augmentation.views": "numviews",
    "augmentation.width_shift_range": "randomtranslation translate translation widthshift",
    "augmentation.zoom_range": "maxzoom randomresizedcrop randomzoom scale zoom",
    "data.folds": "crossval crossvalidation cv cvfolds kfold kfolds nfolds numfolds nsplits",
    "data.group_regex": "groupby groups",
    "data.test": "testdata testdir testpath",
    "data.train": "clsnames datadir datapath dataset traindata traindir trainpath",
    "data.val": "valdir validation validationdata validpath valpath",
    "data.val_split": "split valfraction validationfraction validationsplit validfraction validpct",
    "image.max_pixels": "maximagepixels",
    "image.resize": "centercrop cropmode itemtfms",
    "fine_tuning.unfreeze": "freeze",
    "image.size": "cropsize imagesize imgsize imgsz inputshape inputsize resizesize targetsize traincropsize",
    "model.backbone": "arch architecture backbonename basemodel encoder modelname",
    "model.dropout": "drop droprate",
    "model.weights": "checkpoint initialcheckpoint pretrained pretrainedweights",
    "output.directory": "logdir outputdir outputpath project savedir saveto",
    "output.name": "experiment expname runname",
    "runtime.batch_size": "bsval evalbatchsize valbatchsize validationbatchsize",
    "runtime.cache_dir": "cache cachedir",
    "runtime.device": "accelerator gpu gpus",
    "runtime.feature_precision": "amp bf16 fp16 half mixedprecision precision",
    "runtime.workers": "numthreads numworkers nworkers threads workers",
    "training.batch_size": "batch bs minibatch",
    "training.class_weights": "classweight",
    "training.early_stopping_patience": "earlystopping patience",
    "training.epochs": "epoch maxepochs nepoch nepochs numepochs",
    "training.l2": "kernelregularizer l2regularization regularization wd weightdecay",
    "training.label_smoothing": "labelsmooth smoothing",
    "training.learning_rate": "baselr initiallearningrate initiallr learnrate lr lr0 lrmax",
    "training.seed": "manualseed randomseed randomstate rngseed seed",
    "training.solver": "opt optim optimizer",
}
KNOWN_ELSEWHERE = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}


# Where pydantic's messages would be about patterns and unions.
_EXPECTED = {
    "model.weights_sha256": "64 hexadecimal digits",
    "output.name": "letters, digits, `_`, `-` and `.`, beginning with a letter, a digit or `_`",
    "training.class_weights": "none, balanced, or class names with numbers above 0, such as {wasps: 3}",
}
_NUMBERS = {"int_type", "float_type"}


def describe(
    exc: ValidationError, schema: type[BaseModel], position: Callable[[tuple[str | int, ...]], str]
) -> list[str]:
    """One line per problem: where, which key, what is wrong, what to write instead.

    `position` gives file and line of a key path.
    """
    found: dict[str, str] = {}
    for error in exc.errors(include_url=False, include_context=True):
        keys = _keys(error["loc"], schema)
        name = ".".join(map(str, keys))
        if error["type"] == "extra_forbidden":
            text = _unknown(keys, schema)
        elif error["type"] == "missing":
            text = f"`{name}` is required" + (": the folder of photos, or a table" if name == "data.train" else "")
        elif error["type"] in {"model_type", "model_attributes_type"}:
            null = {"augmentation": ", or null", "fine_tuning": ", or auto, or null"}.get(name, "")
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
        found[name] = f"{position(keys)}\0{text}"
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
    """The classes that values of `annotation` may have, without their items; literals have none."""
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
    elsewhere = KNOWN_ELSEWHERE.get(last.lower().replace("_", "").replace("-", ""))
    if elsewhere is not None:
        sibling = f"{keys[0]}.{elsewhere.rpartition('.')[2]}"
        return f"`{name}` is not a key here; its name is `{sibling if sibling in known else elsewhere}`"
    by_last: dict[str, list[str]] = {}
    for key in known:
        by_last.setdefault(key.split(".")[-1], []).append(key)
    # 0.8: one letter of five is wrong, or two are swapped. Less similar names mostly mean something else: amp, cval.
    for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.8):
        close = [key for key in by_last[match] if key.startswith(f"{keys[0]}.")] or by_last[match]
        return f"`{name}` is unknown; did you mean `{close[0]}`?"
    siblings = [key for key in known if key.startswith(f"{keys[0]}.")] or list(schema.model_fields)
    return f"`{name}` is unknown; known are: {', '.join(siblings)}"
