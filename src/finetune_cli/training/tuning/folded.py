"""The upper part as a CPU trains it fastest: the same weights and the same function, in fewer and faster operations.

BatchNorm with its moving statistics is linear in every channel, so a convolution followed by one is a convolution with
other weights: kernel * s, and the shift beta - mean * s, where s = gamma / sqrt(variance + epsilon). Folded so in every
step, the large feature maps are passed over once instead of three times; the gradients of kernel, gamma and beta go
through the small product. A convolution of 1 x 1 is a matrix product, which has faster gradients as that. Measured:
docs/training.md.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_cli.inspection.layers import nodes
from finetune_cli.keras_setup import import_keras


@dataclass(frozen=True, eq=False)
class Steps:
    """The network that the steps of a training go through.

    model: a `keras.Model` from activations to features. mixed: those of its layers that compute in lower precision
    where a training does.
    """

    model: Any
    mixed: tuple[Any, ...]


def folded(model: Any) -> Steps:
    """`model` (Functional, with one input and no model inside) with each BatchNorm folded into the convolution below.

    The layers keep their weights, which `model` shares. Only dense convolutions compute in lower precision: TensorFlow
    has no fast kernels on a CPU for the gradients of depthwise ones in bfloat16, and nothing is gained elsewhere.
    """
    keras = import_keras()
    graph = list(nodes(model))
    uses = Counter(id(tensor) for tensor in itertools.chain(model.outputs, *(node.input_tensors for node in graph)))
    calls = Counter(id(node.operation) for node in graph)
    below = {id(tensor): node for node in graph for tensor in node.output_tensors}
    into = _convolution_and_norm(keras)
    known = {id(model.inputs[0]): model.inputs[0]}
    mixed = []
    # A convolution that is folded into what follows is left out where it stood.
    pairs: dict[int, Any] = {}
    for node in graph:
        convolution = below.get(id(node.input_tensors[0]))
        if (
            convolution is not None
            and uses[id(node.input_tensors[0])] == 1
            and calls[id(node.operation)] == calls[id(convolution.operation)] == 1
            and _can_be_folded(keras, convolution.operation, node.operation)
        ):
            pairs[id(node)] = convolution
    left_out = {id(convolution) for convolution in pairs.values()}
    for node in graph:
        if id(node) in left_out:
            continue
        if id(node) in pairs:
            convolution = pairs[id(node)]
            layer = into(convolution.operation, node.operation)
            outputs: Any = layer(known[id(convolution.input_tensors[0])])
            if not isinstance(convolution.operation, keras.layers.DepthwiseConv2D):
                mixed.append(layer)
        else:
            arguments, keywords = node.arguments.fill_in(known)
            outputs = node.operation(*arguments, **keywords)
        known |= dict(zip(map(id, node.output_tensors), _listed(outputs), strict=True))
    return Steps(keras.Model(model.inputs[0], known[id(model.outputs[0])], name=model.name), tuple(mixed))


def _listed(outputs: Any) -> Iterable[Any]:
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def _can_be_folded(keras: Any, convolution: Any, norm: Any) -> bool:
    return (
        type(convolution) in {keras.layers.Conv2D, keras.layers.DepthwiseConv2D}
        and convolution.data_format == "channels_last"
        and convolution.activation is keras.activations.linear
        and type(norm) is keras.layers.BatchNormalization
        and norm.axis in {-1, 3}
    )


def _convolution_and_norm(keras: Any) -> Any:
    ops = keras.ops

    class ConvolutionAndNorm(keras.layers.Layer):  # type: ignore[misc]
        """A convolution and the BatchNorm on it, in inference mode."""

        def __init__(self, convolution: Any, norm: Any) -> None:
            # What is cast is cast here: the product of kernel and scale, not each of them.
            super().__init__(name=f"{convolution.name}_and_{norm.name}", autocast=False)
            self.convolution, self.norm = convolution, norm
            self.depthwise = isinstance(convolution, keras.layers.DepthwiseConv2D)
            self.built = True

        def compute_output_shape(self, input_shape: Any) -> Any:
            return self.convolution.compute_output_shape(input_shape)

        def call(self, activations: Any) -> Any:
            convolution, norm = self.convolution, self.norm
            scale = ops.rsqrt(norm.moving_variance + norm.epsilon)
            if norm.scale:
                scale = scale * norm.gamma
            shift = -norm.moving_mean * scale
            if convolution.use_bias:
                shift = shift + convolution.bias * scale
            if norm.center:
                shift = shift + norm.beta
            kernel = ops.convert_to_tensor(convolution.kernel)
            # A depthwise kernel is (height, width, channels, multiplier), and its output channels are in that order.
            kernel = kernel * (ops.reshape(scale, kernel.shape[2:]) if self.depthwise else scale)
            activations, kernel = (ops.cast(each, self.compute_dtype) for each in (activations, kernel))
            return ops.cast(self._convolved(activations, kernel), self.variable_dtype) + shift

        def _convolved(self, activations: Any, kernel: Any) -> Any:
            convolution = self.convolution
            strides, padding, dilation = convolution.strides, convolution.padding, convolution.dilation_rate
            if self.depthwise:
                return ops.depthwise_conv(activations, kernel, strides, padding, dilation_rate=dilation)
            if kernel.shape[:2] == (1, 1) and strides == (1, 1) and convolution.groups == 1:
                rows = ops.matmul(ops.reshape(activations, (-1, activations.shape[-1])), kernel[0, 0])
                return ops.reshape(rows, (-1, *activations.shape[1:-1], kernel.shape[-1]))
            return ops.conv(activations, kernel, strides, padding, dilation_rate=dilation)

    return ConvolutionAndNorm
