"""Where a network can be cut in two: a frozen lower part, and an upper part that learns.

A cut is a tensor through which everything passes: whatever the layers above it compute, they compute from this tensor
alone. Pixels (N, H, W, 3) -> lower part -> activations at the cut -> upper part -> features (N, D).
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli import signals
from finetune_cli.errors import ConfigError
from finetune_cli.inspection.costs import multiply_adds
from finetune_cli.inspection.layers import anatomy, nodes
from finetune_cli.keras_setup import import_keras

LAST_STAGE, LAST_TWO_STAGES, ALL = "last_stage", "last_two_stages", "all"
# A stage ends where height and width fall to three quarters or less. Convolutions without padding take off less.
_SHRINKS = 0.75**2


@dataclass(frozen=True, eq=False)
class Cut:
    """A backbone in two parts, which share its layers; `lower` is None when the cut is at the pixels.

    below: the last frozen layer; above: the first layer that learns; shape: of the activations of one photo.
    whole: both parts in one model, with no model inside, so that its layers are those of the parts.
    """

    below: str
    above: str
    shape: tuple[int, ...]
    lower: Any | None
    upper: Any
    whole: Any


@dataclass(frozen=True, eq=False)
class _Point:
    """A possible cut: the tensor, the layer that makes it, and the number of nodes below it."""

    tensor: Any
    layer: str
    nodes_below: int

    @property
    def size(self) -> int:
        """Numbers for one photo."""
        return math.prod(self.tensor.shape[1:])


@signals.deferred()
def cut(model: Any, unfreeze: str) -> Cut:
    """Cut a backbone (a Functional `keras.Model` of one input and one output) below what is to learn.

    `unfreeze`: ``last_stage``, ``last_two_stages``, ``all``, or the name of the first layer that learns. A stage is
    all layers of one spatial resolution. The models that are returned share their layers with `model`. Raises
    `ConfigError` for an unknown layer, and for one below which more than one tensor passes.
    """
    keras = import_keras()
    flat = flattened(model)
    graph = list(nodes(flat))
    points = _points(flat, graph)
    if unfreeze == ALL:
        point = points[0]
    elif unfreeze in {LAST_STAGE, LAST_TWO_STAGES}:
        point = _below_stage(graph, points, 1 if unfreeze == LAST_STAGE else 2)
    else:
        point = _below_layer(graph, points, unfreeze)
    above = graph[point.nodes_below]
    return Cut(
        point.layer,
        above.operation.name,
        tuple(int(size) for size in point.tensor.shape[1:]),
        keras.Model(flat.input, point.tensor, name="lower") if point.nodes_below else None,
        keras.Model(point.tensor, flat.output, name="upper") if point.nodes_below else flat,
        flat,
    )


def share_above(model: Any, unfreeze: str) -> float:
    """The share of the multiply-adds of `model` that is above a cut (see `cut`)."""

    def count(of: Any) -> int:
        parts = anatomy(of)
        return sum(multiply_adds(step, parts.tensors) or 0 for step in parts.steps)

    return count(cut(model, unfreeze).upper) / max(1, count(model))


def unfreeze_above(model: Any, unfreeze: str) -> None:
    """Mark the layers of `model` above a cut (see `cut`) as trainable, so that `inspect` shows what learns."""
    for layer in cut(model, unfreeze).upper.layers:
        layer.trainable = True


def flattened(model: Any) -> Any:
    """`model` with the models inside it opened, so that it can be cut within them; the layers are the same."""
    graph = getattr(model, "_functional", model)  # a Sequential keeps its graph inside
    if not any(hasattr(node.operation, "layers") for node in nodes(graph)):
        return graph
    keras = import_keras()
    pixels = keras.Input(batch_shape=graph.inputs[0].shape, dtype=graph.inputs[0].dtype)
    return keras.Model(pixels, _called(graph, pixels), name=model.name)


def _called(graph: Any, given: Any) -> Any:
    """The output of `graph` for the symbolic tensor `given`, with every inner model called layer by layer."""
    known = {id(graph.inputs[0]): given}
    for node in nodes(graph):
        arguments, keywords = node.arguments.fill_in(known)
        inner = node.operation
        if hasattr(inner, "layers") and len(node.input_tensors) == 1:
            outputs = _called(getattr(inner, "_functional", inner), arguments[0])
        else:
            outputs = inner(*arguments, **keywords)
        made = outputs if isinstance(outputs, list | tuple) else [outputs]
        known |= dict(zip(map(id, node.output_tensors), made, strict=True))
    return known[id(graph.outputs[0])]


def _points(flat: Any, graph: Sequence[Any]) -> list[_Point]:
    """Every cut through a single tensor, from the pixels upwards, that separates no layer from itself."""
    last_use = {id(tensor): i for i, node in enumerate(graph) for tensor in node.input_tensors}
    last_use[id(flat.outputs[0])] = len(graph)
    last_layer = {id(node.operation): i for i, node in enumerate(graph) if getattr(node.operation, "weights", ())}
    alive = {id(flat.inputs[0]): (flat.inputs[0], "pixels")}
    points = [_Point(flat.inputs[0], "pixels", 0)]
    shared_until = -1
    for i, node in enumerate(graph[:-1]):
        alive |= {id(tensor): (tensor, node.operation.name) for tensor in node.output_tensors}
        alive = {key: value for key, value in alive.items() if last_use.get(key, -1) > i}
        shared_until = max(shared_until, last_layer.get(id(node.operation), -1))
        if len(alive) == 1 and shared_until <= i:
            points.append(_Point(*next(iter(alive.values())), i + 1))
    return points


def _below_stage(graph: Sequence[Any], points: Sequence[_Point], stages: int) -> _Point:
    """The narrowest cut just below the last `stages` stages."""
    starts = list(_stage_starts(graph))
    first = starts[-stages] if len(starts) >= stages else 0
    # Not below the last place where branches meet, nor below a layer of the stage before: those stay frozen.
    before = starts[-stages - 1] + 1 if len(starts) > stages else 0
    lowest = max([before, *(i + 1 for i, node in enumerate(graph[:first]) if len(node.input_tensors) > 1)])
    possible = [point for point in points if lowest <= point.nodes_below <= first]
    possible = possible or [point for point in points if point.nodes_below <= first][-1:]
    return min(reversed(possible), key=lambda point: point.size)


def _stage_starts(graph: Sequence[Any]) -> Iterator[int]:
    """The first node with weights of every stage, from below."""
    current = math.inf
    for i, node in enumerate(graph):
        shape = node.output_tensors[0].shape
        # A feature map of one position is a squeeze, which belongs to the stage around it.
        if len(shape) != 4 or shape[1] * shape[2] <= 1 or not getattr(node.operation, "weights", ()):
            continue
        if shape[1] * shape[2] <= current * _SHRINKS:
            current = shape[1] * shape[2]
            yield i


def _below_layer(graph: Sequence[Any], points: Sequence[_Point], layer: str) -> _Point:
    names = [node.operation.name for node in graph]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, 3)
        raise ConfigError(
            f"fine_tuning.unfreeze: the backbone has no layer {layer!r}",
            f"did you mean {' or '.join(near)}?" if near else "list the layers with: finetune inspect CONFIG --full",
        )
    at = names.index(layer)
    found = next((point for point in points if point.nodes_below == at), None)
    if found is not None:
        return found
    below = [names[point.nodes_below] for point in points if point.nodes_below < at][-1:]
    above = [names[point.nodes_below] for point in points if point.nodes_below > at][:1]
    raise ConfigError(
        f"fine_tuning.unfreeze: below {layer} more than one tensor passes, so the network cannot be cut there",
        f"the nearest layers where it can: {' and '.join(below + above)}",
    )
