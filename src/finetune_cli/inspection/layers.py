"""Takes a Keras model apart: one step per node of its graph, in topological order, with nested models opened."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Tensor:
    """An edge of the graph: the shape without the batch axis, and the size in bytes per photo."""

    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One node: an operation or a layer, with its input and output tensors as indexes into `Anatomy.tensors`.

    first_use: no earlier step used the same layer, so its weights are counted here.
    """

    name: str
    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first_use: bool


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The steps in topological order, and all tensors; `inputs` and `outputs` are the model's own."""

    steps: tuple[Step, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def anatomy(model: Any) -> Anatomy:
    """Take `model` apart (a built `keras.Model`, Functional or Sequential, at any depth)."""
    tensors: list[Tensor] = []
    steps: list[Step] = []
    used: set[int] = set()

    def add(tensor: Any) -> int:
        shape = tuple(int(size or 1) for size in tensor.shape[1:])
        tensors.append(Tensor(shape, math.prod(shape) * np.dtype(str(tensor.dtype)).itemsize))
        return len(tensors) - 1

    def walk(graph: Any, given: tuple[int, ...], prefix: str) -> tuple[int, ...]:
        known = dict(zip(map(id, graph.inputs), given, strict=True))
        for node in nodes(graph):
            operation = node.operation
            inputs = tuple(known[id(tensor)] for tensor in node.input_tensors)
            if type(operation).__name__ == "ConvertToTensor":
                outputs = inputs  # Keras puts it before a nested model; it does nothing
            elif hasattr(operation, "layers"):
                inner = _fitted(operation, node.input_tensors)
                outputs = walk(inner, inputs, f"{prefix}{operation.name}/")
            else:
                outputs = tuple(add(tensor) for tensor in node.output_tensors)
                steps.append(Step(prefix + operation.name, operation, inputs, outputs, id(operation) not in used))
                used.add(id(operation))
            known |= dict(zip(map(id, node.output_tensors), outputs, strict=True))
        return tuple(known[id(tensor)] for tensor in graph.outputs)

    graph = _functional(model)
    given = tuple(add(tensor) for tensor in graph.inputs)
    outputs = walk(graph, given, "")
    return Anatomy(tuple(steps), tuple(tensors), given, outputs)


def nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a Functional model that compute something, in topological order."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.input_tensors:
                yield node


def _functional(model: Any) -> Any:
    """The graph of a model; a Sequential keeps its own inside."""
    return getattr(model, "_functional", model)


def _fitted(inner: Any, inputs: list[Any]) -> Any:
    """The graph of a nested model, for the shapes that it is called with there."""
    graph = _functional(inner)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if [tuple(tensor.shape) for tensor in graph.inputs] == shapes or len(inputs) != 1:
        return graph
    import keras

    entry = keras.Input(batch_shape=shapes[0], dtype=inputs[0].dtype)
    return keras.Model(entry, graph.call(entry))


def first_convolution(model: Any) -> tuple[tuple[Any, ...], Any] | None:
    """The models in front of the first convolution with three input channels, and that convolution; None without one.

    Those models, applied one after the other, turn pixels into the input of the convolution.
    """
    import keras

    graph = _functional(model)
    for node in nodes(graph):
        operation = node.operation
        if hasattr(operation, "layers"):
            found = first_convolution(_fitted(operation, node.input_tensors))
            if found is None:
                continue
            further, convolution = found
        elif isinstance(operation, keras.layers.Conv2D) and operation.kernel.shape[2] == 3:
            further, convolution = (), operation
        else:
            continue
        return (keras.Model(graph.inputs[0], node.input_tensors[0]), *further), convolution
    return None
