from typing import Any

import numpy as np
import pytest

from finetune_cli.inspection.costs import multiply_adds
from finetune_cli.inspection.layers import anatomy, first_convolution
from finetune_cli.keras_setup import import_keras


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


def costs(keras: Any, layer: Any, *shape: int) -> int | None:
    model = keras.Sequential([keras.Input(shape), layer])
    parts = anatomy(model)
    return multiply_adds(parts.steps[0], parts.tensors)


# Counted by hand: positions of the output x size of a kernel x channels in x channels out.
def test_multiply_adds(keras: Any):
    layers = keras.layers
    assert costs(keras, layers.Conv2D(7, 3), 10, 12, 5) == 8 * 10 * 3 * 3 * 5 * 7
    assert costs(keras, layers.Conv2D(7, (1, 5), strides=2, padding="same"), 10, 12, 5) == 5 * 6 * 5 * 5 * 7
    assert costs(keras, layers.Conv2D(6, 3, groups=2), 10, 12, 4) == 8 * 10 * 3 * 3 * 2 * 6
    assert costs(keras, layers.DepthwiseConv2D(3, depth_multiplier=2), 10, 12, 5) == 8 * 10 * 3 * 3 * 5 * 2
    assert costs(keras, layers.SeparableConv2D(7, 3), 10, 12, 5) == 8 * 10 * (3 * 3 * 5 + 5 * 7)
    assert costs(keras, layers.Conv2DTranspose(7, 2, strides=2), 10, 12, 5) == 10 * 12 * 2 * 2 * 5 * 7
    assert costs(keras, layers.Conv1D(7, 3), 10, 5) == 8 * 3 * 5 * 7
    assert costs(keras, layers.Dense(7), 5) == 5 * 7
    assert costs(keras, layers.Dense(7), 4, 6, 5) == 4 * 6 * 5 * 7
    assert costs(keras, layers.BatchNormalization(), 4, 6, 5) == 0
    assert costs(keras, layers.MaxPooling2D(), 4, 6, 5) == 0
    assert costs(keras, layers.LSTM(3), 4, 6) is None


def test_steps_in_order_with_models_inside_opened(keras: Any):
    inner = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3, name="conv")], name="inner")
    outer = keras.Sequential(
        [keras.Input((9, 9, 3)), inner, keras.layers.GlobalAveragePooling2D(name="pool")], name="outer"
    )
    pixels = keras.Input((9, 9, 3))
    doubled = outer(pixels)
    model = keras.Model(pixels, keras.layers.Add(name="sum")([doubled, outer(pixels)]))
    parts = anatomy(model)
    names = ["outer/inner/conv", "outer/pool", "outer/inner/conv", "outer/pool", "sum"]
    assert [step.name for step in parts.steps] == names
    assert [step.first_use for step in parts.steps] == [True, True, False, False, True]
    assert [parts.tensors[step.outputs[0]].shape for step in parts.steps] == [(7, 7, 4), (4,), (7, 7, 4), (4,), (4,)]
    assert parts.tensors[parts.steps[0].outputs[0]].bytes == 7 * 7 * 4 * 4
    assert parts.steps[4].inputs == (parts.steps[1].outputs[0], parts.steps[3].outputs[0])
    assert parts.outputs == parts.steps[4].outputs


def test_every_tensor_is_made_before_it_is_used(keras: Any):
    model = keras.applications.MobileNetV3Small(weights=None, include_top=False, input_shape=(64, 64, 3))
    parts = anatomy(model)
    made = set(parts.inputs)
    for step in parts.steps:
        assert made.issuperset(step.inputs)
        made.update(step.outputs)
    assert made == set(range(len(parts.tensors)))


def test_half_precision_takes_half_the_bytes(keras: Any):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 1, dtype="float16")])
    parts = anatomy(model)
    assert parts.tensors[parts.outputs[0]].bytes == 8 * 8 * 4 * 2


def test_first_convolution_deep_inside(keras: Any):
    stem = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(2.0), keras.layers.Conv2D(4, 3, name="x")])
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(1.0, offset=-5.0), stem])
    found = first_convolution(model)
    assert found is not None
    way, convolution = found
    assert convolution.name == "x"
    values: Any = np.full((1, 8, 8, 3), 7.0, np.float32)
    for part in way:
        values = part(values)
    np.testing.assert_array_equal(values, np.full((1, 8, 8, 3), (7 - 5) * 2))
    np.testing.assert_allclose(convolution(values), model(np.full((1, 8, 8, 3), 7.0)), rtol=1e-6)
    assert first_convolution(keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])) is None
