from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import built
from PIL import Image

from finetune_cli.backbones import registry
from finetune_cli.errors import FinetuneError
from finetune_cli.inspection import filters
from finetune_cli.keras_setup import import_keras


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


def waves(down: float, across: float, colour: Any = (1, 1, 1), size: int = 7) -> Any:
    """A kernel that looks for waves running in a direction; lines are across it."""
    y, x = np.mgrid[:size, :size] - size // 2
    return np.sin(2 * np.pi * (down * y + across * x) / 5)[..., None] * np.array(colour, float)


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        (waves(1, 0), "horizontal lines"),
        (waves(0, 1), "vertical lines"),
        (waves(0.15, 1), "vertical lines"),
        (waves(0.7, 0.7), "rising lines"),  # brighter to the lower right: a line of one brightness goes up to the right
        (waves(-0.7, 0.7), "falling lines"),
        (waves(0, 1, (0, 1, 0)), "vertical lines"),
        (waves(1, 0, (-1, 1, 0)), "colour: red-green"),
        (np.ones((7, 7, 3)), "brightness"),
        (-np.ones((3, 3, 3)), "brightness"),
        (np.ones((7, 7, 1)) * [1.0, -1.0, 0.0], "colour: red-green"),
        (np.ones((7, 7, 1)) * [-0.5, -0.5, 1.0], "colour: blue-yellow"),
        (np.ones((3, 3, 1)) * [0.5, 0.5, -1.0], "colour: blue-yellow"),
        (np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]])[..., None] * np.ones(3), "spots"),
        (np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])[..., None] * np.ones(3), "horizontal lines"),  # Sobel's
        (np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])[..., None] * np.ones(3), "vertical lines"),
    ],
)
def test_labels(kernel: Any, label: str):
    assert filters.describe(kernel.astype(np.float64)) == label


def grating(down: float, across: float) -> Any:
    y, x = np.mgrid[:224, :224]
    return np.repeat(np.uint8(127.5 + 100 * np.sin(2 * np.pi * (down * y + across * x) / 8))[..., None], 3, axis=2)


def test_the_learned_filters_do_what_their_labels_say(tmp_path: Path):
    """Shown lines of both directions, the filters answer those more that their labels name."""
    model = built(registry.BUNDLED, "imagenet", 224, seed=0).model
    shown = {"horizontal lines": grating(1, 0), "vertical lines": grating(0, 1)}
    answers = {}
    for lines, photo in shown.items():
        found = filters.filters(model, photo, tmp_path / "filters.png")
        strongest = next(item for item in found if item.strength == 1)
        assert strongest is found[0]
        answers[lines] = {item.index: item for item in found}
    labels = {index: item.label for index, item in answers["horizontal lines"].items()}
    assert {"brightness", "colour: blue-yellow", "colour: red-green", *shown} <= set(labels.values())
    # A strength is a share of the strongest's in the same photo; only ratios of two filters can be compared.
    by_label = {
        lines: {label: [answers[lines][i].strength for i in labels if labels[i] == label] for label in shown}
        for lines in shown
    }
    in_horizontal, in_vertical = by_label["horizontal lines"], by_label["vertical lines"]
    assert np.mean(in_horizontal["horizontal lines"]) / np.mean(in_horizontal["vertical lines"]) > 1.5 * (
        np.mean(in_vertical["horizontal lines"]) / np.mean(in_vertical["vertical lines"])
    )


def test_order_of_the_channels_is_found_out(keras: Any, tmp_path: Path):
    """ResNet50 takes blue first: a kernel on its last channel is one for red."""
    model = built("resnet50", None, 64, seed=0).model
    kernel = np.zeros((7, 7, 3, 64), np.float32)
    kernel[3, 3, 2, 0] = 1  # red
    kernel[3, 3, 0, 1] = 0.5  # blue
    layer = model.get_layer("conv1_conv")
    layer.set_weights([kernel, np.zeros(64)])
    way, _convolution = filters.first_convolution(model) or ((), None)
    seen, mix = filters._what_it_sees(way, np.full((64, 64, 3), [10, 20, 30], np.uint8))
    np.testing.assert_allclose(mix, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(seen[32, 32], [30 - 103.939, 20 - 116.779, 10 - 123.68], atol=1e-4)
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[:, ::8, 0] = 200
    found = filters.filters(model, photo, tmp_path / "x.png")
    assert found[0].index == 0
    assert [item.strength for item in found[1:]] == [0] * 63
    assert {item.label for item in found[2:]} == {"nothing"}


def test_the_picture(keras: Any, tmp_path: Path):
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(8, 3), keras.layers.Flatten()])
    rng = np.random.default_rng(0)
    path = tmp_path / "filters.png"
    found = filters.filters(model, rng.integers(0, 256, (32, 32, 3), np.uint8), path)
    assert sorted(item.index for item in found) == list(range(8))
    assert [item.strength for item in found] == sorted((item.strength for item in found), reverse=True)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
    assert width > 6 * 2 * 100
    assert height > 2 * 100
    assert [item.name for item in tmp_path.iterdir()] == ["filters.png"]


def test_a_response_is_red_where_the_photo_is_like_the_kernel():
    response = np.zeros((5, 5))
    response[1, 1], response[3, 3] = 1, -1
    picture = filters._in_red_and_blue(response).astype(int)
    assert picture[1, 1, 0] > picture[1, 1, 2] + 100
    assert picture[3, 3, 2] > picture[3, 3, 0] + 100
    assert np.ptp(picture[0, 0]) == 0


def test_what_has_no_such_layer(keras: Any, tmp_path: Path):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(FinetuneError, match="no convolution that looks at the three colours"):
        filters.filters(model, np.zeros((8, 8, 3), np.uint8), tmp_path / "x.png")
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="photo of shape"):
        filters.filters(model, np.zeros((9, 8, 3), np.uint8), tmp_path / "x.png")
