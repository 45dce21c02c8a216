"""What a model costs, step by step: multiply-adds, trained parameters, and memory for both passes.

All numbers are for one photo. Nothing is computed with the model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli.inspection.layers import Anatomy, Step, Tensor

HEAD = "logits"  # the layer that `train` fits; in a finished model it is frozen like the rest
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


def parameters(step: Step) -> int:
    """How many parameters a step has; 0 for one whose layer was counted in an earlier step."""
    return sum(math.prod(weight.shape) for weight in getattr(step.operation, "weights", ())) if step.first_use else 0


def trained_parameters(step: Step, unfrozen: bool) -> int:
    """How many parameters of a step are trained; `unfrozen`: as if every layer were."""
    operation = step.operation
    if unfrozen or step.name.rpartition("/")[2] == HEAD:
        # `trainable_weights` is empty for a frozen layer; these would be in it otherwise.
        weights = getattr(operation, "_trainable_variables", [])
    else:
        weights = getattr(operation, "trainable_weights", [])
    return sum(math.prod(weight.shape) for weight in weights) if step.first_use else 0


@dataclass(frozen=True)
class BackwardPass:
    """reached: for each step, whether the gradient of the loss reaches it. activations: tensors stored for it."""

    reached: tuple[bool, ...]
    activations: frozenset[int]

    def stops(self, parts: Anatomy) -> Iterator[str]:
        """The names of the steps that the gradient reaches but does not pass."""
        flows = list(zip(parts.steps, self.reached, strict=True))
        passes = {tensor for step, is_reached in flows if is_reached for tensor in step.outputs}
        return (step.name for step, is_reached in flows if is_reached and not passes.intersection(step.inputs))


def backward_pass(parts: Anatomy, trained: Sequence[int]) -> BackwardPass:
    """Follow the gradient of the loss back through the steps, of which `trained` parameters each are trained.

    It goes back through a step only if something in it or before it is trained.
    """
    carries = [False] * len(parts.tensors)
    reached: list[bool] = []
    activations: set[int] = set()
    training = {id(step.operation) for step, count in zip(parts.steps, trained, strict=True) if count}
    for step in parts.steps:
        is_trained = id(step.operation) in training
        needed = tuple(carries[tensor] for tensor in step.inputs)
        reached.append(is_trained or any(needed))
        activations |= set(_activations(step, is_trained, needed))
        for tensor in step.outputs:
            carries[tensor] = reached[-1]
    return BackwardPass(tuple(reached), frozenset(activations))


def _activations(step: Step, trained: bool, needed: tuple[bool, ...]) -> tuple[int, ...]:
    """The activations that the gradient through `step` is computed from, so that they are stored until then.

    trained: whether the step's own weights are trained. needed: for each input, whether the gradient continues through
    it. Layers count as called with ``training=False``: Dropout does nothing, BatchNorm uses its moving statistics.
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


def forward_peak(parts: Anatomy, stored: frozenset[int] = frozenset()) -> int:
    """The most bytes per photo in memory at one moment of the forward pass; the tensors in `stored` are never freed."""
    last_use = {tensor: i for i, step in enumerate(parts.steps) for tensor in step.inputs}
    never_freed = stored | set(parts.outputs)
    alive = set(parts.inputs)
    peak = 0
    for i, step in enumerate(parts.steps):
        alive |= set(step.outputs)
        peak = max(peak, sum(parts.tensors[tensor].bytes for tensor in alive))
        unused = {tensor for tensor in (*step.inputs, *step.outputs) if last_use.get(tensor, -1) <= i}
        alive -= unused - never_freed
    return peak


def backward_peak(parts: Anatomy, backward: BackwardPass) -> int:
    """Bytes per photo: all activations, and the gradients of the largest step's inputs and outputs."""
    steps = [step for step, reached in zip(parts.steps, backward.reached, strict=True) if reached]
    largest = max((sum(parts.tensors[t].bytes for t in (*step.inputs, *step.outputs)) for step in steps), default=0)
    return largest + sum(parts.tensors[tensor].bytes for tensor in backward.activations)
