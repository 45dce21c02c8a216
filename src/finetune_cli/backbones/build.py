"""The backbones: a table of names, and the builder that turns one into a model from raw pixels to features.

Whatever the backbone, the model takes ``float32 (N, size, size, 3)`` RGB pixels of 0 to 255 and gives ``float32 (N,
D)``. The scaling that it was trained with is inside, made of stock layers and operations, and every layer is called
with ``training=False``. Its layers belong to two graphs (Keras's own and this one), so `layer.output` is the wrong
tensor here; `feature_map_tensor` gives the right one, and a saved and loaded model has one graph.
"""

import contextlib
import hashlib
import json
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_cli import signals
from finetune_cli.backbones import download
from finetune_cli.backbones import weights as weight_files
from finetune_cli.backbones.registry import BUNDLED, BackboneInfo, find, similar
from finetune_cli.errors import ConfigError, WeightsError
from finetune_cli.files import sha256
from finetune_cli.keras_setup import import_keras
from finetune_cli.progress import Advance, ignore_progress
from finetune_cli.untrusted.keras_archive import load_keras_file

if TYPE_CHECKING:
    import keras

# EfficientNetB0 to B7: the published weights expect pixels divided by the root of this once more; Keras adds it only
# when it loads those weights itself (https://github.com/tensorflow/tensorflow/issues/49930).
_EFFICIENTNET_STDDEV = (0.229, 0.224, 0.225)
_PHOTO_TO_VECTOR = "give a model that turns photos (None, height, width, 3) into one vector each"


@dataclass(frozen=True)
class Backbone:
    """A frozen model ``float32 (N, size, size, 3)`` pixels -> ``float32 (N, width)`` features, and its identity.

    `fingerprint`: hexadecimal, the same for the same architecture and weights in every process and on every machine
    (the input size is not part of it). `weights_sha256`: of the weight file, if there was one. `feature_map`: whether
    the features are the mean over the positions of the last feature map, and nothing else. `original`: the fingerprint
    that it had as it was built, before any fine-tuning.
    """

    name: str
    model: "keras.Model"
    width: int
    fingerprint: str
    weights_sha256: str | None
    feature_map: bool
    original: str

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return int(self.model.count_params())


def with_weights_of(backbone: Backbone, name_or_path: str | Path, path: Path) -> Backbone:
    """`backbone`, which `build` made of `name_or_path`, with the weights of the same one inside the classifier `path`.

    The model itself changes. Raises `WeightsError` when the file holds no such backbone.
    """
    loaded = load_keras_file(path)
    inner = [layer for layer in loaded.layers if hasattr(layer, "layers")]
    with signals.deferred():
        try:
            (found,) = inner
            backbone.model.set_weights(found.get_weights())
        except ValueError as exc:
            raise WeightsError(f"{path} holds no {backbone.name}", "give a run that `finetune train` made") from exc
        return with_changed_weights(backbone, name_or_path)


def resolve(name_or_path: str | Path) -> BackboneInfo:
    """The table row of a backbone, in any spelling; a path that ends in ``.keras`` gives a row of its own.

    Raises `ConfigError` for an unknown name, with the closest known names.
    """
    name = str(name_or_path)
    if name.endswith(".keras"):
        return BackboneInfo(Path(name).stem, path=Path(name))
    info = find(name)
    if info is None:
        near = similar(name)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"model.backbone: there is no backbone {name!r}",
            f"{meant}list them with: finetune backbones; or give the path of a .keras file",
        )
    return info


@dataclass(frozen=True)
class Source:
    """What a backbone is built from: its row of the table, and its weight file with the SHA-256 of that, if any."""

    info: BackboneInfo
    file: Path | None
    sha256: str | None


def find_source(
    name_or_path: str | Path,
    weights: str | Path | None,
    size: int,
    weights_sha256: str | None = None,
    advance: Advance = ignore_progress,
) -> Source:
    """Find out, without Keras, what `build` would build from; the arguments and the errors are those of `build`."""
    info = resolve(name_or_path)
    if size < info.min_size:
        raise ConfigError(f"image.size: {info.name} needs at least {info.min_size} pixels, not {size}", "raise it")
    if info.path is not None and info.name != BUNDLED and weights != "imagenet":
        raise ConfigError("model.weights has no effect with a .keras file, which brings its own", "delete the key")
    file = weight_file(name_or_path, weights, size)
    if weights == "imagenet" and info.path is None:
        file = download.find_imagenet(info, size, advance)
    return Source(info, file, _checked_digest(file, weights_sha256))


def build(
    name_or_path: str | Path,
    weights: str | Path | None,
    size: int,
    seed: int,
    weights_sha256: str | None = None,
    advance: Advance = ignore_progress,
) -> Backbone:
    """Build a backbone for photos of `size` by `size` pixels.

    `weights`: ``"imagenet"`` (for the bundled backbone and for a `.keras` file: its own), a weight file, or `None` for
    random ones drawn from `seed`. `weights_sha256`: what the weight file must be. `advance` counts the
    megabytes of a download. Raises `ConfigError` and `WeightsError`.
    """
    source = find_source(name_or_path, weights, size, weights_sha256, advance)
    info, file = source.info, source.file
    keras = import_keras()
    with signals.deferred():
        with _drawn_from(seed):
            base = _base(keras, info, size, random_weights=weights is None)
        if file is not None and file != info.path:
            known = weights == "imagenet" or (info.digest is not None and download.has_digest(file, info.digest))
            weight_files.load_into(base, file, in_order=known)
        model = _from_pixels(keras, info, base, size)
        fingerprint = _fingerprint(info, model)
        return Backbone(
            name=info.name,
            model=model,
            width=int(model.output.shape[-1]),
            fingerprint=fingerprint,
            weights_sha256=source.sha256,
            feature_map=feature_map_tensor(model) is not None,
            original=fingerprint,
        )


