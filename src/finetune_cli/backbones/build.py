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
from finetune_cli.backbones import weights as weight_files
from finetune_cli.backbones.registry import BUNDLED, BackboneInfo
from finetune_cli.backbones.source import Wanted, find_source
from finetune_cli.errors import ConfigError, WeightsError
from finetune_cli.files import has_digest
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

    `info`: its row of the table. `fingerprint`: hexadecimal, the same for the same architecture and weights in every
    process and on every machine (the input size is not part of it). `weights_sha256`: of the weight file, if there was
    one. `feature_map`: whether the features are the mean over the positions of the last feature map, and nothing else.
    `original`: the fingerprint that it had as it was built, before any fine-tuning.
    """

    info: BackboneInfo
    model: "keras.Model"
    width: int
    fingerprint: str
    weights_sha256: str | None
    feature_map: bool
    original: str

    @property
    def name(self) -> str:
        """What the table calls it, or the name of its file without the suffix."""
        return self.info.name

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return int(self.model.count_params())


def with_weights_of(backbone: Backbone, path: Path) -> Backbone:
    """`backbone` with the weights of the same one inside the classifier `path`; the model itself changes.

    Raises `WeightsError` when the file holds no such backbone.
    """
    loaded = load_keras_file(path)
    inner = [layer for layer in loaded.layers if hasattr(layer, "layers")]
    with signals.deferred():
        try:
            (found,) = inner
            backbone.model.set_weights(found.get_weights())
        except ValueError as exc:
            raise WeightsError(f"{path} holds no {backbone.name}", "give a run that `finetune train` made") from exc
        return with_changed_weights(backbone)


def build(wanted: Wanted, advance: Advance = ignore_progress) -> Backbone:
    """Build a backbone; `advance` counts the megabytes of a download.

    Raises `ConfigError` and `WeightsError`.
    """
    source = find_source(wanted, advance)
    info = source.info
    file = source.file if source.file != info.path else None  # a model file brings its weights itself
    published = file is not None and (
        wanted.weights == "imagenet" or (info.digest is not None and has_digest(file, info.digest))
    )
    keras = import_keras()
    with signals.deferred():
        with _drawn_from(wanted.seed):
            base = _base(keras, info, wanted.size, random_weights=wanted.weights is None)
        if file is not None:
            weight_files.load_into(base, file, in_order=published)
        model = _from_pixels(keras, info, base, wanted.size)
        fingerprint = _fingerprint(info, model)
        return Backbone(
            info=info,
            model=model,
            width=int(model.output.shape[-1]),
            fingerprint=fingerprint,
            weights_sha256=source.sha256,
            feature_map=feature_map_tensor(model) is not None,
            original=fingerprint,
        )


def with_changed_weights(backbone: Backbone) -> Backbone:
    """`backbone` with the fingerprint of the weights that it has now."""
    return replace(backbone, fingerprint=_fingerprint(backbone.info, backbone.model))


def feature_map_tensor(model: "keras.Model") -> "keras.KerasTensor | None":
    """The tensor ``(N, h, w, D)`` whose mean over h and w is the output of `model`; `None` if the end is another."""
    keras = import_keras()
    operation, node = model.output._keras_history[:2]
    if not isinstance(operation, keras.layers.GlobalAveragePooling2D) or operation.keepdims:
        return None
    return operation._inbound_nodes[node].input_tensors[0]


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
