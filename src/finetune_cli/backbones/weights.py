"""Loads weight files into a backbone that this package built: ImageNet's or a user's own, from 2016 on.

Two layouts are read. The legacy one (``.h5``) lists its layers in the attribute `layer_names` and the arrays of a
layer in `weight_names`, trainable ones first. Keras 3's (``.weights.h5``) numbers the layers by class
(``layers/conv2d_7/vars/0``). Either may hold the classification top as well, which is left out. Every layer is
filled exactly once, or the file is refused; nothing in a file can choose what is built.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.errors import WeightsError
from finetune_cli.untrusted import hdf5

_TOP_LAYERS = 3  # VGG has the largest classification top: fc1, fc2, predictions
_NESTING = 3  # models inside models; Keras's own classifiers have one level
_REMEDY = "check that the file belongs to model.backbone"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A layer in a file: what the file calls it, and where its arrays are, in Keras's order."""

    name: str
    group: Any
    paths: tuple[str, ...]


def load_into(model: Any, path: Path, in_order: bool = False) -> None:
    """Fill every layer of `model`, a `keras.Model` without classification top, from the file `path`.

    Layers are matched by name; those that Keras named by itself (`conv2d_12`) take what is left, in order.
    `in_order` takes all of them in order, as Keras does: right only for a file that is known to fit.
    Raises `WeightsError` naming what is missing, unknown, of another shape, not finite, or unsafe.
    """
    with hdf5.open_file(path) as file:
        root = hdf5.member(file, "model_weights") if hdf5.has(file, "model_weights") else file
        names = hdf5.text_attribute(root, "layer_names")
        if names is not None:
            slots = {layer.name: layer for layer in model.layers if layer.weights}
            stored = list(_legacy_layers(root, names))
            pairs = dict(zip(slots, stored, strict=False)) if in_order else _match_names(slots, stored)
        elif hdf5.has(file, "layers"):
            slots = dict(_numbered_slots(model, "layers"))
            stored = list(_numbered_layers(hdf5.member(file, "layers"), "layers"))
            pairs = {item.name: item for item in stored if item.name in slots}
            _refuse_swapped(slots, pairs, path)
        else:
            raise WeightsError(f"{path} holds no Keras weights", "model.weights takes a .h5 or .weights.h5 file")
        _require_complete(slots, pairs, stored, path, ordered=names is not None)
        for name, item in pairs.items():
            _fill(slots[name], item, path)


def _legacy_layers(root: Any, names: list[str]) -> Iterator[_Stored]:
    """The layers with weights of a legacy file, in its order."""
    for name in names:
        group = hdf5.member(root, name)
        paths = hdf5.text_attribute(group, "weight_names")
        if paths:
            yield _Stored(name, group, tuple(paths))


