import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from built import answers, built
from paths import SHARED, TESTS
from PIL import Image

from finetune_cli.backbones import build, registry, source
from finetune_cli.errors import ConfigError, WeightsError
from finetune_cli.files import sha256
from finetune_cli.inference.runtimes import OpenVinoRuntime, convert
from finetune_cli.keras_setup import import_keras

REFERENCE = TESTS / "data" / "efficientnet_lite0"
SHARED_REFERENCE = SHARED / "assets" / "efficientnet_lite0_reference.npz"
# One of each family, and the scaling that its pixels need, written out from the papers' code (float64, RGB 0 to 255).
CAFFE_MEAN = np.array([103.939, 116.779, 123.68])
FAMILIES = {
    "resnet50": lambda x: x[..., ::-1] - CAFFE_MEAN,
    "vgg16": lambda x: x[..., ::-1] - CAFFE_MEAN,
    "resnet50v2": lambda x: x / 127.5 - 1,
    "mobilenet": lambda x: x / 127.5 - 1,
    "mobilenetv2": lambda x: x / 127.5 - 1,
    "xception": lambda x: x / 127.5 - 1,
    "inceptionv3": lambda x: x / 127.5 - 1,
    "inceptionresnetv2": lambda x: x / 127.5 - 1,
    "nasnetmobile": lambda x: x / 127.5 - 1,
    "densenet121": lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "mobilenetv3small": lambda x: x,
    "efficientnetv2b0": lambda x: x,
    "convnexttiny": lambda x: x,
}
QUICK = {"resnet50", "mobilenetv3small"}
QUICKEST = {"mobilenetv3small"}
# All kinds of scaling, operations and ends; conversion takes too long for every family.
KINDS = [
    "resnet50",
    "mobilenetv3small",
    "densenet121",
    "convnexttiny",
    "efficientnetb0",
    "nasnetmobile",
    registry.BUNDLED,
]


def some(names: Any, quick: set[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


def pixels(size: int, count: int = 2) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.float32)


def spread_out(model: Any, seed: int = 0) -> None:
    """Weights of ordinary size in every layer: with fresh BatchNorms a deep model says nothing but 0.

    Larger ones would make a model chaotic: rounding alone would change what it says.
    """
    rng = np.random.default_rng(seed)
    layers = [layer for layer in model.layers if type(layer).__name__ != "Normalization"]
    for weight in (weight for layer in layers for weight in layer.weights):
        depthwise = len(weight.shape) == 4 and weight.shape[-1] == 1
        inputs = np.prod(weight.shape[:2] if depthwise else weight.shape[:-1])
        values = rng.normal(0, 1.3 / np.sqrt(inputs) if len(weight.shape) > 1 else 0.1, weight.shape)
        weight.assign(1 + np.abs(values) if weight.path.endswith(("variance", "gamma")) else values)


@pytest.mark.parametrize("name", some(FAMILIES, QUICK))
def test_pixels_are_scaled_inside(name: str, keras: Any):
    size = 96
    backbone = built(name, None, size, seed=1)
    spread_out(backbone.model)
    info = registry.TABLE[name]
    shape = (size, size, 3)
    plain = getattr(keras.applications, info.factory)(weights=None, include_top=False, pooling="avg", input_shape=shape)
    plain.set_weights(backbone.model.get_weights())
    photos = pixels(size)
    wanted = answers(plain, FAMILIES[name](photos.astype(np.float64)).astype(np.float32))
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01 * np.abs(wanted).max()  # the photos matter
    np.testing.assert_allclose(answers(backbone.model, photos), wanted, rtol=1e-4, atol=1e-4 * wanted.max())
    assert wanted.shape == (2, info.width)


@pytest.mark.parametrize("name", some(KINDS, QUICKEST))
def test_the_graph_survives_saving_and_conversion(name: str, keras: Any, tmp_path: Path):
    """Stock layers only: the file loads in safe mode without this package, and OpenVINO agrees."""
    backbone = built(name, "imagenet" if name == registry.BUNDLED else None, 96, seed=1)
    if name != registry.BUNDLED:
        spread_out(backbone.model)
    photos = pixels(96)
    wanted = answers(backbone.model, photos)
    backbone.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True, compile=False)
    np.testing.assert_array_equal(answers(loaded, photos), wanted)
    runtime = OpenVinoRuntime(convert(backbone.model))
    np.testing.assert_allclose(
        runtime.infer(photos.astype(np.uint8)), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("name", some(KINDS, QUICKEST))
def test_feature_map(name: str, keras: Any):
    backbone = built(name, None, 96, seed=1)
    tensor = build.feature_map_tensor(backbone.model)
    assert backbone.feature_map == (name != "convnexttiny") == (tensor is not None)
    if tensor is not None:
        both = keras.Model(backbone.model.input, [backbone.model.output, tensor])
        features, maps = answers(both, pixels(96))
        assert maps.ndim == 4
        np.testing.assert_allclose(maps.mean((1, 2)), features, rtol=1e-4, atol=1e-5 * np.abs(features).max())


def write_h5(path: Path, model: Any) -> Path:
    """The layout of the published weight files."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([layer.name.encode() for layer in model.layers])
        for layer in model.layers:
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = np.array([weight.path.encode() for weight in layer.weights])
            for weight in layer.weights:
                group[weight.path] = weight.numpy()
    return path


def test_efficientnet_is_built_as_keras_builds_it_for_imagenet(keras: Any, tmp_path: Path, monkeypatch: Any):
    """Keras's own `weights="imagenet"`, with a file of ours in the place of the download, is what we must equal."""
    source = keras.applications.EfficientNetB0(weights=None, include_top=False, input_shape=(64, 64, 3))
    spread_out(source)
    source.layers[2].set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.052, 0.05, 0.051]), np.array(0)])
    file = write_h5(tmp_path / "efficientnetb0_notop.h5", source)

    from keras.src.utils import file_utils

    monkeypatch.setattr(file_utils, "get_file", lambda *args, **kwargs: str(file))
    theirs = keras.applications.EfficientNetB0(
        weights="imagenet", include_top=False, pooling="avg", input_shape=(64, 64, 3)
    )
    photos = pixels(64)
    wanted = answers(theirs, photos)
    ours = built("efficientnetb0", file, 64, seed=0)
    np.testing.assert_allclose(answers(ours.model, photos), wanted, rtol=1e-5, atol=1e-5)
    # The trap: the graph that Keras builds for a local file is another.
    naive = keras.applications.EfficientNetB0(
        weights=str(file), include_top=False, pooling="avg", input_shape=(64, 64, 3)
    )
    assert np.abs(answers(naive, photos) - wanted).max() > 0.01 * np.abs(wanted).max()
    assert ours.weights_sha256 == sha256(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.TABLE if name != registry.BUNDLED])