def with_changed_weights(backbone: Backbone, name_or_path: str | Path) -> Backbone:
    """`backbone`, which `build` made of `name_or_path`, with the fingerprint of the weights that it has now."""
    return replace(backbone, fingerprint=_fingerprint(resolve(name_or_path), backbone.model))


def weight_file(name_or_path: str | Path, weights: str | Path | None, size: int) -> Path | None:
    """The file that `build` takes the weights from, whether it is there or not; `None` for random ones."""
    if weights is None:
        return None
    info = resolve(name_or_path)
    return (info.path or download.imagenet_path(info, size)) if weights == "imagenet" else Path(weights)


def feature_map_tensor(model: "keras.Model") -> "keras.KerasTensor | None":
    """The tensor ``(N, h, w, D)`` whose mean over h and w is the output of `model`; `None` if the end is another."""
    keras = import_keras()
    operation, node = model.output._keras_history[:2]
    if not isinstance(operation, keras.layers.GlobalAveragePooling2D) or operation.keepdims:
        return None
    return operation._inbound_nodes[node].input_tensors[0]


def _checked_digest(file: Path | None, wanted: str | None) -> str | None:
    """SHA-256 of the weight file. Raises `WeightsError` if it is not the wanted one."""
    if file is None:
        if wanted is not None:
            raise ConfigError("model.weights_sha256 has no effect with random weights", "delete the key")
        return None
    if not file.is_file():
        raise WeightsError(f"no weight file {file}", "check model.backbone and model.weights")
    digest = sha256(file)
    if wanted is not None and digest != wanted.lower():
        raise WeightsError(f"{file} has SHA-256 {digest}, not {wanted.lower()}", "check model.weights_sha256")
    return digest


@contextlib.contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Keras takes the seeds of its initializers from Python's global generator: seed that, and put it back."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _base(keras: Any, info: BackboneInfo, size: int, random_weights: bool) -> Any:
    """The model before the pixels are scaled for it: what the weight file belongs to."""
    if info.name == BUNDLED:
        bundled = keras.models.load_model(info.path, safe_mode=True, compile=False)
        return keras.models.clone_model(bundled) if random_weights else bundled
    if info.path is not None:
        model = load_keras_file(info.path)
        _require_photo_to_vector(keras, model, info.path, size)
        return model
    factory = getattr(keras.applications, info.factory)
    return factory(weights=None, include_top=False, pooling="avg", input_shape=(size, size, 3))


def _require_photo_to_vector(keras: Any, model: Any, path: Path, size: int) -> None:
    if not isinstance(model, keras.Model) or not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise WeightsError(f"{path} is not a model of one input and one output", _PHOTO_TO_VECTOR)
    shape, output = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
    if len(shape) != 4 or shape[3] != 3:
        raise WeightsError(f"{path} takes {shape}, not photos (None, height, width, 3)", _PHOTO_TO_VECTOR)
    if len(output) != 2 or output[1] is None:
        raise WeightsError(f"{path} gives {output}, not one vector per photo", "end it with GlobalAveragePooling2D")
    if shape[1] not in {None, size} or shape[2] not in {None, size}:
        raise ConfigError(
            f"image.size is {size}, but {path} takes photos of {shape[1]} x {shape[2]} pixels", "set it to that"
        )


def _from_pixels(keras: Any, info: BackboneInfo, base: Any, size: int) -> Any:
    """Put the scaling in front of `base`, with its layers and weights, and freeze all of it."""
    pixels = keras.Input((size, size, 3), name="image")
    scaled = pixels
    if info.family:
        scaled = getattr(keras.applications, info.family).preprocess_input(pixels)
    if info.family == "efficientnet":
        base = _with_second_scaling(keras, base)
    # `call`, not `__call__`: the layers become part of this graph one by one, not as one nested model.
    features = base.call(scaled, training=False)
    if features.dtype != "float32":
        features = keras.ops.cast(features, "float32")
    model = keras.Model(pixels, features, name=info.name)
    model.trainable = False
    return model


def _with_second_scaling(keras: Any, base: Any) -> Any:
    """EfficientNetB0 to B7 as Keras builds them for the published weights; see `_EFFICIENTNET_STDDEV`."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        if isinstance(layer, keras.layers.Normalization):
            outputs = keras.layers.Rescaling([1.0 / np.sqrt(value) for value in _EFFICIENTNET_STDDEV])(outputs)
        return outputs

    return keras.models.clone_model(base, clone_function=lambda layer: layer, call_function=call)


def _fingerprint(info: BackboneInfo, model: Any) -> str:
    """SHA-256 over what builds the graph and over every weight in its order; names depend on the process."""
    digest = hashlib.sha256(b"finetune-cli backbone 1\n")
    if info.factory:
        digest.update(f"keras.applications.{info.factory}\n".encode())
    elif info.name == BUNDLED:
        digest.update(f"{BUNDLED}\n".encode())
    elif info.path is not None:
        with zipfile.ZipFile(info.path) as archive:
            digest.update(json.dumps(json.loads(archive.read("config.json"))["config"], sort_keys=True).encode())
    for weight in model.weights:
        values = np.ascontiguousarray(weight.numpy())
        digest.update(f"\n{values.dtype.newbyteorder('<').str} {values.shape}\n".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
