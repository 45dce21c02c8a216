"""Takes a Keras model apart: one step per node of its graph, in topological order, models inside models opened.

`steps` gives the graph; the rules beside it say what one operation costs (multiply-adds) and which tensors its
gradient needs. All numbers are for one photo.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# What the derivative of an activation is computed from: its own output, or its input. Linear needs neither.
_FROM_OUTPUT = {"relu", "relu6", "sigmoid", "softmax", "tanh"}
_FROM_INPUT = {
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "leaky_relu",
    "mish",
    "selu",
    "silu",
    "softplus",
    "swish",
}
# Operations whose gradient depends on both factors.
_PRODUCTS = {"Dot", "Einsum", "Matmul", "Multiply"}
# Operations whose gradient depends on their input (a maximum: on where it was).
_OF_INPUT = {"GlobalMaxPooling2D", "MaxPooling2D", "Maximum", "Minimum", "Power", "Sqrt", "Square"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What flows along an edge: the shape without the batch axis, and the size in bytes per photo."""

    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One node: an operation or a layer, and the tensors (numbers into `Anatomy.tensors`) it takes and gives.

    `first_use`: no earlier step used the same layer, so that its weights are counted here.
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
                outputs = inputs  # Keras puts it before a model inside a model; it does nothing
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
    """The graph of a model inside a model, for the shapes that it is called with there."""
    graph = _functional(inner)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if [tuple(tensor.shape) for tensor in graph.inputs] == shapes or len(inputs) != 1:
        return graph
    import keras

    entry = keras.Input(batch_shape=shapes[0], dtype=inputs[0].dtype)
    return keras.Model(entry, graph.call(entry))


def multiply_adds(step: Step, tensors: tuple[Tensor, ...]) -> int | None:
    """Multiplications with an addition in convolutions and matrix products; `None`: a layer with weights and no rule.

    The count of the published tables: bias, normalisation, activation, pooling and sums are not part of it.
    """
    operation, kind = step.operation, type(step.operation).__name__
    given, made = (_product(tensors[group[0]].shape) for group in (step.inputs, step.outputs))
    if kind in {"Conv1D", "Conv2D", "Conv3D"}:
        return made * _product(operation.kernel.shape[:-1])
    if kind in {"DepthwiseConv1D", "DepthwiseConv2D"}:
        return made * _product(operation.kernel_size)
    if kind == "SeparableConv2D":
        height, width, _filters = tensors[step.outputs[0]].shape
        kernels = operation.depthwise_kernel, operation.pointwise_kernel
        return height * width * sum(_product(kernel.shape) for kernel in kernels)
    if kind in {"Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"}:
        return given * _product(operation.kernel.shape[:-1])
    if kind == "Dense":
        return made * int(operation.kernel.shape[0])
    # A vector of weights only scales or shifts.
    return None if any(len(weight.shape) > 1 for weight in getattr(operation, "weights", ())) else 0


def _product(shape: Iterable[Any]) -> int:
    return math.prod(int(size) for size in shape)


def kept(step: Step, trained: bool, needed: tuple[bool, ...]) -> tuple[int, ...]:
    """The tensors that the gradient through `step` is computed from, and which therefore wait for the backward pass.

    `trained`: the step's own weights learn. `needed`: for each input, whether the gradient goes on through it.
    Layers count as called with ``training=False``: Dropout passes, BatchNorm uses its moving statistics.
    """
    if not trained and not any(needed):
        return ()
    operation, kind = step.operation, type(step.operation).__name__
    tensors: set[int] = set()
    activation = getattr(getattr(operation, "activation", None), "__name__", "")
    name = activation if kind != "ReLU" else "relu"
    if kind in {"ReLU", "Softmax"} or name in _FROM_OUTPUT:
        tensors |= set(step.outputs)
    elif name in _FROM_INPUT and kind == "Activation":
        tensors |= set(step.inputs)
    elif name in _FROM_INPUT:
        tensors |= set(step.outputs)  # a stand-in for the sum before the activation, which has the same size
    if kind in _PRODUCTS and len(step.inputs) == 2:
        tensors |= {tensor for tensor, other in zip(step.inputs, reversed(needed), strict=True) if other}
    if trained or kind in _OF_INPUT or kind == "LayerNormalization":
        tensors |= set(step.inputs)
    if kind in {"GlobalMaxPooling2D", "MaxPooling2D"}:
        tensors |= set(step.outputs)
    return tuple(sorted(tensors))


def first_convolution(model: Any) -> tuple[tuple[Any, ...], Any] | None:
    """The first convolution that looks at three channels, and the models that lead to it.

    Those models, applied one after the other, take pixels to what the convolution gets. `None`: there is none.
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
