"""Keras in a process of its own, beside the one that trains.

Keras takes seconds to import, and a process has one backend for good. So what a training needs of Keras is done beside
it: a backbone that the cache lacks is converted on TensorFlow, and the saved `model.keras` is proven on OpenVINO, which
Keras imports in a third of the time and which is ready by the time that the file is there. Neither sees a GPU, which
belongs to the training.

Requests go to its standard input and answers come back from its standard output: a line of JSON, and where it says so
an array in NumPy's format. The process ends when its input does, so it does not outlive the training for long.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import ConfigError, FinetuneError, GateError, RunError, StorageError, WeightsError

Backend = Literal["tensorflow", "openvino"]
# What `converted.make` and the loading of a model raise, by name.
_ERRORS: dict[str, type[FinetuneError]] = {
    kind.__name__: kind for kind in (ConfigError, FinetuneError, GateError, RunError, StorageError, WeightsError)
}


class KerasProcess:
    """A process that runs Keras on `backend`; started by `start`, ended when the block ends."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._senders: list[threading.Thread] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the process at once: what it writes is whole or not there, whenever that happens."""
        if self._process is not None:
            self._process.kill()
            for sender in self._senders:
                sender.join()
            self._process.communicate()
        if self._scratch is not None:
            self._scratch.cleanup()

    def start(self) -> None:
        """Begin to import Keras; returns at once. Raises `FinetuneError` when no process can be started."""
        # TensorFlow leaves its generated code in temporary files when it is killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from finetune_cli.training import keras_tasks; "
            f"keras_tasks.serve({self._backend!r}, {self._scratch.name!r})"
        )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and a program that stands above
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TMPDIR": self._scratch.name},
                # Ctrl-C reaches every process in the foreground; this one is ended by the training, after that unwound.
                process_group=None if os.name == "nt" else 0,
            )
        except OSError as exc:
            raise FinetuneError(
                f"no process for Keras can be started with {sys.executable}: {exc.strerror}",
                "allow this user to run that file, and more processes",
            ) from exc

    def request(self, task: str, arguments: Mapping[str, Any], photos: NDArray[np.uint8] | None = None) -> None:
        """Ask for the `task`, one of `keras_tasks.TASKS`, and return at once; `answer` waits for it."""
        assert self._process is not None
        stream = self._process.stdin
        assert stream is not None

        def ask() -> None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and `answer` will say so
                send(stream, {"task": task, "arguments": dict(arguments)}, photos)

        # Photos are more than a pipe holds, and the process reads nothing before it has imported Keras.
        self._senders.append(threading.Thread(target=ask))
        self._senders[-1].start()

    def answer(self) -> NDArray[Any] | None:
        """What the oldest request gives. Raises the error that it ended with, or `FinetuneError` if the process did."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            message, array = receive(self._process.stdout)
        except EOFError as exc:
            code = self._process.wait()
            raise FinetuneError(
                f"the process that runs Keras ended unexpectedly (exit code {code})",
                "its last messages may say why; code -9 often means that the memory was full",
            ) from exc
        if "error" in message:
            raise _ERRORS.get(message["error"], FinetuneError)(message["problem"], message["remedy"])
        return array


def send(stream: IO[bytes], message: Mapping[str, Any], array: NDArray[Any] | None = None) -> None:
    """Write a message, and the array that belongs to it. Raises `BrokenPipeError`."""
    data = b""
    if array is not None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        data = buffer.getvalue()
    stream.write(json.dumps({**message, "array_bytes": len(data)}).encode() + b"\n" + data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], NDArray[Any] | None]:
    """A message and its array, if it has one. Raises `EOFError` when the other side has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    data = stream.read(message["array_bytes"])
    if len(data) < message["array_bytes"]:
        raise EOFError
    return message, np.load(io.BytesIO(data), allow_pickle=False) if data else None
