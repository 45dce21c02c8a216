"""`inspect`: a model as the computational graph that it is, node by node and stage by stage.

For every node: the shape of its output, its parameters, its multiply-adds, whether the gradient of the loss reaches it,
and the activations that are stored for the backward pass. Nothing is computed with the `keras.Model`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.inspection import costs
from finetune_cli.inspection.costs import HEAD
from finetune_cli.inspection.layers import Anatomy, anatomy
from finetune_cli.keras_setup import import_keras

if TYPE_CHECKING:
    import keras

_WEIGHT_BYTES = 4
_ADAM_COPIES = 3  # for every trained parameter: its gradient and Adam's two moments
# A stage ends where height and width fall to three quarters or less. Convolutions without padding take off less.
_SHRINKS = 0.75
_MOMENTARY = {"Cropping2D", "ZeroPadding2D"}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. output: its shape for one photo. parameters: all, and how many of them are `trained`.

    activations: bytes per photo of its output that are stored for the backward pass. gradient: whether the gradient of
    the loss reaches it.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    trained: int
    multiply_adds: int
    activations: int
    gradient: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive nodes of one resolution, summed up. gradient: whether it reaches at least one of them."""

    first: str
    last: str
    nodes: int
    output: tuple[int, ...]
    parameters: int
    trained: int
    multiply_adds: int
    activations: int
    gradient: bool


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole model. Bytes are per photo; `memory_to_predict` and `memory_to_train` add the weights.

    gradient_stops: the nodes at which the backward pass ends. uncounted: nodes with weights whose multiply-adds are not
    counted, because there is no rule for them (none in Keras's own classifiers).
    """

    name: str
    nodes: tuple[Node, ...]
    stages: tuple[Stage, ...]
    parameters: int
    trained: int
    multiply_adds: int
    activations: int
    predict_bytes: int
    train_bytes: int
    gradient_stops: tuple[str, ...]
    uncounted: tuple[str, ...]

    def memory_to_predict(self, batch: int) -> int:
        """Estimated bytes to predict `batch` photos: the weights, and the most activations in memory at one moment.

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

    classes: add a head for so many classes to a backbone first. unfrozen: as if every layer were trained; otherwise the
    layers whose weights are trainable are, and the head, as in `train`.
    """
    if classes is not None:
        keras = import_keras()
        scores = keras.layers.Dense(classes, name=HEAD)(model.output)
        model = keras.Model(model.input, keras.layers.Softmax(name="probabilities")(scores), name=model.name)
    parts = anatomy(model)
    trained = [costs.trained_parameters(step, unfrozen) for step in parts.steps]
    backward = costs.backward_pass(parts, trained)
    counts = [costs.multiply_adds(step, parts.tensors) for step in parts.steps]
    nodes = [_input_node(model, parts, backward.activations)]
    nodes += [
        Node(
            name=step.name,
            kind=type(step.operation).__name__,
            output=parts.tensors[step.outputs[0]].shape,
            parameters=costs.parameters(step),
            trained=trained_count,
            multiply_adds=count or 0,
            activations=sum(parts.tensors[t].bytes for t in step.outputs if t in backward.activations),
            gradient=reached,
        )
        for step, trained_count, reached, count in zip(parts.steps, trained, backward.reached, counts, strict=True)
    ]
    return Graph(
        name=str(model.name),
        nodes=tuple(nodes),
        stages=tuple(_stages(nodes)),
        parameters=sum(node.parameters for node in nodes),
        trained=sum(node.trained for node in nodes),
        multiply_adds=sum(node.multiply_adds for node in nodes),
        activations=sum(node.activations for node in nodes),
        predict_bytes=costs.forward_peak(parts),
        train_bytes=max(costs.forward_peak(parts, backward.activations), costs.backward_peak(parts, backward)),
        gradient_stops=tuple(backward.stops(parts)),
        uncounted=tuple(step.name for step, count in zip(parts.steps, counts, strict=True) if count is None),
    )


def _input_node(model: Any, parts: Anatomy, activations: frozenset[int]) -> Node:
    tensor = parts.inputs[0]
    shape, size = parts.tensors[tensor].shape, parts.tensors[tensor].bytes
    return Node(str(model.inputs[0].name), "InputLayer", shape, 0, 0, 0, size if tensor in activations else 0, False)


def _stages(nodes: Sequence[Node]) -> Iterator[Stage]:
    """Group the nodes by resolution; one without (a squeeze, a reshape) belongs to the stage around it."""
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
    """Positions of a feature map; 0 for other outputs, and for nodes that change the size only for the next one."""
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
        activations=total("activations"),
        gradient=any(node.gradient for node in nodes),
    )
