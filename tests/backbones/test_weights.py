from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from built import answers

from finetune_cli.backbones import weights
from finetune_cli.errors import WeightsError
from finetune_cli.keras_setup import import_keras

SIZE = 64


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


def randomize(model: Any, seed: int) -> None:
    """Give every weight its own values (a fresh model has all BatchNorms alike, which would hide exchanged ones)."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        values = []
        for weight in layer.weights:
            spread = 1.0 / np.sqrt(max(1, np.prod(weight.shape[:-1]))) if len(weight.shape) > 1 else 0.1
            values.append(rng.normal(0, spread, weight.shape).astype(np.float32))
            if weight.path.endswith(("variance", "gamma")):
                values[-1] = 1 + np.abs(values[-1])
        if values:
            layer.set_weights(values)


def new_resnet(keras: Any, **options: Any) -> Any:
    shape = {} if options.get("include_top") else {"pooling": "avg", "input_shape": (SIZE, SIZE, 3)}
    return keras.applications.ResNet50(weights=None, **({"include_top": False} | shape | options))


@pytest.fixture(scope="module")
def resnet(keras: Any) -> Any:
    """A ResNet50 whose every weight is distinguishable: the source of the files below."""
    model = new_resnet(keras)
    randomize(model, 1)
    return model


@pytest.fixture(scope="module")
def blank(keras: Any) -> Any:
    """A ResNet50 to load into."""
    return new_resnet(keras)


@pytest.fixture(scope="module")
def small(keras: Any) -> Any:
    """A small source, for the many files that must be refused; one layer has a name that Keras made up."""
    pixels = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv1_conv")(pixels)
    x = keras.layers.BatchNormalization(name="conv1_bn")(x)
    x = keras.layers.Conv2D(4, 3, name="conv2_conv")(x)
    x = keras.layers.Conv2D(4, 3)(x)
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x))
    randomize(model, 3)
    return model


@pytest.fixture
def small_target(keras: Any, small: Any) -> Any:
    """The same architecture with other weights, and another made-up name."""
    return keras.models.clone_model(small)


@pytest.fixture
def target(blank: Any) -> Any:
    """The blank ResNet50 with other weights than the source's."""
    for weight in blank.weights:
        weight.assign(np.full(weight.shape, 0.5, np.float32))
    return blank


def features(model: Any) -> Any:
    photos = np.random.default_rng(0).normal(0, 60, (2, SIZE, SIZE, 3)).astype(np.float32)
    return answers(model, photos)


@pytest.fixture(scope="module")
def wanted(resnet: Any) -> Any:
    return features(resnet)


def write_legacy(path: Path, layers: list[tuple[str, list[tuple[str, Any]]]], group: str = "/") -> Path:
    """The layout that Keras 1 and 2 wrote: layer_names, and in each group weight_names and the arrays."""
    with h5py.File(path, "w") as file:
        root = file.require_group(group)
        root.attrs["layer_names"] = np.array([name.encode() for name, _ in layers])
        root.attrs["backend"] = b"tensorflow"
        for name, arrays in dict(layers).items():
            inner = root.create_group(name)
            inner.attrs["weight_names"] = np.array([key.encode() for key, _ in arrays])
            for key, values in arrays:
                inner[key] = values
    return path


def layers_2016() -> Iterator[tuple[str, str]]:
    """(name of 2016, name of today) of ResNet50's layers in the order of the old files, written out from the paper."""
    yield "input_1", ""
    yield "zeropadding2d_1", ""
    yield "conv1", "conv1_conv"
    yield "bn_conv1", "conv1_bn"
    for stage, blocks in ((2, "abc"), (3, "abcd"), (4, "abcdef"), (5, "abc")):
        for number, block in enumerate(blocks, 1):
            old, new = f"{stage}{block}_branch", f"conv{stage}_block{number}_"
            for branch, index in (("2a", 1), ("2b", 2)):
                yield f"res{old}{branch}", f"{new}{index}_conv"
                yield f"bn{old}{branch}", f"{new}{index}_bn"
            # The third convolution stands before the shortcut here; today's Keras has them the other way round.
            yield f"res{old}2c", f"{new}3_conv"
            if block == "a":
                yield f"res{old}1", f"{new}0_conv"
            yield f"bn{old}2c", f"{new}3_bn"
            if block == "a":
                yield f"bn{old}1", f"{new}0_bn"


def arrays_2016(name: str, layer: Any) -> list[tuple[str, Any]]:
    suffixes = ("W", "b") if len(layer.weights) == 2 else ("gamma", "beta", "running_mean", "running_std")
    return [(f"{name}_{suffix}:0", values) for suffix, values in zip(suffixes, layer.get_weights(), strict=True)]