def _numbered_slots(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The layers with weights of `model` under the paths that Keras 3 saves them at."""
    used: dict[str, int] = {}
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        number = used.get(kind, -1) + 1
        used[kind] = number
        name = f"{prefix}/{kind}_{number}" if number else f"{prefix}/{kind}"
        if hasattr(layer, "layers"):
            yield from _numbered_slots(layer, f"{name}/layers")
        elif layer.weights:
            yield name, layer


def _numbered_layers(group: Any, prefix: str, depth: int = 0) -> Iterator[_Stored]:
    """The layers with weights of a Keras 3 file."""
    for key in group:
        inner = hdf5.member(group, key)
        count = len(hdf5.member(inner, "vars")) if hdf5.has(inner, "vars") else 0
        if count:
            yield _Stored(f"{prefix}/{key}", inner, tuple(f"vars/{i}" for i in range(count)))
        if hdf5.has(inner, "layers") and depth < _NESTING:
            yield from _numbered_layers(hdf5.member(inner, "layers"), f"{prefix}/{key}/layers", depth + 1)


def _match_names(slots: dict[str, Any], stored: list[_Stored]) -> dict[str, _Stored]:
    """Layers of the model -> layers of the file: by name, then what Keras named by itself in order."""
    by_name = {_plain(item.name): item for item in stored}
    by_name = {_plain(modern_name(item.name)): item for item in stored} | by_name
    own_name = {name for name, layer in slots.items() if not _is_automatic(name, layer)}
    pairs = {name: by_name[_plain(name)] for name in own_name if _plain(name) in by_name}
    taken = {id(item) for item in pairs.values()}
    rest = (item for item in stored if id(item) not in taken)
    pairs |= dict(zip((name for name in slots if name not in own_name), rest, strict=False))
    return {name: pairs[name] for name in slots if name in pairs}


def modern_name(name: str) -> str:
    """Today's name of a ResNet50 layer that a file of 2016 to 2018 calls `name` (other names as they are).

    Stages 2 to 5 and blocks a, b, ... became ``conv2_block1``, ...; in a block ``branch2a/2b/2c`` became 1/2/3 and the
    shortcut ``branch1`` became 0.
    """
    special = {"conv1": "conv1_conv", "bn_conv1": "conv1_bn"}
    if name in special:
        return special[name]
    match = re.fullmatch(r"(res|bn)([2-5])([a-f])_branch(1|2a|2b|2c)", name)
    if match is None:
        return name
    kind, stage, block, branch = match.groups()
    number = {"1": 0, "2a": 1, "2b": 2, "2c": 3}[branch]
    return f"conv{stage}_block{ord(block) - ord('a') + 1}_{number}_{'conv' if kind == 'res' else 'bn'}"


def _require_complete(
    slots: dict[str, Any], pairs: dict[str, _Stored], stored: list[_Stored], path: Path, ordered: bool
) -> None:
    """Every layer has its arrays, no two share them, and what is left over can only be the classification top."""
    missing = [name for name in slots if name not in pairs]
    taken = {id(item) for item in pairs.values()}
    left = [position for position, item in enumerate(stored) if id(item) not in taken]
    is_top = len(left) <= _TOP_LAYERS and (not ordered or left == list(range(len(pairs), len(stored))))
    unknown = [] if is_top else [stored[position].name for position in left]
    if missing or unknown or len(taken) < len(pairs):
        lacks = f"lacks {_some(missing)}" if missing else ""
        has = f"has unknown {_some(unknown)}" if unknown else ""
        problem = " and ".join(filter(None, [lacks, has])) or "names a layer twice"
        raise WeightsError(f"{path} does not fit this backbone: it {problem}", _REMEDY)


def _refuse_swapped(slots: dict[str, Any], pairs: dict[str, _Stored], path: Path) -> None:
    """Keras 3 files match by number; where they also carry the layers' names, those must not contradict."""
    own_names = {layer.name for layer in slots.values() if not _is_automatic(layer.name, layer)}
    for number, item in pairs.items():
        name = (hdf5.text_attribute(hdf5.member(item.group, "vars"), "name") or [""])[0]
        if name in own_names and name != slots[number].name:
            raise WeightsError(
                f"{path} does not fit this backbone: {number} is {name} there, {slots[number].name} here", _REMEDY
            )


def _fill(layer: Any, stored: _Stored, path: Path) -> None:
    variables = layer.trainable_weights + layer.non_trainable_weights
    if len(stored.paths) != len(variables):
        raise WeightsError(
            f"{path} does not fit this backbone: {stored.name} holds {len(stored.paths)} arrays, "
            f"{layer.name} takes {len(variables)}",
            _REMEDY,
        )
    for variable, name in zip(variables, stored.paths, strict=True):
        variable.assign(hdf5.array(stored.group, name, tuple(variable.shape)))
    # Normalization derives what it computes with from its weights in here, and nowhere else.
    getattr(layer, "finalize_state", lambda: None)()


def _is_automatic(name: str, layer: Any) -> bool:
    """Whether Keras made the name up: the class, and a number that depends on what was built before."""
    return re.fullmatch(_snake_case(type(layer).__name__) + r"(_\d+)?", name) is not None


def _snake_case(class_name: str) -> str:
    """`DepthwiseConv2D` -> `depthwise_conv2d`, as Keras names layers and the groups of a file."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", class_name)).lower()


def _plain(name: str) -> str:
    """A form in which the names of Keras 2 (`Conv/BN`) and Keras 3 (`conv_bn`) agree."""
    return name.lower().replace("/", "_")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"layer {shown}" if len(names) == 1 else f"{len(names)} layers: {shown}"
