"""Class activation maps: where in a photo the evidence for a class lies, exactly and without gradients.

An inference model ends in  feature map -> mean over positions -> features . kernel + bias -> logits -> softmax.  A mean
and a product with a matrix may be exchanged, so a class's logit is the mean over positions of  feature map . kernel
plus the bias (Zhou et al., 2016, https://arxiv.org/abs/1512.04150). Nothing here imports TensorFlow.

    OpenVINO model (n, H, W, 3) -> the same with outputs: probabilities (n, C), features (n, D), feature map
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import RunError

if TYPE_CHECKING:
    import openvino

# What may stand between two of the parts that are looked for without changing a value.
_TRANSPARENT = {"Convert", "Squeeze", "Reshape", "Unsqueeze"}
# What a step of the end does to a factor of the product (True) or to what is added to it (False).
_STEPS: dict[str, Callable[[NDArray[Any], NDArray[Any], bool], NDArray[Any]]] = {
    "Multiply": lambda value, constant, _factor: value * constant,
    "Divide": lambda value, constant, _factor: value / constant,
    "Add": lambda value, constant, factor: value if factor else value + constant,
    "Subtract": lambda value, constant, factor: value if factor else value - constant,
}


@dataclass(frozen=True, eq=False)
class ModelEnd:
    """The linear end of an inference model.

    kernel: ``float32 (D, C)``; bias: ``float32 (C,)``; features: the ``(n, D)`` output that is multiplied with the
    kernel; feature_map: the output whose mean over positions those features are, or None if there is none;
    positions: its two axes of positions, so that either order of axes is understood.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    features: Any
    feature_map: Any | None
    positions: tuple[int, int]


def read_end(model: "openvino.Model", temperature: float = 1.0) -> ModelEnd:
    """Find the linear end of `model`; kernel and bias give the logits before they are divided by `temperature`.

    Raises `RunError` when the model does not end in a linear softmax head.
    """
    operation = _source(model.output(0))
    steps: list[tuple[str, NDArray[Any]]] = []  # what happens to the product with the kernel, last step first
    while operation.get_type_name() != "MatMul":
        kind = operation.get_type_name()
        if kind not in {"Softmax"} | _STEPS.keys() | _TRANSPARENT:
            raise _foreign(f"it ends in {kind}")
        inputs = [operation.input_value(i) for i in range(operation.get_input_size())]
        if kind in _STEPS:
            constants = [constant for value in inputs if (constant := _constant(value)) is not None]
            if len(constants) != 1:
                raise _foreign(f"its last {kind} is not with a constant")
            steps.append((kind, constants[0].reshape(-1).astype(np.float64)))
        operation = _source(next((value for value in inputs if _constant(value) is None), inputs[0]))
    kernel = _constant(operation.input_value(1))
    if kernel is None:
        raise _foreign("the weights of its last layer are not constants")
    kernel = (kernel.T if operation.get_attributes().get("transpose_b") else kernel).astype(np.float64)
    # OpenVINO moves the division by the temperature about and merges it with the bias: play the steps through.
    scale, bias = np.ones(kernel.shape[1]), np.zeros(kernel.shape[1])
    for kind, constant in reversed(steps):
        scale, bias = _STEPS[kind](scale, constant, True), _STEPS[kind](bias, constant, False)
    final = (kernel * scale * temperature).astype(np.float32), (bias * temperature).astype(np.float32)
    features = operation.input_value(0)
    pooling = _source(features)
    while pooling.get_type_name() in _TRANSPARENT:
        pooling = _source(pooling.input_value(0))
    feature_map, positions = None, (0, 0)
    if pooling.get_type_name() == "ReduceMean":
        axes = _constant(pooling.input_value(1))
        rank = len(pooling.input_value(0).get_partial_shape())
        if axes is not None and axes.size == 2 and rank == 4:
            first, second = sorted(int(axis) % rank for axis in axes.ravel())
            feature_map, positions = pooling.input_value(0), (first, second)
    return ModelEnd(np.ascontiguousarray(final[0]), final[1], features, feature_map, positions)


def channels_last(feature_map: NDArray[np.float32], end: ModelEnd) -> NDArray[np.float32]:
    """A feature map with its axes in the order ``(n, h, w, D)``."""
    first, second = end.positions
    channel = ({1, 2, 3} - {first, second}).pop()
    return np.transpose(feature_map, (0, first, second, channel))


def class_map(feature_map: NDArray[np.float32], direction: NDArray[np.float32]) -> NDArray[np.float64]:
    """The evidence ``(h, w)`` for a column of the kernel, or for a difference of two, from a map ``(h, w, D)``.

    Its mean is the logit (or the difference of two logits) without the bias.
    """
    return np.asarray(feature_map.astype(np.float64) @ direction.astype(np.float64))


def _source(value: Any) -> Any:
    """The operation that makes `value`; of a model's output the one before it."""
    node = value.get_node()
    return node.input_value(0).get_node() if node.get_type_name() == "Result" else node


def _constant(value: Any) -> NDArray[Any] | None:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.array(node.get_data()) if node.get_type_name() == "Constant" else None


def _foreign(what: str) -> RunError:
    return RunError(f"the inference model has no linear softmax head: {what}", "use a run that `finetune train` made")
