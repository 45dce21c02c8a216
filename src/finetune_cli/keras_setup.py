"""Imports Keras in the one state that every model of this package is built in.

One backend, channels last, float32: a user's ``keras.json`` or environment must not change what a model
computes. Nothing is written: Keras would create ``~/.keras/keras.json`` at import. Nothing is printed: TensorFlow
writes a page about oneDNN and missing GPU libraries straight to the error stream, whatever its log level.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

from finetune_cli.errors import FinetuneError

# Keras imports these when they are installed, for features that this package does not use: 1.5 of 4 seconds.
_UNUSED = ("matplotlib", "sklearn")
# Lines of the C++ logger, and the sentence that it puts before the first one.
_LOGGER_LINE = re.compile(rb"[IWE]\d{4} \d|WARNING: All log messages before absl|To enable the following instructions")


_backend = "tensorflow"


def choose_backend(name: Literal["tensorflow", "openvino"]) -> None:
    """Let `import_keras` import Keras on this backend; for a process of its own, because a process has one Keras."""
    global _backend  # noqa: PLW0603 - as Keras's own backend
    _backend = name


def import_keras() -> ModuleType:
    """Import and return `keras` (some seconds the first time), quiet, with this package's settings.

    The backend is TensorFlow unless `choose_backend` chose another.

    Raises `FinetuneError` if Keras was imported before on another backend.
    """
    if "keras" not in sys.modules:
        with _keras_home(os.devnull), _absent(_UNUSED), _logger_silenced():
            _first_import()
    import keras

    if keras.config.backend() != _backend:
        raise FinetuneError(
            f"Keras is already loaded with the {keras.config.backend()} backend", f"start with KERAS_BACKEND={_backend}"
        )
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")
    module: ModuleType = keras
    return module


def _first_import() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # 3: nothing below FATAL, once TensorFlow is imported
    os.environ["KERAS_BACKEND"] = _backend
    import keras  # noqa: F401  (imported for its effect)

    if _backend != "tensorflow":
        return
    import tensorflow as tf

    # float32 means float32, on newer GPUs, too: the saved model is compared with its numbers to 1e-4.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.get_logger().setLevel("ERROR")  # no advice on retracing; our models are traced as often as they must be
    # The search for a GPU happens at the first operation and prints as much: do it while the output is silenced.
    tf.config.list_physical_devices()


@contextlib.contextmanager
def _keras_home(folder: str) -> Iterator[None]:
    """Point Keras's home at `folder`: at the null device, it neither reads ``keras.json`` nor creates it."""
    before = os.environ.get("KERAS_HOME")
    os.environ["KERAS_HOME"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["KERAS_HOME"]
        else:
            os.environ["KERAS_HOME"] = before


@contextlib.contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Let imports of `names` fail, as if they were not installed, unless they are imported already."""
    blocked = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None is Python's mark for "no such module"
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]


@contextlib.contextmanager
def _logger_silenced() -> Iterator[None]:
    """Hold back the error stream of the process; afterwards print all that is not from TensorFlow's C++ logger."""
    try:
        stream = os.dup(2)
    except OSError:  # no error stream at all
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            captured.seek(0)
            for line in captured:
                if not _LOGGER_LINE.match(line):
                    os.write(2, line)
