"""The table of backbones: what each is called, how wide its features are, and which file holds its weights.

Every classifier of `keras.applications`, under its lower-case name, and the bundled one. Plain data: nothing heavy is
imported. `tests/backbones/test_registry.py` compares every row with the installed Keras.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BUNDLED = "efficientnet_lite0"
_SITE = "https://storage.googleapis.com/"
_FOLDER = "tensorflow/keras-applications/{family}"
_FOLDERS = {"efficientnet": "keras-applications", "resnet_v2": "tensorflow/keras-applications/resnet"}
# Weight files by family; `name` is the backbone's, `variant` what remains of it without the family's. The families that
# are not listed use `_CLASSIC`.
_CLASSIC = "{name}_weights_tf_dim_ordering_tf_kernels_notop.h5"
_FILES = {
    "convnext": "convnext_{variant}_notop.h5",
    "efficientnet": "{name}_notop.h5",
    "efficientnet_v2": "efficientnetv2-{variant}_notop.h5",
    "inception_resnet_v2": "inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
    "inception_v3": "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    "mobilenet": "mobilenet_1_0_{size}_tf_no_top.h5",
    "mobilenet_v2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5",
    "mobilenet_v3": "weights_mobilenet_v3_{variant}_224_1.0_float_no_top_v2.h5",
    "nasnet": "nasnet_{variant}_no_top.h5",
}
_REMOTE_FILES = {"nasnet": "NASNet-{variant}-no-top.h5"}  # where the cache has another name than the site
# MobileNet 1 and 2 were published once per input size; for another size Keras takes the file for 224.
_SIZES = {"mobilenet": (128, 160, 192, 224), "mobilenet_v2": (96, 128, 160, 192, 224)}
_MIN_SIZES = {"inception_resnet_v2": 75, "inception_v3": 75, "xception": 71}


class PublishedWeights(NamedTuple):
    """A weight file that Keras publishes; `name`: in Keras's cache. `digest`: MD5 or SHA-256, if it is known."""

    url: str
    name: str
    digest: str | None

    @property
    def path(self) -> Path:
        """Where Keras stores the file, whether it is there or not."""
        return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser() / "models" / self.name


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """One backbone.

    `factory` and `family`: the function and the module (with `preprocess_input`) in `keras.applications`, empty for a
    `.keras` file, which has a `path` instead. `width`: the number of features D, `parameters`: the number of weights
    without the classification top; `None` if only the file knows.
    `default_size` and `min_size`: pixels of a side. `digest`: of the published weights, MD5 or SHA-256, from Keras.
    """

    name: str
    factory: str = ""
    family: str = ""
    width: int | None = None
    parameters: int | None = None
    default_size: int = 224
    min_size: int = 32
    digest: str | None = None
    path: Path | None = None

    def published_weights(self, size: int) -> PublishedWeights:
        """The ImageNet weights, without classification top, for photos of `size` pixels."""
        values = {
            "name": self.name,
            "family": self.family,
            "variant": self.name.removeprefix(self.family.replace("_", "")),
            "size": size if size in _SIZES.get(self.family, ()) else 224,
        }
        name = _FILES.get(self.family, _CLASSIC)
        folder, remote = _FOLDERS.get(self.family, _FOLDER), _REMOTE_FILES.get(self.family, name)
        return PublishedWeights(f"{_SITE}{folder}/{remote}".format(**values), name.format(**values), self.digest)