def file_2016(path: Path, model: Any, top: bool = False, group: str = "/") -> Path:
    layers = [(old, arrays_2016(old, model.get_layer(new)) if new else []) for old, new in layers_2016()]
    if top:
        layers.append(("fc1000", [("fc1000_W:0", np.ones((2048, 1000))), ("fc1000_b:0", np.ones(1000))]))
    return write_legacy(path, layers, group)


def file_of_today(path: Path, model: Any, change: Any = lambda layers: layers) -> Path:
    layers = [(item.name, [(w.path, w.numpy()) for w in item.weights]) for item in model.layers]
    return write_legacy(path, change(layers))


def test_the_shortcut_and_the_third_convolution_have_one_shape_and_different_values(resnet: Any):
    """Without this, the test of the old names would not see them exchanged."""
    shortcut, third = (resnet.get_layer(f"conv2_block1_{n}_conv").get_weights()[0] for n in (0, 3))
    assert shortcut.shape == third.shape == (1, 1, 64, 256)
    assert np.abs(shortcut - third).max() > 0.1


@pytest.mark.parametrize("top", [False, True])
def test_a_file_with_the_names_of_2016(tmp_path: Path, resnet: Any, target: Any, wanted: Any, top: bool):
    path = file_2016(tmp_path / "resnet50_weights_tf_dim_ordering_tf_kernels.h5", resnet, top)
    weights.load_into(target, path)
    np.testing.assert_allclose(features(target), wanted, rtol=1e-5, atol=1e-5)


def test_keras_itself_refuses_the_file_of_2016(tmp_path: Path, resnet: Any, target: Any):
    """If this fails one day, the mapping may have become unnecessary."""
    with pytest.raises(ValueError, match="Shape mismatch"):
        target.load_weights(file_2016(tmp_path / "old.h5", resnet))


def test_a_file_with_the_names_of_today(tmp_path: Path, resnet: Any, target: Any, wanted: Any):
    weights.load_into(target, file_of_today(tmp_path / "new.h5", resnet))
    np.testing.assert_array_equal(features(target), wanted)


def same_weights(model: Any, other: Any) -> bool:
    return all(map(np.array_equal, model.get_weights(), other.get_weights()))


def test_the_order_in_a_file_does_not_matter(tmp_path: Path, small: Any, small_target: Any):
    weights.load_into(small_target, file_of_today(tmp_path / "x.h5", small, lambda layers: layers[::-1]))
    assert same_weights(small_target, small)


def test_names_that_keras_made_up_differ_and_are_matched_in_order(tmp_path: Path, keras: Any, small: Any):
    other = keras.models.clone_model(small, clone_function=renamed_if_automatic)
    assert {layer.name for layer in other.layers} != {layer.name for layer in small.layers}
    weights.load_into(other, file_of_today(tmp_path / "x.h5", small))
    assert same_weights(other, small)


def renamed_if_automatic(layer: Any) -> Any:
    config = layer.get_config()
    if layer.name.startswith("conv2d"):
        config["name"] = "conv2d_4711"
    return type(layer).from_config(config)


def test_in_order_ignores_the_names(tmp_path: Path, small: Any, small_target: Any):
    def renamed(layers: Any) -> Any:
        return [(f"layer{i}", arrays) for i, (_, arrays) in enumerate(layers)]

    path = file_of_today(tmp_path / "x.h5", small, renamed)
    with pytest.raises(WeightsError, match="lacks 3 layers: conv1_conv, conv1_bn, conv2_conv"):
        weights.load_into(small_target, path)
    weights.load_into(small_target, path, in_order=True)
    assert same_weights(small_target, small)


def test_a_whole_model_saved_by_keras_2(tmp_path: Path, resnet: Any, target: Any, wanted: Any):
    weights.load_into(target, file_2016(tmp_path / "model.h5", resnet, top=True, group="model_weights"))
    np.testing.assert_allclose(features(target), wanted, rtol=1e-5, atol=1e-5)


