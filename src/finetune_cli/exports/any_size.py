"""Pixels of any size -> pixels of the model's size, to be put in front of a model in ONNX or OpenVINO.

    uint8 (N, H, W, 3) -> float32 (N, size, size, 3)

It is the resizing of the SavedModel (`tf_photos.py`) in operations that both formats have: no branches and no tensor of
numbers from a range. OpenVINO calculates in float32 where TensorFlow and ONNX take float64; a pixel in some thousands
rounds to the next grey level.
"""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_cli.exports.card import KEY
from finetune_cli.exports.tf_photos import Axis, PhotoGraph, grey
from finetune_cli.inference.runtimes import converter
from finetune_cli.keras_setup import import_keras
from finetune_cli.photos.decode import ImageSettings

if TYPE_CHECKING:
    import openvino

Input = Literal["fixed", "any-size"]
# The tensor between the resizing and the model.
FITTED = "fitted"
_IMAGE = "image"


def resizing(settings: ImageSettings) -> Any:
    """The TensorFlow function ``image -> {"fitted": ...}``."""
    import_keras()  # not needed here; it brings TensorFlow in without its noise
    import tensorflow as tf

    signature = [tf.TensorSpec((None, None, None, 3), tf.uint8, _IMAGE)]
    return tf.function(lambda image: {FITTED: _fitted(tf, settings, image)}, signature, autograph=False)


def _fitted(tf: Any, settings: ImageSettings, photos: Any) -> Any:
    shape = tf.shape(photos)
    height, width = tf.cast(shape[1], tf.float64), tf.cast(shape[2], tf.float64)
    top, left, rows, columns, target_rows, target_columns = PhotoGraph(settings).geometry(height, width)
    shrinks = tf.logical_and(rows >= target_rows, columns >= target_columns)
    down = Axis(tf, shape[1], (top, rows), target_rows, shrinks)
    along = Axis(tf, shape[2], (left, columns), target_columns, shrinks)
    photos = tf.cast(photos[:, down.first : down.end, along.first : along.end], tf.float32)
    photos = grey(tf, _block_means(tf, _block_means(tf, photos, down, 1), along, 2))
    photos = grey(tf, tf.einsum("tw,nhwc->nhtc", _weights(tf, along, photos[0, 0, :, 0], settings), photos))
    photos = grey(tf, tf.einsum("th,nhwc->ntwc", _weights(tf, down, photos[0, :, 0, 0], settings), photos))
    return tf.ensure_shape(photos, (None, settings.size, settings.size, 3))


def _block_means(tf: Any, photos: Any, axis: Axis, number: int) -> Any:
    """`photos` with the mean of each block of pixels along the axis `number`; the last block may be shorter.

    Most photos are so small that a block is one pixel.
    """
    extent = axis.end - axis.first
    length = tf.cast(tf.math.ceil(extent / axis.block), tf.int32)
    missing = [[0, length * axis.block - extent if i == number else 0] for i in range(4)]
    shape = [tf.shape(photos)[i] for i in range(4)]
    shape[number : number + 1] = [length, axis.block]
    sums = tf.reduce_sum(tf.reshape(tf.pad(photos, missing), shape), axis=number + 1)
    line = sums[0, :, 0, 0] if number == 1 else sums[0, 0, :, 0]
    starts = (tf.cumsum(tf.ones_like(line)) - 1) * tf.cast(axis.block, tf.float32)
    counts = tf.minimum(tf.cast(axis.block, tf.float32), tf.cast(extent, tf.float32) - starts)
    return sums / tf.reshape(counts, [-1, 1, 1] if number == 1 else [-1, 1])


def _weights(tf: Any, axis: Axis, line: Any, settings: ImageSettings) -> Any:
    """``float32 (size, p)``: the share of each of the p pixels of `line` in each new one, 0 in the black around."""
    targets = tf.constant(np.arange(settings.size) + 0.5)
    pixels = tf.cumsum(tf.ones_like(line, tf.float64)) - 0.5
    if settings.resize != "pad":
        return axis.weights(pixels, targets)
    targets -= tf.floor((settings.size - axis.target) / 2)
    inside = tf.cast(tf.logical_and(targets > 0, targets < axis.target), tf.float32)
    return axis.weights(pixels, tf.clip_by_value(targets, 0.5, axis.target - 0.5)) * inside[:, tf.newaxis]


def before_onnx(model: Any, settings: ImageSettings, opset: int) -> None:
    """Put the resizing in front of `model`, an ``onnx.ModelProto`` whose input is `image`, in place."""
    import onnx
    import tf2onnx

    function = resizing(settings)
    front, _ = tf2onnx.convert.from_function(function, function.input_signature, opset=opset)
    first = onnx.compose.add_prefix_graph(front.graph, "resize/", rename_inputs=False, rename_outputs=False)
    graph = model.graph
    for node in graph.node:
        node.input[:] = [FITTED if name == _IMAGE else name for name in node.input]
    nodes = [*_in_order_of_use(first), *graph.node]
    del graph.node[:], graph.input[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(first.initializer)
    graph.input.extend(first.input)
    for dimension, name in zip(graph.input[0].type.tensor_type.shape.dim, "NHW", strict=False):
        dimension.dim_param = name


def _in_order_of_use(graph: Any) -> list[Any]:
    """The nodes of `graph`, an ``onnx.GraphProto``, each after those that it needs, whatever their names are.

    The order of tf2onnx depends on names, in which it counts through the life of a process.
    """
    makers = {name: node for node in graph.node for name in node.output}
    ordered: dict[str, Any] = {}

    def visit(name: str) -> None:
        node = makers.get(name)
        if node is not None and node.output[0] not in ordered:
            for given in node.input:
                visit(given)
            ordered[node.output[0]] = node

    visit(graph.output[0].name)
    return list(ordered.values())


def before_openvino(model: "openvino.Model", settings: ImageSettings) -> "openvino.Model":
    """`model` with the resizing in front of it; `model` itself is used up."""
    from openvino import Model
    from openvino.passes import ConstantFolding, Manager

    function = resizing(settings).get_concrete_function()
    front = converter()(function)
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(front)
    for i, node in enumerate(front.get_ordered_ops()):  # TensorFlow numbers its names through the life of a process
        node.set_friendly_name(_IMAGE if node.get_type_name() == "Parameter" else f"resize_{i}")
    fitted = front.get_results()[0].input_value(0)
    fitted.get_tensor().set_names({FITTED})
    model.get_parameters()[0].output(0).replace(fitted)
    return Model(model.get_results(), front.get_parameters(), model.get_friendly_name())


def without_resizing(model: "openvino.Model") -> "openvino.Model":
    """The part of `model` behind the resizing, with the input ``image float32 (N, size, size, 3)``.

    A model that has no resizing is returned as it is. What is left out is never compiled.
    """
    from openvino import Model, PartialShape, Type, opset13

    outputs = (output for node in model.get_ops() for output in node.outputs() if FITTED in output.get_names())
    fitted = next(outputs, None)
    if fitted is None or fitted.partial_shape.rank.is_dynamic or len(fitted.partial_shape) != 4:
        return model
    _n, height, width, _c = fitted.partial_shape
    image = opset13.parameter(PartialShape([-1, height, width, 3]), Type.f32)
    fitted.replace(image.output(0))
    part = Model(model.get_results(), [image], model.get_friendly_name())
    if model.has_rt_info(KEY):
        part.set_rt_info(model.get_rt_info(KEY).astype(str), KEY)
    return part