def test_graph_equals_the_one_that_keras_builds_for_imagenet(name: str, keras: Any, monkeypatch: Any):
    """For every backbone: the same layers, with the same settings, in the same order."""
    from keras.src.models import Functional
    from keras.src.utils import file_utils

    monkeypatch.setattr(file_utils, "get_file", lambda *args, **kwargs: "none")
    monkeypatch.setattr(Functional, "load_weights", lambda *args: None)
    info = registry.TABLE[name]

    def both() -> tuple[Any, Any]:
        # No weights are allocated in such a scope, in a thread that ends with it.
        with keras.StatelessScope(initialize_variables=False):
            theirs = getattr(keras.applications, info.factory)(
                weights="imagenet", include_top=False, pooling="avg", input_shape=(224, 224, 3)
            )
            base = build._base(keras, info, 224, random_weights=False)
            return build._from_pixels(keras, info, base, 224), theirs

    with ThreadPoolExecutor(1) as thread:
        ours, theirs = thread.submit(both).result()

    def steps(model: Any) -> list[tuple[str, str]]:
        found = []
        for layer in model.layers[1:]:
            config = layer.get_config()
            for key in ("name", "trainable", "layers"):
                config.pop(key, None)
            found.append((type(layer).__name__, json.dumps(config, sort_keys=True, default=str)))
        return found

    assert steps(ours) == steps(theirs)


def test_bundled_backbone_gives_the_reference_features(keras: Any):
    photos = np.stack([np.asarray(Image.open(path)) for path in sorted(REFERENCE.glob("*.png"))])
    backbone = built(registry.BUNDLED, "imagenet", 224, seed=0)
    features = answers(backbone.model, photos.astype(np.float32))
    np.testing.assert_allclose(features, np.load(REFERENCE / "features.npy"), atol=2e-5)
    assert (backbone.width, backbone.feature_map) == (1280, True)
    assert backbone.weights_sha256 == sha256(registry.TABLE[registry.BUNDLED].path)


