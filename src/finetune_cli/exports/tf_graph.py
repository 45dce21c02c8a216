"""A Keras model as one TensorFlow function whose weights are constants, for converters that only know such graphs."""

from typing import Any


def with_constants(model: Any, size: int, photos: int | None) -> Any:
    """A function ``image float32 (photos, size, size, 3)`` -> ``{"probabilities": (photos, C)}``; None: any number.

    LiteRT's converter loses the variables of Keras 3, and tf2onnx makes further inputs of the constants that some
    preprocessing has; frozen, the graph has neither.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    signature = [tf.TensorSpec((photos, size, size, 3), tf.float32, "image")]

    def function(python: Any) -> Any:
        return tf.function(python, input_signature=signature, autograph=False)

    traced = function(lambda image: model(image, training=False)).get_concrete_function()
    frozen = convert_variables_to_constants_v2(traced)
    return function(lambda image: {"probabilities": frozen(image)[0]})
