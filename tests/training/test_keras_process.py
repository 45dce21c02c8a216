"""Keras in a process of its own: silent, without TensorFlow where it can be, and never in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs_fixture
from file_faults import ENVIRONMENT, posix

from finetune_cli.errors import FinetuneError, WeightsError
from finetune_cli.training import keras_process
from finetune_cli.training.keras_process import KerasProcess

PHOTOS = np.random.default_rng(0).integers(0, 256, (2, runs_fixture.SIZE, runs_fixture.SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def process():
    with KerasProcess("openvino") as started:
        started.start()
        yield started


def test_it_answers_like_the_model_that_was_saved(process, tiny_run):
    path = tiny_run.run.file("model.keras")
    process.request("probabilities", {"model": str(path)}, PHOTOS)
    from finetune_cli.keras_setup import import_keras

    model = import_keras().models.load_model(path, safe_mode=True, compile=False)
    np.testing.assert_allclose(process.answer(), np.asarray(model(PHOTOS.astype(np.float32))), atol=1e-5)


def test_an_error_arrives_as_what_it_was_and_does_not_end_it(process, tmp_path):
    for _ in range(2):
        process.request("probabilities", {"model": str(tmp_path / "absent.keras")}, PHOTOS)
        with pytest.raises(WeightsError, match="no file"):
            process.answer()
    process.request("probabilities", {"nothing": "that it knows"}, PHOTOS)
    with pytest.raises(FinetuneError, match="Keras failed in its own process: TypeError"):
        process.answer()


@posix
def test_a_request_does_not_wait_for_keras(tiny_run):
    with KerasProcess("openvino") as process:
        process.start()
        os.kill(process._process.pid, signal.SIGSTOP)  # as slow as can be
        process.request(
            "probabilities", {"model": str(tiny_run.run.file("model.keras"))}, np.repeat(PHOTOS, 50, axis=0)
        )
        os.kill(process._process.pid, signal.SIGCONT)
        assert process.answer().shape == (100, 3)
    with KerasProcess("openvino") as process:  # and ends when nobody reads what is asked
        process.start()
        os.kill(process._process.pid, signal.SIGSTOP)
        process.request("probabilities", {"model": ""}, np.repeat(PHOTOS, 50, axis=0))


def test_a_process_that_cannot_be_started_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with KerasProcess("openvino") as process, pytest.raises(FinetuneError, match="No such file"):
        process.start()


def test_what_a_library_prints_is_no_answer():
    read, write = os.pipe()
    program = (
        "from finetune_cli.training import keras_tasks\n"
        "def noisy():\n"
        "    import os, sys\n"
        "    print('printed'); os.write(1, b'written'); assert not sys.stdin.read()\n"
        "keras_tasks.TASKS['noisy'] = noisy\n"
        "keras_tasks.serve('openvino')\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT, stdin=read, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with os.fdopen(write, "wb") as requests:
        keras_process.send(requests, {"task": "noisy", "arguments": {}})
    os.close(read)
    answer, told = started.communicate(timeout=60)
    assert answer == b'{"array_bytes": 0}\n'
    assert b"printed" in told
    assert b"written" in told


def test_proving_needs_no_tensorflow(tiny_run):
    program = (
        "import sys\n"
        "import numpy as np\n"
        "from finetune_cli import keras_setup\n"
        "from finetune_cli.training import keras_tasks\n"
        "keras_setup.choose_backend('openvino')\n"
        f"photos = np.zeros((1, {runs_fixture.SIZE}, {runs_fixture.SIZE}, 3), np.uint8)\n"
        f"keras_tasks._probabilities({str(tiny_run.run.file('model.keras'))!r}, photos)\n"
        "print(sys.modules['keras'].config.backend(), 'tensorflow' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["openvino", "False"]


@posix
def test_it_ends_with_the_training_even_when_that_is_killed():
    program = (
        "import sys, time\n"
        "from finetune_cli.training.keras_process import KerasProcess\n"
        "process = KerasProcess('openvino')\n"
        "process.start()\n"
        "print(process._process.pid, process._scratch.name, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT, stdout=subprocess.PIPE) as training:
        child, scratch = training.stdout.readline().decode().split()
        training.send_signal(signal.SIGKILL)
    ending = time.monotonic() + 60
    while running(int(child)) and time.monotonic() < ending:
        time.sleep(0.05)
    assert not running(int(child))
    assert not Path(scratch).exists()


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(status.stdout.strip()) and not status.stdout.startswith("Z")