def test_bundled_backbone_on_real_photos(keras: Any):
    if not SHARED_REFERENCE.is_file():
        pytest.skip(f"no reference: {SHARED_REFERENCE} is absent")
    reference = np.load(SHARED_REFERENCE)
    backbone = built(registry.BUNDLED, "imagenet", 224, seed=0)
    features = answers(backbone.model, reference["images"].astype(np.float32))
    np.testing.assert_allclose(features, reference["features"], atol=2e-5)


def test_bundled_backbone_at_another_size(keras: Any):
    """The same weights on more positions: a photo of one colour gives nearly the same features at both sizes."""
    small, large = (built(registry.BUNDLED, "imagenet", size, seed=0) for size in (224, 320))
    assert large.model.input.shape == (None, 320, 320, 3)
    assert small.fingerprint == large.fingerprint
    tensor = build.feature_map_tensor(large.model)
    assert tensor is not None
    assert tuple(tensor.shape) == (None, 10, 10, 1280)
    for one, other in zip(small.model.get_weights(), large.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_everything_is_frozen_and_called_for_inference(keras: Any):
    backbone = built("mobilenetv3small", None, 64, seed=0)
    assert backbone.model.trainable_weights == []
    calls = [node for layer in backbone.model.get_config()["layers"] for node in layer["inbound_nodes"]]
    modes = [node["kwargs"]["training"] for node in calls if "training" in node["kwargs"]]
    assert len(modes) > 50
    assert not any(modes)


def test_random_weights_follow_the_seed_and_leave_the_global_generators_alone():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global generator is what is tested
    wanted = (random.random(), np.random.random())  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    first, again, other = (built("mobilenetv3small", None, 64, seed) for seed in (7, 7, 8))
    assert (random.random(), np.random.random()) == wanted  # noqa: NPY002
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.weights_sha256 is None


FINGERPRINTS = """
from finetune_cli.backbones import build
from finetune_cli.backbones.source import Wanted
print(build.build(Wanted("mobilenetv3small", None, 96, seed=7)).fingerprint)
print(build.build(Wanted("efficientnet_lite0", "imagenet", 224, seed=0)).fingerprint)
"""


def test_fingerprint_is_the_same_in_another_process_and_depends_on_every_weight(keras: Any):
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS], env=environment, check=True, capture_output=True, text=True
    )
    larger, bundled = done.stdout.split()
    backbone = built("mobilenetv3small", None, 64, seed=7)
    assert backbone.fingerprint == larger
    assert built(registry.BUNDLED, "imagenet", 224, seed=0).fingerprint == bundled
    info = registry.TABLE["mobilenetv3small"]
    for weight in (backbone.model.weights[0], backbone.model.weights[-1]):
        before = weight.numpy()
        changed = before.copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], 9)
        weight.assign(changed)
        assert build._fingerprint(info, backbone.model) != larger
        weight.assign(before)
    assert build._fingerprint(info, backbone.model) == larger