def test_keras_3_weights(tmp_path: Path, resnet: Any, target: Any, wanted: Any):
    resnet.save_weights(tmp_path / "x.weights.h5")
    weights.load_into(target, tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(features(target), wanted)


def test_keras_3_weights_with_top(tmp_path: Path, keras: Any, target: Any):
    whole = new_resnet(keras, include_top=True)
    randomize(whole, 2)
    whole.save_weights(tmp_path / "top.weights.h5")
    weights.load_into(target, tmp_path / "top.weights.h5")
    for layer in (layer for layer in target.layers if layer.weights):
        for got, expected in zip(layer.get_weights(), whole.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_keras_3_weights_whose_names_contradict_their_numbers(tmp_path: Path, small: Any, small_target: Any):
    small.save_weights(tmp_path / "x.weights.h5")
    with h5py.File(tmp_path / "x.weights.h5", "r+") as file:
        first, second = file["layers/conv2d/vars"], file["layers/conv2d_1/vars"]
        first.attrs["name"], second.attrs["name"] = second.attrs["name"], first.attrs["name"]
    with pytest.raises(WeightsError, match="layers/conv2d is conv2_conv there, conv1_conv here"):
        weights.load_into(small_target, tmp_path / "x.weights.h5")


def without(name: str) -> Any:
    return lambda layers: [layer for layer in layers if layer[0] != name]


def with_arrays(name: str, arrays: Any) -> Any:
    return lambda layers: [(key, arrays(dict(old).values()) if key == name else old) for key, old in layers]


BROKEN = {
    "missing": (without("conv1_bn"), "lacks layer conv1_bn"),
    "unknown in the middle": (
        lambda layers: [*layers[:2], ("strange", [("w", np.zeros(3))]), *layers[2:]],
        "has unknown layer strange|holds 1 arrays",
    ),
    "too long a top": (
        lambda layers: layers + [(f"extra{i}", [("w", np.zeros(3))]) for i in range(4)],
        "has unknown 4 layers: extra0",
    ),
    "twice": (lambda layers: layers[1:3] + layers[1:], "has unknown 2 layers"),
    "another shape": (
        with_arrays("conv1_conv", lambda old: [("kernel", np.zeros((3, 3, 1, 4))), ("bias", np.zeros(4))]),
        r"kernel has shape \(3, 3, 1, 4\), expected \(3, 3, 3, 4\)",
    ),
    "an array less": (with_arrays("conv1_bn", lambda old: [("a", np.zeros(4))]), "conv1_bn holds 1 arrays"),
    "not finite": (
        with_arrays("conv1_bn", lambda old: [(str(i), np.full(4, np.nan)) for i in range(4)]),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, small: Any, small_target: Any, case: str):
    change, message = BROKEN[case]
    path = file_of_today(tmp_path / "broken.h5", small, change)
    with pytest.raises(WeightsError, match=message) as caught:
        weights.load_into(small_target, path)
    assert str(path) in caught.value.problem
    assert "\n" not in caught.value.problem


def test_a_file_of_another_architecture_is_refused(tmp_path: Path, keras: Any, target: Any):
    other = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(SIZE, SIZE, 3))
    file_of_today(tmp_path / "other.h5", other)
    with pytest.raises(WeightsError, match=r"lacks 106 layers: conv1_conv, .* and has unknown 104 layers: Conv1"):
        weights.load_into(target, tmp_path / "other.h5")
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(WeightsError, match=r"lacks .* layers: layers/|has shape"):
        weights.load_into(target, tmp_path / "other.weights.h5")


@pytest.mark.parametrize("name", ["x.h5", "x.weights.h5"])
def test_a_truncated_file_is_refused(tmp_path: Path, small: Any, small_target: Any, name: str, record_property: Any):
    path = tmp_path / name
    if name == "x.h5":
        file_of_today(path, small)
    else:
        small.save_weights(path)
    data = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(data[: len(data) * sixteenth // 16])
        with pytest.raises(WeightsError, match="damaged or not an HDF5 file"):
            weights.load_into(small_target, path)
    record_property("tries", 16)


def test_a_file_without_weights_is_refused(tmp_path: Path, small_target: Any):
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(WeightsError, match="holds no Keras weights"):
        weights.load_into(small_target, tmp_path / "empty.h5")


def test_a_link_in_the_place_of_a_layer_is_refused(tmp_path: Path, small: Any, small_target: Any):
    path = file_of_today(tmp_path / "x.h5", small)
    with h5py.File(path, "r+") as file:
        del file["conv1_conv"]
        file["conv1_conv"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(WeightsError, match="conv1_conv is a link"):
        weights.load_into(small_target, path)


def test_groups_that_contain_themselves_end(tmp_path: Path, small_target: Any):
    with h5py.File(tmp_path / "loop.weights.h5", "w") as file:
        group = file.create_group("layers/functional")
        group["layers"] = file["layers"]
    with pytest.raises(WeightsError, match="lacks 4 layers"):
        weights.load_into(small_target, tmp_path / "loop.weights.h5")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("conv1", "conv1_conv"),
        ("bn_conv1", "conv1_bn"),
        ("res2a_branch2a", "conv2_block1_1_conv"),
        ("bn2a_branch1", "conv2_block1_0_bn"),
        ("res4f_branch2b", "conv4_block6_2_conv"),
        ("res5c_branch2c", "conv5_block3_3_conv"),
        ("res6a_branch2a", "res6a_branch2a"),
        ("fc1000", "fc1000"),
    ],
)
def test_names_of_2016(old: str, new: str):
    assert weights.modern_name(old) == new
