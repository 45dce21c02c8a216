"""`inspect`: a model as the computational graph that it is, node by node and stage by stage.

Says for every node what it gives out, how many weights it has, how many multiply-adds it takes, where the gradient of
the loss goes, and what has to wait in memory for it. Pure functions on a `keras.Model`; nothing is computed with it.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.inspection.layers import Anatomy, Step, anatomy, kept, multiply_adds
from finetune_cli.keras_setup import import_keras

if TYPE_CHECKING:
    import keras

HEAD = "logits"  # the layer that `train` fits; in a finished model it is frozen like the rest
_WEIGHT_BYTES = 4
_ADAM_COPIES = 3  # for every weight that learns: its gradient and Adam's two moments
# A stage ends where height and width fall to three quarters or less. Convolutions without padding take off less.
_SHRINKS = 0.75
_MOMENTARY = {"Cropping2D", "ZeroPadding2D"}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `output`: shape for one photo. `kept`: bytes per photo of its output that the backward pass needs.

    `parameters` counts all weights, `trained` those that learn; `gradient`: whether the loss's reaches it.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    trained: int
    multiply_adds: int
    kept: int
    gradient: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive nodes that work at one resolution, summed up. `gradient`: it reaches at least one of them."""

    first: str
    last: str
    nodes: int
    output: tuple[int, ...]
    parameters: int
    trained: int
    multiply_adds: int
    kept: int
    gradient: bool


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole model. Bytes are per photo; `memory_to_predict` and `memory_to_train` add the weights.

    `gradient_stops`: the nodes at which the way back of the gradient ends. `uncounted`: nodes with weights for whose
    multiply-adds there is no rule (none in Keras's own classifiers).
    """

    name: str
    nodes: tuple[Node, ...]
    stages: tuple[Stage, ...]
    parameters: int
    trained: int
    multiply_adds: int
    kept: int
    predict_bytes: int
    train_bytes: int
    gradient_stops: tuple[str, ...]
    uncounted: tuple[str, ...]

    def memory_to_predict(self, batch: int) -> int:
        """Estimated bytes for `batch` photos forward: the weights, and the most that is alive at one moment.

        An estimate in float32: a runtime that fuses operations needs less, its workspace comes on top.
        """
        return _WEIGHT_BYTES * self.parameters + batch * self.predict_bytes

    def memory_to_train(self, batch: int) -> int:
        """Estimated bytes for a step of Adam on `batch` photos, pixels to loss; see `memory_to_predict`."""
        weights = self.parameters + _ADAM_COPIES * self.trained
        return _WEIGHT_BYTES * weights + batch * self.train_bytes

    def as_dict(self, full: bool, batch: int) -> dict[str, Any]:
        """For JSON: everything, the nodes only if `full`, and the memory at a batch of `batch` photos."""
        values = dataclasses.asdict(self)
        if not full:
            del values["nodes"]
        memory = {"predict": self.memory_to_predict(batch), "train": self.memory_to_train(batch)}
        return values | {"batch": batch, "memory": memory}


def inspect(model: "keras.Model", classes: int | None = None, unfrozen: bool = False) -> Graph:
    """Describe a model from pixels to features or probabilities.

    `classes`: put the head for so many classes on a backbone first. `unfrozen`: as if every layer learned. Otherwise
    the layers whose weights are trainable do, and the head, as in `train`.
    """
    if classes is not None:
        keras = import_keras()
        scores = keras.layers.Dense(classes, name=HEAD)(model.output)
        model = keras.Model(model.input, keras.layers.Softmax(name="probabilities")(scores), name=model.name)
    parts = anatomy(model)
    trained = [_trained(step, unfrozen) for step in parts.steps]
    reached, waiting = _backward(parts, trained)
    counts = [multiply_adds(step, parts.tensors) for step in parts.steps]
    nodes = [_input_node(model, parts, waiting)]
    for step, learns, flows, count in zip(parts.steps, trained, reached, counts, strict=True):
        nodes.append(_node(step, parts, learns, flows, count or 0, waiting))
    return Graph(
        name=str(model.name),
        nodes=tuple(nodes),
        stages=tuple(_stages(nodes)),
        parameters=sum(node.parameters for node in nodes),
        trained=sum(node.trained for node in nodes),
        multiply_adds=sum(node.multiply_adds for node in nodes),
        kept=sum(node.kept for node in nodes),
        predict_bytes=_peak(parts, set()),
        train_bytes=max(_peak(parts, waiting), _backward_peak(parts, reached, waiting)),
        gradient_stops=tuple(_stops(parts, reached)),
        uncounted=tuple(step.name for step, count in zip(parts.steps, counts, strict=True) if count is None),
    )


def _trained(step: Step, unfrozen: bool) -> int:
    """How many weights of a step learn."""
    operation = step.operation
    if unfrozen or step.name.rpartition("/")[2] == HEAD:
        # `trainable_weights` is empty for a frozen layer; these are the ones that it would have otherwise.
        weights = getattr(operation, "_trainable_variables", [])
    else:
        weights = getattr(operation, "trainable_weights", [])
    return sum(math.prod(weight.shape) for weight in weights) if step.first_use else 0


def _backward(parts: Anatomy, trained: Sequence[int]) -> tuple[list[bool], set[int]]:
    """For each step whether the gradient reaches it; and the tensors that wait for the backward pass.

    The gradient of the loss goes back through a step only if something at it or before it learns.
    """
    carries = [False] * len(parts.tensors)
    reached: list[bool] = []
    waiting: set[int] = set()
    learning = {id(step.operation) for step, learns in zip(parts.steps, trained, strict=True) if learns}
    for step in parts.steps:
        learns = id(step.operation) in learning
        needed = tuple(carries[tensor] for tensor in step.inputs)
        reached.append(learns or any(needed))
        waiting |= set(kept(step, learns, needed))
        for tensor in step.outputs:
            carries[tensor] = reached[-1]
    return reached, waiting


def _stops(parts: Anatomy, reached: Sequence[bool]) -> Iterator[str]:
    """The steps that the gradient reaches and does not pass."""
    carries = {tensor for step, flows in zip(parts.steps, reached, strict=True) if flows for tensor in step.outputs}
    for step, flows in zip(parts.steps, reached, strict=True):
        if flows and not carries.intersection(step.inputs):
            yield step.name


def _input_node(model: Any, parts: Anatomy, waiting: set[int]) -> Node:
    tensor = parts.inputs[0]
    shape, size = parts.tensors[tensor].shape, parts.tensors[tensor].bytes
    return Node(str(model.inputs[0].name), "InputLayer", shape, 0, 0, 0, size if tensor in waiting else 0, False)


def _node(step: Step, parts: Anatomy, trained: int, reached: bool, count: int, waiting: set[int]) -> Node:
    weights = getattr(step.operation, "weights", []) if step.first_use else []
    return Node(
        name=step.name,
        kind=type(step.operation).__name__,
        output=parts.tensors[step.outputs[0]].shape,
        parameters=sum(math.prod(weight.shape) for weight in weights),
        trained=trained,
        multiply_adds=count,
        kept=sum(parts.tensors[tensor].bytes for tensor in step.outputs if tensor in waiting),
        gradient=reached,
    )


def _stages(nodes: Sequence[Node]) -> Iterator[Stage]:
    """Group the nodes by resolution; what has none (a squeeze, a reshape) belongs to the stage around it."""
    areas = [_area(node) for node in nodes]
    end = max((i for i, area in enumerate(areas) if area), default=-1) + 1  # behind it: pooling and head
    starts, current = [0], areas[0]
    for i in range(1, end):
        if areas[i] and areas[i] <= current * _SHRINKS**2:
            # The padding before a strided convolution is part of it.
            start = next(j for j in range(i, 0, -1) if nodes[j - 1].kind not in _MOMENTARY)
            starts.append(start)
            current = areas[i]
    bounds = sorted({*starts, end, len(nodes)})
    for first, behind in itertools.pairwise(bounds):
        yield _stage(nodes[first:behind])


def _area(node: Node) -> int:
    """Positions of a feature map; 0 for what is none, and for what changes the size only for a moment."""
    if len(node.output) != 3 or node.kind in _MOMENTARY:
        return 0
    area = node.output[0] * node.output[1]
    return area if area > 1 else 0


def _stage(nodes: Sequence[Node]) -> Stage:
    def total(key: str) -> int:
        return sum(getattr(node, key) for node in nodes)

    return Stage(
        first=nodes[0].name,
        last=nodes[-1].name,
        nodes=len(nodes),
        output=nodes[-1].output,
        parameters=total("parameters"),
        trained=total("trained"),
        multiply_adds=total("multiply_adds"),
        kept=total("kept"),
        gradient=any(node.gradient for node in nodes),
    )


def _peak(parts: Anatomy, waiting: set[int]) -> int:
    """The most bytes per photo alive at once on the way forward, if `waiting` tensors are never freed."""
    last_use = {tensor: i for i, step in enumerate(parts.steps) for tensor in step.inputs}
    stay = waiting | set(parts.outputs)
    alive = set(parts.inputs)
    peak = 0
    for i, step in enumerate(parts.steps):
        alive |= set(step.outputs)
        peak = max(peak, sum(parts.tensors[tensor].bytes for tensor in alive))
        alive -= {tensor for tensor in (*step.inputs, *step.outputs) if last_use.get(tensor, -1) <= i} - stay
    return peak


def _backward_peak(parts: Anatomy, reached: Sequence[bool], waiting: set[int]) -> int:
    """All that waits, and the gradients of one step's inputs and outputs, which have the size of those."""
    flows = [step for step, is_reached in zip(parts.steps, reached, strict=True) if is_reached]
    largest = max((sum(parts.tensors[t].bytes for t in (*step.inputs, *step.outputs)) for step in flows), default=0)
    return largest + sum(parts.tensors[tensor].bytes for tensor in waiting)