class TestKerasFile:
    def save(self, keras: Any, path: Path, *layers: Any, size: int | None = None) -> Path:
        keras.Sequential([keras.Input((size, size, 3)), *layers]).save(path)
        return path

    def test_a_file_of_ones_own(self, keras: Any, tmp_path: Path):
        path = self.save(
            keras,
            tmp_path / "mine.keras",
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalAveragePooling2D(),
        )
        backbone = built(path, "imagenet", 40, seed=0)
        assert (backbone.name, backbone.width, backbone.feature_map) == ("mine", 4, True)
        assert backbone.weights_sha256 == sha256(path)
        photos = pixels(40)
        wanted = answers(keras.models.load_model(path), photos)
        np.testing.assert_allclose(answers(backbone.model, photos), wanted, rtol=1e-6)
        assert built(str(path), "imagenet", 64, seed=0).fingerprint == backbone.fingerprint

    def test_a_model_inside_a_model(self, keras: Any, tmp_path: Path):
        inner = keras.Sequential([keras.Input((40, 40, 3)), keras.layers.Conv2D(4, 3)])
        path = self.save(keras, tmp_path / "x.keras", inner, keras.layers.GlobalAveragePooling2D(), size=40)
        assert built(path, "imagenet", 40, seed=0).feature_map

    def test_pooling_that_is_not_the_end(self, keras: Any, tmp_path: Path):
        pool, dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)
        backbone = built(self.save(keras, tmp_path / "x.keras", pool, dense), "imagenet", 40, seed=0)
        assert (backbone.width, backbone.feature_map) == (5, False)

    def test_half_precision_gives_float32_features(self, keras: Any, tmp_path: Path):
        path = self.save(keras, tmp_path / "x.keras", keras.layers.GlobalAveragePooling2D(dtype="float16"))
        assert built(path, "imagenet", 40, seed=0).model.output.dtype == "float32"

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            (lambda k: [k.layers.Conv2D(4, 3)], WeightsError, "not one vector per photo"),
            (lambda k: [k.layers.GlobalAveragePooling2D(), k.layers.Reshape((1, 3))], WeightsError, "not one vector"),
        ],
    )
    def test_models_that_are_not_backbones(self, keras: Any, tmp_path: Path, layers: Any, error: Any, message: str):
        path = self.save(keras, tmp_path / "x.keras", *layers(keras))
        with pytest.raises(error, match=message) as caught:
            built(path, "imagenet", 40, seed=0)
        assert "x.keras" in caught.value.problem

    def test_inputs_that_are_not_photos(self, keras: Any, tmp_path: Path):
        keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]).save(tmp_path / "row.keras")
        with pytest.raises(WeightsError, match=r"takes \(None, 7\), not photos"):
            built(tmp_path / "row.keras", "imagenet", 40, seed=0)
        first, second = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
        keras.Model([first, second], keras.layers.Flatten()(first + second)).save(tmp_path / "two.keras")
        with pytest.raises(WeightsError, match="not a model of one input and one output"):
            built(tmp_path / "two.keras", "imagenet", 40, seed=0)

    def test_another_size_is_a_config_error(self, keras: Any, tmp_path: Path):
        path = self.save(keras, tmp_path / "x.keras", keras.layers.GlobalAveragePooling2D(), size=64)
        with pytest.raises(ConfigError, match=r"image.size is 224, but .*x.keras takes photos of 64 x 64 pixels"):
            built(path, "imagenet", 224, seed=0)

    def test_weights_have_no_effect(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"model.weights has no effect with a .keras file"):
            built(tmp_path / "x.keras", None, 224, seed=0)

    def test_an_absent_one(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="no weight file"):
            built(tmp_path / "x.keras", "imagenet", 224, seed=0)


def test_the_error_for_an_unknown_name_says_how_to_list_the_names():
    with pytest.raises(ConfigError, match="there is no backbone") as caught:
        source.resolve("qqqq")
    assert caught.value.remedy == "list them with: finetune backbones; or give the path of a .keras file"
    with pytest.raises(ConfigError) as caught:
        source.resolve("convnxt_tiny")
    assert caught.value.remedy.startswith("did you mean convnexttiny? ")


def test_resolve():
    info = source.resolve("resnet50")
    assert (info.width, info.default_size, info.min_size) == (2048, 224, 32)
    info = source.resolve("models/mine.keras")
    assert (info.name, info.path, info.width) == ("mine", Path("models/mine.keras"), None)


def test_too_small_a_size():
    with pytest.raises(ConfigError, match=r"image.size: xception needs at least 71 pixels, not 64"):
        built("xception", None, 64, seed=0)


def test_pinned_weights(tmp_path: Path):
    digest = sha256(registry.TABLE[registry.BUNDLED].path)
    assert built(registry.BUNDLED, "imagenet", 64, 0, weights_sha256=digest.upper()).weights_sha256 == digest
    with pytest.raises(WeightsError, match=f"has SHA-256 {digest}, not {'0' * 64}"):
        built(registry.BUNDLED, "imagenet", 64, 0, weights_sha256="0" * 64)
    with pytest.raises(ConfigError, match="no effect with random weights"):
        built("resnet50", None, 64, 0, weights_sha256=digest)
    with pytest.raises(WeightsError, match=r"no weight file .*absent.h5"):
        built("resnet50", tmp_path / "absent.h5", 64, 0)


def test_the_cache_of_keras_is_used(keras: Any, tmp_path: Path, monkeypatch: Any):
    """A file put where the offline error says is found, its layers taken in Keras's order, its hash recorded."""
    source = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(96, 96, 3), pooling="avg")
    spread_out(source)
    name = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"
    (tmp_path / "models").mkdir()
    file = write_h5(tmp_path / "models" / name, source)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    backbone = built("mobilenetv2", "imagenet", 96, seed=0)
    assert all(map(np.array_equal, backbone.model.get_weights(), source.get_weights()))
    assert backbone.weights_sha256 == sha256(file)


def test_no_tensorflow_at_import():
    script = """
import sys
import finetune_cli.backbones.build
from finetune_cli.backbones import source
source.resolve("resnet50")
print([name for name in ("tensorflow", "keras", "h5py") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
