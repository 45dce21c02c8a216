"""The form `savedmodel`: what TensorFlow Serving loads, with three signatures.

    serving_default  image        float32 (N, H, W, 3) RGB 0..255, any H and W
    serve_uint8      image        uint8   (N, H, W, 3)
    serve_bytes      image_bytes  string  (N,) JPEG or PNG files

Each answers `probabilities` float32 (N, C), `label` string (N,), and `class_names` string (N, C). `serve_bytes` also
answers `status` string (N,): "ok", or why a file was refused, whose label is empty and whose probabilities are 0; the
others of the same request are answered. Resizing and decoding are inside (`tf_photos.py`), so the folder works wherever
TensorFlow does, without this package.
"""

import uuid
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from finetune_cli.errors import StorageError, WeightsError
from finetune_cli.exports.card import Card
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature, Source, quiet
from finetune_cli.text import first_line


class SavedModel:
    """Writes and opens the folder of one version."""

    name: ClassVar[str] = "savedmodel"
    exact = True
    options: ClassVar[dict[str, str]] = {}

    def write(self, source: Source, folder: Path) -> None:
        """Write the SavedModel into `folder`."""
        model, card = source.model, source.card
        import tensorflow as tf

        module = tf.Module()
        # The variables alone: the Keras objects around them would make the loader look for Keras.
        module.weights = [variable.value for variable in model.variables]
        functions = _functions(tf, model, card)
        try:
            with quiet():
                concrete = {name: function.get_concrete_function() for name, function in functions.items()}
                tf.saved_model.save(module, str(folder), concrete)
        except tf.errors.OpError as exc:  # TensorFlow's own file system reports its faults like this
            problem = f"TensorFlow cannot write the model: {first_line(exc).rpartition('; ')[2]}"
            raise StorageError(problem, "free some space and run the same command again") from exc
        _make_uuid_reproducible(folder / "fingerprint.pb")

    @staticmethod
    def open(path: Path, workers: int, latency: bool = False) -> Opened:  # noqa: ARG004 - TensorFlow shares out its work by itself
        """The SavedModel in the folder `path`. Raises `WeightsError` when TensorFlow cannot load it."""
        return OpenedSavedModel(path)


def _make_uuid_reproducible(path: Path) -> None:
    """Put a UUID made of the file's hashes in place of the random one, so that equal models give equal files."""
    from tensorflow.core.protobuf import fingerprint_pb2

    fingerprint = fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    fingerprint.uuid = ""
    fingerprint.uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, fingerprint.SerializeToString(deterministic=True).hex()).int)
    path.write_bytes(fingerprint.SerializeToString(deterministic=True))


def _functions(tf: Any, model: Any, card: Card) -> dict[str, Any]:
    from finetune_cli.exports.tf_photos import OK, PhotoGraph

    graph = PhotoGraph(card.settings)
    names = tf.constant([name.encode("utf-8", "surrogateescape") for name in card.classes])

    def function(python: Any, *spec: Any) -> Any:
        return tf.function(python, input_signature=[tf.TensorSpec(*spec)], autograph=False)

    # A function, so that the model is traced, written and loaded once, and not once for each signature.
    classify = function(lambda photos: model(photos, training=False), (None, *model.input_shape[1:]), tf.float32)

    def answer(photos: Any) -> dict[str, Any]:
        probabilities = classify(photos)
        return {
            "probabilities": probabilities,
            "label": tf.gather(names, tf.argmax(probabilities, axis=1)),
            "class_names": tf.tile(names[tf.newaxis], [tf.shape(probabilities)[0], 1]),
        }

    def answer_files(image_bytes: Any) -> dict[str, Any]:
        photos, status = graph.decoded_or_refused(image_bytes)
        good, answered = tf.equal(status, OK), answer(photos)
        return answered | {
            "probabilities": tf.where(good[:, tf.newaxis], answered["probabilities"], 0),
            "label": tf.where(good, answered["label"], ""),
            "status": status,
        }

    pixels = (None, None, None, 3)
    return {
        "serving_default": function(lambda image: answer(graph.fitted(image)), pixels, tf.float32, "image"),
        "serve_uint8": function(lambda image: answer(graph.fitted(image)), pixels, tf.uint8, "image"),
        "serve_bytes": function(answer_files, (None,), tf.string, "image_bytes"),
    }


class OpenedSavedModel:
    """A SavedModel in TensorFlow."""

    def __init__(self, folder: Path) -> None:
        from finetune_cli.keras_setup import import_keras

        card = Card.read(folder)
        self.classes, self.settings = card.classes, card.settings
        import_keras()  # not needed here; it brings TensorFlow in without its noise
        import tensorflow as tf

        self._tf = tf
        try:
            with quiet():
                self._model = tf.saved_model.load(str(folder))
            self._signatures = {name: self._model.signatures[name] for name in SIGNATURES}
        except (OSError, KeyError, ValueError, tf.errors.OpError) as exc:
            raise WeightsError(f"{folder} cannot be loaded as a SavedModel: {first_line(exc)}", "export again") from exc

    def probabilities(self, photos: Pixels) -> Floats:
        """``uint8 (n, h, w, 3)`` RGB -> ``float32 (n, C)``."""
        answer = self._signatures["serve_uint8"](image=self._tf.constant(photos))
        return np.asarray(answer["probabilities"])

    def signatures(self) -> tuple[Signature, ...]:
        """All three."""
        return (
            Signature("serving_default", "pixels", self._from_floats, any_size=True),
            Signature("serve_uint8", "pixels", self.probabilities, any_size=True),
            Signature("serve_bytes", "bytes", self._from_bytes),
        )

    def _from_floats(self, photos: Pixels) -> Floats:
        answer = self._signatures["serving_default"](image=self._tf.constant(photos.astype(np.float32)))
        return np.asarray(answer["probabilities"])

    def _from_bytes(self, encoded: list[bytes]) -> Floats:
        answer = self._signatures["serve_bytes"](image_bytes=self._tf.constant(encoded))
        return np.asarray(answer["probabilities"])


SIGNATURES = ("serving_default", "serve_uint8", "serve_bytes")
