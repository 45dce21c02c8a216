"""Where a model is run: OpenVINO on the CPU, TensorFlow on a GPU, behind one small protocol.

A runtime takes ``uint8 (n, H, W, 3)`` RGB photos and gives ``float32 (n, K)``: features, or probabilities. `infer`
blocks and may be called from several threads at once; that is how decoding and inference overlap, see
`training/extract.py`.
"""

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files, signals
from finetune_cli.devices import Device, Precision, TrainingPolicy
from finetune_cli.errors import FinetuneError, RunError, StorageError, UsageError
from finetune_cli.keras_setup import import_keras
from finetune_cli.untrusted import openvino_ir

if TYPE_CHECKING:
    import openvino


# The driver of NVIDIA, that of its boards with an ARM processor, Windows's in its Linux subsystem, and that of AMD.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
# The first NVIDIA GPUs with bfloat16 (Ampere).
_BFLOAT16_SINCE = (8, 0)


class Runtime(Protocol):
    """A compiled model."""

    device: Device
    precision: Precision

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` -> ``float32 (n, K)``."""
        ...


def import_openvino() -> Any:
    """The `openvino` package, without its telemetry and, for a quick start, without its converter.

    On import, OpenVINO's telemetry starts a process that writes to the home directory and posts to an analytics
    server; without that package OpenVINO uses a stub of its own. The converter doubles the time of the import, and
    OpenVINO goes on without it; `convert` imports it when it is needed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules["openvino.tools.ovc"]
    return openvino


def _core() -> Any:
    """OpenVINO's core. Raises `UsageError` in a process that was forked off one that has it."""
    core, process = _first_core()
    _check_process(process)
    return core


def _check_process(process: int) -> None:
    # OpenVINO would wait for ever for its threads, which a fork does not copy.
    if process != os.getpid():
        raise UsageError(
            "OpenVINO was in use before this process was forked, and cannot run in it",
            "load the run in each process and in none before the fork, or start processes by `spawn` instead of `fork`",
        )


@functools.cache
def _first_core() -> tuple[Any, int]:
    """OpenVINO's core, one for the life of the process, and that process.

    Its CPU plugin gives the thread that loads it a signal stack, and takes that away with itself without looking
    whether it is still in use. When two such plugins end in the order in which they began, the thread is left with a
    signal stack that is no longer mapped, and the next signal kills the process.
    """
    return import_openvino().Core(), os.getpid()


class OpenVinoRuntime:
    """An OpenVINO model on the CPU.

    `latency`: all cores work on one call (a single photo); otherwise each call runs on one core, and as many threads
    as there are cores keep all of them busy, which is the fastest for many photos.
    """

    device: Device = "cpu"

    def __init__(
        self, model: "openvino.Model", precision: Precision = "float32", workers: int = 1, latency: bool = False
    ) -> None:
        ov = import_openvino()
        self.precision: Precision = precision
        # AUTO streams would leave the cores idle that the decoding threads do not need at that moment, and pinned
        # streams would fight with those threads for the same cores.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "ENABLE_CPU_PINNING": False,
        }
        settings |= (
            {"PERFORMANCE_HINT": "LATENCY"}
            if latency
            else {
                "NUM_STREAMS": workers,
                "INFERENCE_NUM_THREADS": workers,
            }
        )
        try:
            preprocess = ov.preprocess.PrePostProcessor(model)
            preprocess.input().tensor().set_element_type(ov.Type.u8)
            self._compiled = _core().compile_model(preprocess.build(), "CPU", settings)
        except RuntimeError as exc:
            raise RunError(f"OpenVINO cannot compile the model: {openvino_ir.reason(exc)}", openvino_ir.REMEDY) from exc
        # OpenVINO makes its tables of NumPy types at their first use, and gives up the interpreter's lock meanwhile:
        # two threads that come there together wait for each other for ever. So it is done before there are threads.
        ov.Tensor(np.zeros(1, ov.Type.u8.to_dtype()), shared_memory=True)
        self._local = threading.local()
        self._process = os.getpid()

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` -> ``float32 (n, K)``."""
        return self.infer_all(photos)[0]

    def infer_all(self, photos: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """``uint8 (n, H, W, 3)`` -> every output of the model, for models that have more than one."""
        _check_process(self._process)
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        try:
            request.infer([photos], share_inputs=True)
        except RuntimeError as exc:
            raise RunError(f"OpenVINO cannot run the model: {openvino_ir.reason(exc)}", openvino_ir.REMEDY) from exc
        return [
            np.array(request.get_output_tensor(i).data, dtype=np.float32) for i in range(len(self._compiled.outputs))
        ]


class TensorFlowRuntime:
    """A Keras model on the first GPU that TensorFlow sees.

    With precision `mixed`, TensorFlow's graph rewriter runs convolutions and matrix products in float16 and keeps
    the rest in float32 (https://www.tensorflow.org/guide/mixed_precision); the output is float32.
    """

    device: Device = "gpu"

    def __init__(self, model: Any, precision: Precision = "float32") -> None:
        import tensorflow as tf

        self.precision: Precision = precision
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": precision == "mixed"})
        self._function = tf.function(
            lambda photos: model(tf.cast(photos, tf.float32), training=False),
            input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)],
        )

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``uint8 (n, H, W, 3)`` -> ``float32 (n, K)``."""
        return np.asarray(self._function(photos), dtype=np.float32)


def choose_device(wanted: str) -> Device:
    """Decide once where the backbone runs: `auto` takes a GPU when TensorFlow sees one.

    Raises `UsageError` when `gpu` is demanded and there is none.
    """
    if wanted == "cpu":
        return "cpu"
    if _may_have_gpu():
        import_keras()  # which also makes TensorFlow keep quiet
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return "gpu"
    if wanted == "gpu":
        raise UsageError(
            "runtime.device is gpu, but TensorFlow sees no GPU",
            "install the extra with: pip install 'finetune-cli[gpu]', or set runtime.device: auto",
        )
    return "cpu"


def _may_have_gpu() -> bool:
    """Whether it is worth seconds to ask TensorFlow: on Linux, a GPU is reached through one of a few device files."""
    return sys.platform != "linux" or any(Path(driver).exists() for driver in _GPU_DRIVERS)


def training_precision(device: str, wanted: str) -> Precision:
    """The precision of training features for `runtime.feature_precision`; validation is always float32.

    Raises `UsageError` when bfloat16 is demanded of a CPU that has no such arithmetic.
    """
    if wanted == "float32":
        return "float32"
    if device == "gpu":
        return "mixed"
    has_bfloat16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if wanted == "bfloat16" and not has_bfloat16:
        raise UsageError(
            "runtime.feature_precision is bfloat16, but this CPU has no bfloat16 arithmetic",
            "set runtime.feature_precision: auto",
        )
    return "bfloat16" if has_bfloat16 else "float32"


def training_policy(device: Device, precision: Precision) -> TrainingPolicy:
    """The types in which Keras trains where features have this `precision`: bfloat16 where the hardware has it.

    A GPU without it trains in float16. What computes so on a CPU: `training/tuning/folded.py`.
    """
    if precision == "float32":
        return "float32"
    if device == "cpu":
        return "mixed_bfloat16"
    import tensorflow as tf

    # What a `TensorFlowRuntime` has asked for would also change what is measured in float32.
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return "mixed_bfloat16" if details.get("compute_capability", (0, 0)) >= _BFLOAT16_SINCE else "mixed_float16"


def out_of_memory(exc: Exception) -> bool:
    """Whether TensorFlow raised `exc` because a device has no memory left for what it was to compute."""
    if "tensorflow" not in sys.modules:
        return False
    import tensorflow as tf

    return isinstance(exc, tf.errors.ResourceExhaustedError)


@signals.deferred()
def convert(model: Any) -> "openvino.Model":
    """The OpenVINO form of a Keras model, in float32.

    Raises `FinetuneError` when OpenVINO lacks an operation, or when the result is nothing that `read_ir` would read.
    """
    convert_model = converter()
    try:
        with warnings.catch_warnings():
            # The converter calls the model with a tuple of one; Keras takes it, and grumbles.
            warnings.filterwarnings("ignore", message="The structure of `inputs` doesn't match")
            converted = convert_model(model)
    except Exception as exc:  # the converter raises dozens of unrelated types
        raise FinetuneError(
            f"OpenVINO cannot convert this backbone: {openvino_ir.reason(exc)}", "choose another model.backbone"
        ) from exc
    if foreign := openvino_ir.foreign_operations(converted):
        raise FinetuneError(
            f"this backbone is no plain feed-forward network: it needs {', '.join(foreign)}",
            "choose another model.backbone, without loops, branches or random numbers",
        )
    # Keras and OpenVINO number what has no name through the life of a process; equal models shall give equal files.
    converted.output().get_tensor().set_names({model.layers[-1].name})
    for i, node in enumerate(converted.get_ordered_ops()):
        if node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{i}")
    return converted


def converter() -> Callable[[Any], "openvino.Model"]:
    """OpenVINO's `convert_model`, ready for models and functions of TensorFlow."""
    ov = import_openvino()
    import tensorflow as tf
    from openvino.frontend.tensorflow import utils
    from openvino.tools.ovc import convert_model

    ov.convert_model = convert_model  # where its own front end looks for it
    # Its own way to find TensorFlow's version is an `exec` that sets a local variable, which Python 3.13 ended
    # (PEP 667; https://github.com/openvinotoolkit/openvino/pull/32482).
    utils.get_environment_setup = lambda _framework: {"tensorflow": tf.__version__}
    return convert_model  # type: ignore[no-any-return]


def save_ir(model: "openvino.Model", xml: Path, folder: Path, size: int) -> None:
    """Write an OpenVINO model as `xml` and the `.bin` file beside it.

    `folder`: what the error names, because `xml` may lie in a temporary one; `size`: about how many bytes are written.
    Raises `StorageError`.
    """
    try:
        import_openvino().save_model(model, xml, compress_to_fp16=False)
    except RuntimeError as exc:  # of a C++ stream, which does not say why
        files.free_space_check(folder.parent, size)
        raise StorageError(
            f"{folder} cannot be written ({files.human_bytes(size)} are needed)", "see the limit with: ulimit -f"
        ) from exc


def read_ir(xml: Path, part: "Callable[[openvino.Model], openvino.Model] | None" = None) -> "openvino.Model":
    """The OpenVINO model in `xml` and the `.bin` file beside it; `part` returns what is used of it, by default all.

    Raises `RunError` when it is damaged, or not such a model as `train` writes (see `untrusted/openvino_ir.py`).
    """
    return parse_ir(*openvino_ir.read_files(xml), xml, part)


def parse_ir(
    graph: bytes,
    weights: bytes,
    xml: Path,
    part: "Callable[[openvino.Model], openvino.Model] | None" = None,
) -> "openvino.Model":
    """As `read_ir`, of the bytes that were read from the file `xml` and the `.bin` file beside it.

    OpenVINO gets the bytes that were checked, and not the names of files, which may have changed since. It copies the
    weights (60 ms for 100 MB): a tensor that shares their memory would not keep them alive.
    """
    openvino_ir.check_ir(graph, len(weights), xml)
    try:
        model = _core().read_model(graph, weights)
        model = part(model) if part else model
    except RuntimeError as exc:
        raise RunError(
            f"{xml} cannot be read as an OpenVINO model: {openvino_ir.reason(exc)}", openvino_ir.REMEDY
        ) from exc
    openvino_ir.check_sizes(model, xml)
    return model
