"""The first signal unwinds, at once or when TensorFlow is out of the way; the second ends the process."""

import os
import signal
import subprocess
import sys
import threading
import traceback

import numpy as np
import pytest

from finetune_cli import signals
from finetune_cli.errors import Interrupted
from finetune_cli.head.data import HeadData
from finetune_cli.head.keras_fit import KerasSettings, fit_epochs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are raised in the process as POSIX does it")


@pytest.fixture
def caught():
    """This process handles the two signals as the tool does, until the test ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    signals.catch()
    yield
    signals.catch()  # forgets what came
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_at_once():
    script = """
import os, signal, time
from finetune_cli import signals
signals.catch()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 130


@pytest.mark.usefixtures("caught")
def test_a_signal_is_raised_where_it_comes():
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.exit_code == 143


@pytest.mark.usefixtures("caught")
def test_a_deferred_signal_is_raised_at_the_end_of_the_outermost_block(capfd):
    done = []

    @signals.deferred()
    def inner():
        signal.raise_signal(signal.SIGINT)
        done.append("inner")

    @signals.deferred()
    def outer():
        inner()
        done.append("outer")

    with pytest.raises(Interrupted) as raised:
        outer()
    assert done == ["inner", "outer"]
    assert raised.value.exit_code == 130
    assert "a second signal stops at once" in capfd.readouterr().err
    with pytest.raises(Interrupted):
        signals.check()  # remembered, should the other be swallowed


@pytest.mark.usefixtures("caught")
def test_a_check_in_the_block_raises_and_so_does_the_end_after_an_error():
    @signals.deferred()
    def stopped():
        signal.raise_signal(signal.SIGINT)
        signals.check()
        pytest.fail("not raised")

    @signals.deferred()
    def failed():
        raise ValueError("what an interrupted library may say")

    with pytest.raises(Interrupted):
        stopped()
    with pytest.raises(Interrupted) as raised:
        failed()
    assert isinstance(raised.value.__context__, ValueError)


def test_a_signal_in_a_destructor_is_not_lost_and_says_nothing_by_itself():
    script = """
import signal
from finetune_cli import signals

class Dying:
    def __init__(self, deed):
        self.deed = deed
    def __del__(self):
        self.deed()

signals.catch()
Dying(lambda: signal.raise_signal(signal.SIGTERM))
try:
    signals.check()
except KeyboardInterrupt:
    print("remembered")
Dying(lambda: 1 / 0)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout == "remembered\n"
    assert "ZeroDivisionError" in answer.stderr
    assert "Interrupted" not in answer.stderr


@pytest.mark.usefixtures("caught")
def test_a_block_in_another_thread_defers_nothing():
    entered, leave = threading.Event(), threading.Event()

    @signals.deferred()
    def work():
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    try:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    finally:
        leave.set()
        thread.join()


@pytest.mark.usefixtures("caught")
def test_a_signal_while_keras_trains_is_raised_between_two_batches():
    """Raised by the handler, inside TensorFlow, it ended in a segmentation fault once in some hundred times."""
    features, labels = np.ones((64, 1, 8), np.float32), np.arange(64) % 2
    train_data, val_data = HeadData.of(features, labels, 2), HeadData.of(features[:, 0], labels, 2)
    last = 0

    def train():
        nonlocal last
        for state in fit_epochs(train_data, val_data, settings):
            last = state.epoch
            if last == 2:
                signal.setitimer(signal.ITIMER_REAL, 0.002)

    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    settings = KerasSettings(epochs=2000, batch_size=8, patience=None)
    try:
        with pytest.raises(Interrupted) as raised:
            train()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert 2 <= last < 2000
    frames = {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert "check" in frames
    assert "_first" not in frames
