import json
from typing import Any

import pytest
from built import built

from finetune_cli.inspection.graph import Graph, Node, inspect
from finetune_cli.keras_setup import import_keras

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


@pytest.fixture(scope="module")
def resnet() -> Any:
    return built("resnet50", None, 224, seed=0).model


def node(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def resnet50_multiply_adds() -> int:
    """From table 1 of He et al. 2015, with the stride in the first 1 x 1 convolution of a stage, as in the paper."""
    total = 112 * 112 * 7 * 7 * 3 * 64
    channels, side = 64, 56
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            if block == 0 and width > 64:
                side //= 2
            total += side * side * (channels * width + 3 * 3 * width * width + width * 4 * width)
            if block == 0:
                total += side * side * channels * 4 * width
            channels = 4 * width
    return total


def test_resnet50(resnet: Any):
    graph = inspect(resnet)
    assert graph.parameters == resnet.count_params() == 23_587_712
    assert graph.multiply_adds == resnet50_multiply_adds()
    assert graph.multiply_adds == pytest.approx(3.9e9, rel=0.015)
    assert graph.uncounted == ()
    assert [stage.output for stage in graph.stages] == [
        (224, 224, 3),
        (112, 112, 64),
        (56, 56, 256),
        (28, 28, 512),
        (14, 14, 1024),
        (7, 7, 2048),
        (2048,),
    ]
    assert [stage.first for stage in graph.stages][1:] == [
        "conv1_pad",
        "pool1_pad",
        "conv3_block1_1_conv",
        "conv4_block1_1_conv",
        "conv5_block1_1_conv",
        "avg_pool",
    ]
    for key in ("parameters", "trained", "multiply_adds", "activations"):
        assert sum(getattr(stage, key) for stage in graph.stages) == getattr(graph, key)
    assert sum(stage.nodes for stage in graph.stages) == len(graph.nodes)
    assert node(graph, "conv2_block1_0_conv") == Node(
        "conv2_block1_0_conv", "Conv2D", (56, 56, 256), 64 * 256 + 256, 0, 56 * 56 * 64 * 256, 0, False
    )


# Multiply-adds as published (papers or the authors' tables), and the input size they are for.
PUBLISHED = {
    "mobilenet": (224, 569e6),
    "mobilenetv2": (224, 300e6),
    "nasnetmobile": (224, 564e6),
    "efficientnetb0": (224, 390e6),
    "convnexttiny": (224, 4.5e9),
    "inceptionv3": (299, 5.7e9),
    "densenet121": (224, 2.86e9),
    "xception": (299, 8.4e9),
    "vgg16": (224, 15.35e9),
}


@pytest.mark.parametrize(
    "name",
    ["mobilenetv2", *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "mobilenetv2")],
)
def test_other_backbones(name: str, keras: Any):
    size, published = PUBLISHED[name]
    model = built(name, None, size, seed=0).model
    graph = inspect(model)
    assert graph.parameters == model.count_params()
    assert graph.multiply_adds == pytest.approx(published, rel=0.02)
    assert graph.uncounted == ()
    model.trainable = True
    trainable = sum(weight.numpy().size for weight in model.trainable_weights)
    assert inspect(model).trained == inspect(model, unfrozen=True).trained == trainable


def test_a_frozen_backbone_stops_the_gradient_at_the_head(resnet: Any):
    graph = inspect(resnet, classes=3)
    assert graph.gradient_stops == ("logits",)
    assert [item.name for item in graph.nodes if item.gradient] == ["logits", "probabilities"]
    assert graph.trained == 2048 * 3 + 3
    assert graph.parameters == resnet.count_params() + graph.trained
    assert node(graph, "logits").multiply_adds == 2048 * 3
    # The features, for the gradient of the kernel; the probabilities, for that of the loss.
    assert graph.activations == (2048 + 3) * FLOAT
    assert node(graph, "avg_pool").activations == 2048 * FLOAT


def test_a_finished_classifier(keras: Any):
    """As `train` writes it: the backbone as a model inside the model, everything frozen."""
    inner = built("mobilenetv3small", None, 64, seed=0).model
    pixels = keras.Input((64, 64, 3), name="pixels")
    scores = keras.layers.Dense(4, name="logits")(inner(pixels, training=False))
    model = keras.Model(pixels, keras.layers.Softmax()(keras.layers.Rescaling(0.5)(scores)))
    model.trainable = False
    graph, alone = inspect(model), inspect(inner)
    assert graph.parameters == model.count_params()
    assert graph.multiply_adds == alone.multiply_adds + 576 * 4
    assert graph.trained == 576 * 4 + 4
    assert graph.gradient_stops == ("logits",)
    assert len(graph.stages) == len(alone.stages)
    assert graph.nodes[3].name.startswith("mobilenetv3small/")


