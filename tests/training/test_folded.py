"""The folded network against the one that it is made from: the same features, and the same gradients."""

import numpy as np
import pytest

from finetune_cli.keras_setup import import_keras
from finetune_cli.training.tuning.folded import folded

PHOTOS = np.random.default_rng(5).normal(size=(5, 6, 6, 4)).astype(np.float32)


def network():
    """Every kind of layer that is folded, and the kinds that are not, on maps of 6 x 6 with 4 channels."""
    keras = import_keras()
    layers = keras.layers
    keras.utils.set_random_seed(3)
    pixels = x = keras.Input((6, 6, 4))
    x = layers.Conv2D(8, 1, use_bias=False, name="pointwise")(x)
    x = layers.ReLU(6)(layers.BatchNormalization(name="a")(x))
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.BatchNormalization(scale=False, name="b")(x)
    x = layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(x)
    x = layers.BatchNormalization(center=False, name="c")(x)
    x = layers.Conv2D(8, 3, padding="same", dilation_rate=2, name="dilated")(x)
    x = branch = layers.BatchNormalization(name="d")(x)
    x = layers.Conv2D(8, 1, strides=2, name="narrower")(x)
    x = layers.BatchNormalization(name="e")(x)
    y = layers.Conv2D(8, 2, strides=2, name="valid")(branch)
    x = layers.Add()([x[:, :1, :1], layers.BatchNormalization(name="f")(y)])
    x = layers.Dropout(0.5)(x)
    # Not folded: an activation in between, a convolution with another use, and a BatchNorm on something else.
    x = layers.BatchNormalization(name="g")(layers.Conv2D(8, 1, activation="relu", name="active")(x))
    twice = layers.Conv2D(8, 1, name="twice")(x)
    x = layers.Add()([twice, layers.BatchNormalization(name="h")(twice)])
    x = layers.BatchNormalization(name="i")(x)
    model = keras.Model(pixels, layers.GlobalAveragePooling2D()(x))
    rng = np.random.default_rng(4)
    for layer in model.layers:  # kernels stay as they were drawn
        layer.set_weights(
            [value if value.ndim > 1 else rng.uniform(0.5, 1.5, value.shape) for value in layer.get_weights()]
        )
    return model


@pytest.fixture(scope="module")
def pair():
    model = network()
    return model, folded(model)


def features_and_gradients(model, weights):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        features = model(PHOTOS, training=False)
        loss = tf.reduce_sum(features**2)
    return features, tape.gradient(loss, weights)


def test_it_computes_the_same_with_the_same_gradients(pair):
    model, steps = pair
    weights = model.trainable_variables
    assert {id(each) for each in steps.model.trainable_variables} == {id(each) for each in weights}
    expected, gradients = features_and_gradients(model, weights)
    found, others = features_and_gradients(steps.model, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for weight, one, other in zip(weights, gradients, others, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max(), err_msg=weight.path)


def test_what_can_be_folded_is(pair):
    _model, steps = pair
    layers = import_keras().layers
    left = {layer.name for layer in steps.model.layers if isinstance(layer, layers.BatchNormalization | layers.Conv2D)}
    assert left == {"active", "g", "twice", "h", "i"}
    assert {layer.convolution.name for layer in steps.mixed} == {"pointwise", "grouped", "dilated", "narrower", "valid"}


def test_lower_precision_is_that_of_dense_convolutions_alone(pair):
    model, steps = pair
    exact = np.asarray(steps.model(PHOTOS, training=False))
    for layer in steps.mixed:
        layer.dtype_policy = "mixed_bfloat16"
    rough, gradients = features_and_gradients(steps.model, model.trainable_variables)
    for layer in steps.mixed:
        layer.dtype_policy = "float32"
    assert {each.dtype.name for each in [rough, *gradients]} == {"float32"}
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
