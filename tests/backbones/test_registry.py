import dataclasses
import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.backbones import registry
from finetune_cli.keras_setup import import_keras


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


def factories(keras: Any) -> set[str]:
    return {name for name, value in inspect.getmembers(keras.applications, inspect.isfunction) if name[0].isupper()}


def test_the_table_is_complete(keras: Any):
    assert {info.factory for info in registry.TABLE.values() if info.factory} == factories(keras)
    assert len(registry.TABLE) == 41
    for name, info in registry.TABLE.items():
        assert name == info.name == name.lower()


def test_every_family_has_its_scaling(keras: Any):
    for info in registry.TABLE.values():
        if info.factory:
            module = getattr(keras.applications, info.family)
            assert getattr(keras.applications, info.factory).__module__.endswith("." + info.family)
            assert callable(module.preprocess_input)


def test_the_bundled_backbone_is_there():
    path = registry.TABLE[registry.BUNDLED].path
    assert path is not None
    assert path.is_file()
    assert path.is_relative_to(Path(registry.__file__).parents[1])


def graph(keras: Any, info: registry.BackboneInfo, **options: Any) -> Any:
    """The model without its weights: none is allocated in such a scope, in a thread that ends with it."""

    def make() -> Any:
        with keras.StatelessScope(initialize_variables=False):
            return getattr(keras.applications, info.factory)(**({"weights": None} | options))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


class Asked(Exception):
    """Keras wants a weight file."""


@pytest.fixture
def ask_keras(keras: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives (URL, name, digest) of the file that Keras would download, and builds nothing more."""
    from keras.src.utils import file_utils

    def get_file(fname: str, origin: str, cache_subdir: str, file_hash: str | None = None) -> None:
        assert cache_subdir == "models"
        raise Asked(origin, fname, file_hash)

    monkeypatch.setattr(file_utils, "get_file", get_file)

    def ask(info: registry.BackboneInfo, size: int) -> tuple[Any, ...]:
        with pytest.raises(Asked) as caught:
            graph(keras, info, weights="imagenet", include_top=False, input_shape=(size, size, 3))
        return caught.value.args

    return ask


# Small ones; the others are marked slow.
QUICK = ["mobilenetv3small", "resnet50", "resnet50v2", "vgg16"]


@pytest.mark.parametrize("name", QUICK)
def test_weight_file_and_digest(name: str, ask_keras: Any):
    info = registry.TABLE[name]
    assert info.published_weights(224) == ask_keras(info, 224)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.TABLE if name not in {*QUICK, registry.BUNDLED}])
def test_weight_file_and_digest_of_the_others(name: str, ask_keras: Any):
    info = registry.TABLE[name]
    assert info.published_weights(224) == ask_keras(info, 224)


@pytest.mark.filterwarnings("ignore:.*Weights for input shape:UserWarning")
@pytest.mark.parametrize("name", ["mobilenet", "mobilenetv2"])
@pytest.mark.parametrize(
    "size", [96, 100, 128, 320, *(pytest.param(size, marks=pytest.mark.slow) for size in (160, 192, 224))]
)
def test_files_that_depend_on_the_size(name: str, size: int, ask_keras: Any):
    info = registry.TABLE[name]
    assert info.published_weights(size) == ask_keras(info, size)


def size_of(keras: Any, info: registry.BackboneInfo) -> tuple[int, int]:
    """Features and parameters of the backbone for the smallest photos."""
    model = graph(keras, info, include_top=False, pooling="avg", input_shape=(info.min_size, info.min_size, 3))
    return model.output.shape[1], sum(math.prod(weight.shape) for weight in model.weights)


@pytest.mark.parametrize("name", QUICK)
def test_width_parameters_and_smallest_size(name: str, keras: Any):
    info = registry.TABLE[name]
    assert size_of(keras, info) == (info.width, info.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.TABLE if name not in {*QUICK, registry.BUNDLED}])
def test_width_parameters_and_smallest_size_of_the_others(name: str, keras: Any):
    info = registry.TABLE[name]
    assert size_of(keras, info) == (info.width, info.parameters)


def test_parameters_of_the_bundled_backbone(keras: Any):
    info = registry.TABLE[registry.BUNDLED]
    model = keras.models.load_model(info.path, compile=False)
    assert (model.output.shape[1], model.count_params()) == (info.width, info.parameters)


@pytest.mark.parametrize("name", ["inceptionv3", "inceptionresnetv2", "xception", "resnet50"])
def test_smaller_is_refused_by_keras(name: str, keras: Any):
    info = registry.TABLE[name]
    with pytest.raises(ValueError, match="at least"):
        size_of(keras, dataclasses.replace(info, min_size=info.min_size - 1))


# MobileNetV3 says "any size" where the others say 224.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in registry.TABLE if n != registry.BUNDLED and not n.startswith("mobilenetv3")]
)
def test_default_size(name: str, keras: Any):
    info = registry.TABLE[name]
    assert graph(keras, info).input_shape == (None, info.default_size, info.default_size, 3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ResNet50", "resnet50"),
        ("RESNET50", "resnet50"),
        ("resnet-50", "resnet50"),
        ("EfficientNetB0", "efficientnetb0"),
        ("efficientnet_b0", "efficientnetb0"),
        ("EfficientNetV2-S", "efficientnetv2s"),
        ("MobileNet_V3_Small", "mobilenetv3small"),
        ("convnext_tiny", "convnexttiny"),
        ("inception_v3", "inceptionv3"),
        ("EfficientNet-Lite0", "efficientnet_lite0"),
    ],
)
def test_other_spellings(name: str, meant: str):
    assert registry.find(name) is registry.TABLE[meant]


def test_every_name_of_keras_is_understood():
    for info in registry.TABLE.values():
        assert registry.find(info.factory or info.name) is info


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5", ["resnet50"]), ("mobilnetv2", ["mobilenetv2"]), ("resnet18", []), ("vit_b_16", [])]
)
def test_only_a_slip_of_the_pen_is_corrected(name: str, near: list[str]):
    assert registry.find(name) is None
    assert registry.similar(name)[:1] == near