def test_part_of_a_backbone_learns(keras: Any):
    model = built("resnet50", None, 64, seed=0).model
    for layer in model.layers:
        layer.trainable = layer.name.startswith("conv5")
    graph = inspect(model, classes=2)
    assert set(graph.gradient_stops) == {"conv5_block1_0_conv", "conv5_block1_1_conv"}
    # The shortcut and the first convolution read the same map: it waits once.
    assert node(graph, "conv4_block6_out").activations == 4 * 4 * 1024 * FLOAT
    assert not node(graph, "conv4_block6_out").gradient
    assert node(graph, "conv4_block6_add").activations == 0


@pytest.fixture(scope="module")
def small(keras: Any) -> Any:
    """Small enough to count by hand."""
    pixels = keras.Input((8, 8, 3), name="pixels")
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(pixels)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(name="relu")(x)
    gate = keras.layers.Activation("sigmoid", name="gate")(x)
    x = keras.layers.Multiply(name="product")([x, gate])
    x = keras.layers.MaxPooling2D(name="pool")(x)
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(pixels, keras.layers.Dense(2, name="scores")(x), name="small")


def test_what_waits_for_the_backward_pass(small: Any):
    graph = inspect(small)
    waiting = {item.name: item.activations // FLOAT for item in graph.nodes if item.activations}
    assert waiting == {
        "pixels": 8 * 8 * 3,  # gradient of the convolution's kernel
        "conv": 8 * 8 * 4,  # of the scale of the normalisation
        "relu": 8 * 8 * 4,  # of ReLU itself, and of the product by the gate
        "gate": 8 * 8 * 4,  # of the sigmoid, and of the product by the other factor
        "product": 8 * 8 * 4,  # where the maximum was
        "pool": 4 * 4 * 4,  # the maximum
        "mean": 4,  # of the last kernel
    }
    assert graph.gradient_stops == ("conv",)
    assert graph.parameters == small.count_params() == 3 * 3 * 3 * 4 + 4 * 4 + 4 * 2 + 2
    assert graph.trained == graph.parameters - 2 * 4  # without the moving mean and variance
    assert graph.multiply_adds == 8 * 8 * 27 * 4 + 4 * 2


def test_memory(small: Any):
    graph = inspect(small)
    large = 8 * 8 * 4 * FLOAT
    # Forward: the product, with its two factors.
    assert graph.predict_bytes == 3 * large
    assert graph.memory_to_predict(10) == 10 * 3 * large + graph.parameters * FLOAT
    # Backward: all that waits; at the product the gradients of both factors and of itself.
    assert graph.train_bytes == graph.activations + 3 * large
    # Weights; and for each that learns its gradient and Adam's two moments.
    assert graph.memory_to_train(10) == 10 * graph.train_bytes + FLOAT * (graph.parameters + 3 * graph.trained)
    assert graph.memory_to_train(11) - graph.memory_to_train(10) == graph.train_bytes


def test_a_layer_used_twice_is_counted_once_and_computed_twice(keras: Any):
    pixels = keras.Input((8, 8, 3))
    shared = keras.layers.Conv2D(3, 3, padding="same")
    model = keras.Model(pixels, shared(shared(pixels)))
    graph = inspect(model)
    assert graph.parameters == graph.trained == model.count_params() == 84
    assert graph.multiply_adds == 2 * 8 * 8 * 27 * 3


def test_layers_without_a_rule_are_named(keras: Any):
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(5, name="memory")])
    graph = inspect(model)
    assert graph.uncounted == ("memory",)
    assert [(stage.first, stage.nodes) for stage in graph.stages] == [(graph.nodes[0].name, 2)]


def test_json(small: Any):
    graph = inspect(small)
    brief = json.loads(json.dumps(graph.as_dict(full=False, batch=32)))
    assert "nodes" not in brief
    assert brief["batch"] == 32
    assert brief["memory"] == {"predict": graph.memory_to_predict(32), "train": graph.memory_to_train(32)}
    assert brief["stages"][0]["first"] == "pixels"
    full = json.loads(json.dumps(graph.as_dict(full=True, batch=1)))
    assert [item["name"] for item in full["nodes"]] == [item.name for item in graph.nodes]