# Function, module, width, parameters, default size, digest of the weight file (without the classification top).
_ROWS: tuple[tuple[str, str, int, int, int, str | None], ...] = (
    (
        "ConvNeXtTiny",
        "convnext",
        768,
        27_820_128,
        224,
        "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
    ),
    (
        "ConvNeXtSmall",
        "convnext",
        768,
        49_454_688,
        224,
        "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab",
    ),
    (
        "ConvNeXtBase",
        "convnext",
        1024,
        87_566_464,
        224,
        "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45",
    ),
    (
        "ConvNeXtLarge",
        "convnext",
        1536,
        196_230_336,
        224,
        "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd",
    ),
    (
        "ConvNeXtXLarge",
        "convnext",
        2048,
        348_147_968,
        224,
        "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05",
    ),
    ("DenseNet121", "densenet", 1024, 7_037_504, 224, "30ee3e1110167f948a6b9946edeeb738"),
    ("DenseNet169", "densenet", 1664, 12_642_880, 224, "b8c4d4c20dd625c148057b9ff1c1176b"),
    ("DenseNet201", "densenet", 1920, 18_321_984, 224, "c13680b51ded0fb44dff2d8f86ac8bb1"),
    ("EfficientNetB0", "efficientnet", 1280, 4_049_571, 224, "50bc09e76180e00e4465e1a485ddc09d"),
    ("EfficientNetB1", "efficientnet", 1280, 6_575_239, 240, "74c4e6b3e1f6a1eea24c589628592432"),
    ("EfficientNetB2", "efficientnet", 1408, 7_768_569, 260, "111f8e2ac8aa800a7a99e3239f7bfb39"),
    ("EfficientNetB3", "efficientnet", 1536, 10_783_535, 300, "af6d107764bb5b1abb91932881670226"),
    ("EfficientNetB4", "efficientnet", 1792, 17_673_823, 380, "ebc24e6d6c33eaebbd558eafbeedf1ba"),
    ("EfficientNetB5", "efficientnet", 2048, 28_513_527, 456, "38879255a25d3c92d5e44e04ae6cec6f"),
    ("EfficientNetB6", "efficientnet", 2304, 40_960_143, 528, "9ecce42647a20130c1f39a5d4cb75743"),
    ("EfficientNetB7", "efficientnet", 2560, 64_097_687, 600, "cbcfe4450ddf6f3ad90b1b398090fe4a"),
    ("EfficientNetV2B0", "efficientnet_v2", 1280, 5_919_312, 224, "893217f2bb855e2983157299931e43ff"),
    ("EfficientNetV2B1", "efficientnet_v2", 1280, 6_931_124, 240, "0e80663031ca32d657f9caa404b6ec37"),
    ("EfficientNetV2B2", "efficientnet_v2", 1408, 8_769_374, 260, "1dfe2e7a5d45b6632553a8961ea609eb"),
    ("EfficientNetV2B3", "efficientnet_v2", 1536, 12_930_622, 300, "f6abf7b5849ac99a89b50dd3fd532856"),
    ("EfficientNetV2S", "efficientnet_v2", 1280, 20_331_360, 384, "af0682fb74e8c54910f2d4393339c070"),
    ("EfficientNetV2M", "efficientnet_v2", 1280, 53_150_388, 480, "1b8dc055df72dde80d614482840fe342"),
    ("EfficientNetV2L", "efficientnet_v2", 1280, 117_746_848, 480, "b0b66b5c863aef5b46e8608fe1711615"),
    ("InceptionResNetV2", "inception_resnet_v2", 1536, 54_336_736, 299, "d19885ff4a710c122648d3b5c3b684e4"),
    ("InceptionV3", "inception_v3", 2048, 21_802_784, 299, "bcbd6486424b2319ff4ef7d526e38f63"),
    ("MobileNet", "mobilenet", 1024, 3_228_864, 224, None),
    ("MobileNetV2", "mobilenet_v2", 1280, 2_257_984, 224, None),
    ("MobileNetV3Large", "mobilenet_v3", 960, 2_996_352, 224, "07fb09a5933dd0c8eaafa16978110389"),
    ("MobileNetV3Small", "mobilenet_v3", 576, 939_120, 224, "d3e8ec802a04aa4fc771ee12a9a9b836"),
    ("NASNetLarge", "nasnet", 4032, 84_916_818, 331, "d81d89dc07e6e56530c4e77faddd61b5"),
    ("NASNetMobile", "nasnet", 1056, 4_269_716, 224, "1ed92395b5b598bdda52abe5c0dbfd63"),
    ("ResNet50", "resnet", 2048, 23_587_712, 224, "4d473c1dd8becc155b73f8504c6f6626"),
    ("ResNet101", "resnet", 2048, 42_658_176, 224, "88cf7a10940856eca736dc7b7e228a21"),
    ("ResNet152", "resnet", 2048, 58_370_944, 224, "ee4c566cf9a93f14d82f913c2dc6dd0c"),
    ("ResNet50V2", "resnet_v2", 2048, 23_564_800, 224, "fac2f116257151a9d068a22e544a4917"),
    ("ResNet101V2", "resnet_v2", 2048, 42_626_560, 224, "c0ed64b8031c3730f411d2eb4eea35b5"),
    ("ResNet152V2", "resnet_v2", 2048, 58_331_648, 224, "ed17cf2e0169df9d443503ef94b23b33"),
    ("VGG16", "vgg16", 512, 14_714_688, 224, "6d6bbae143d832006294945121d1f1fc"),
    ("VGG19", "vgg19", 512, 20_024_384, 224, "253f8cb515780f3b799900260a226db6"),
    ("Xception", "xception", 2048, 20_861_480, 299, "b0042744bf5b25fce3cb969f33bebb97"),
)


def _table() -> dict[str, BackboneInfo]:
    path = Path(__file__).parents[1] / "assets" / f"{BUNDLED}.keras"
    bundled = BackboneInfo(BUNDLED, width=1280, parameters=3_413_024, path=path)
    table = {BUNDLED: bundled}
    for factory, family, width, parameters, size, digest in _ROWS:
        name, min_size = factory.lower(), _MIN_SIZES.get(family, 32)
        table[name] = BackboneInfo(name, factory, family, width, parameters, size, min_size, digest)
    return table


TABLE = _table()
_BY_SPELLING = {name.replace("_", ""): info for name, info in TABLE.items()}


def find(name: str) -> BackboneInfo | None:
    """The backbone called `name` in any spelling: `ResNet50`, `resnet-50` and `resnet_50` are `resnet50`."""
    return _BY_SPELLING.get(_spelling(name))


def similar(name: str) -> list[str]:
    """The names of backbones that `name` may be a typing error of; most often none."""
    near = difflib.get_close_matches(_spelling(name), _BY_SPELLING, n=3, cutoff=0.88)
    return [_BY_SPELLING[match].name for match in near]


def _spelling(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "-_. ")
