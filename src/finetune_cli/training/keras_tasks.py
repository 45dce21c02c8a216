"""The program of the process that `keras_process.py` starts: what Keras does beside a training."""

import contextlib
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import keras_setup, streams
from finetune_cli.backbones.source import Wanted
from finetune_cli.errors import FinetuneError
from finetune_cli.inference.runtimes import OpenVinoRuntime, import_openvino
from finetune_cli.training import converted
from finetune_cli.training.keras_process import Backend, receive, send
from finetune_cli.untrusted.keras_archive import load_keras_file


def serve(backend: Backend, scratch: str | None = None) -> None:
    """The program of the process: import Keras on `backend`, answer requests until there are no more.

    `scratch`: a folder for temporary files, to be removed in the end, because a killed training cannot do that.
    """
    streams.prepare()
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    failed: Exception | None = None
    try:
        import_openvino()  # before Keras does, without its telemetry
        keras_setup.choose_backend(backend)
        keras_setup.import_keras()
    except Exception as exc:  # noqa: BLE001 - told in answer to the first request
        failed = exc
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            message, photos = receive(requests)
            try:
                if failed is not None:
                    raise failed
                arguments = message["arguments"] if photos is None else {**message["arguments"], "photos": photos}
                array = TASKS[message["task"]](**arguments)
            except FinetuneError as exc:
                send(answers, {"error": type(exc).__name__, "problem": exc.problem, "remedy": exc.remedy})
            except Exception as exc:  # noqa: BLE001 - the training is told, whatever it is
                traceback.print_exc()
                problem = f"Keras failed in its own process: {type(exc).__name__}: {exc}".splitlines()[0]
                send(answers, {"error": "FinetuneError", "problem": problem, "remedy": "please report the lines above"})
            else:
                send(answers, {}, array)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


_making: Iterator[Path] = iter(())


def _convert(cache: str, key: str, wanted: Mapping[str, Any]) -> NDArray[np.uint8] | None:
    """Begin `converted.making`. The name of the folder that it yields, as bytes; `None` if it yields nothing."""
    global _making  # noqa: PLW0603 - `_prove` goes on with it
    _making = converted.making(Path(cache), key, Wanted(**wanted))
    folder = next(_making, None)
    return None if folder is None else np.frombuffer(os.fsencode(folder.resolve()), np.uint8)


def _prove() -> None:
    """The rest of what `_convert` began."""
    for _graph in _making:
        pass


def _probabilities(model: str, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the file `model` answers for ``uint8 (n, H, W, 3)`` photos, loaded by Keras: ``float32 (n, C)``."""
    runtime = OpenVinoRuntime(
        _traced(keras_setup.import_keras(), load_keras_file(Path(model))), "float32", latency=True
    )
    return np.concatenate([runtime.infer(photo[None]) for photo in photos])


def _traced(keras: Any, model: Any) -> Any:
    """The OpenVINO graph that `model` is when Keras runs on OpenVINO.

    Keras itself would compile that graph in the precision that OpenVINO likes best, which may be bfloat16.
    """
    from openvino import Model, Type, opset8

    pixels = opset8.parameter([-1, *model.input_shape[1:]], Type.f32)
    answer = model(keras.ops.convert_to_tensor(pixels.output(0)), training=False)
    return Model([opset8.result(answer.output)], [pixels])


TASKS: dict[str, Callable[..., NDArray[Any] | None]] = {
    "convert": _convert,
    "prove": _prove,
    "probabilities": _probabilities,
}
