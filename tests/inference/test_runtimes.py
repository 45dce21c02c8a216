"""The runtimes: equal to Keras, equal bits for any batch and thread, silent, and honest about the device."""

import os
import subprocess
import sys

import numpy as np
import pytest

from finetune_cli.errors import FinetuneError, RunError, UsageError
from finetune_cli.inference import runtimes
from finetune_cli.keras_setup import import_keras


@pytest.fixture(scope="module")
def model():
    keras = import_keras()
    keras.utils.set_random_seed(0)
    pixels = keras.Input((32, 32, 3), name="pixels")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(pixels)
    for width in (16, 32):
        x = keras.layers.Conv2D(width, 3, strides=2, padding="same")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.ReLU(max_value=6)(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(name="pool")(x))


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


def test_features_equal_those_of_keras(model, photos):
    runtime = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", 2)
    expected = np.asarray(model(photos.astype(np.float32), training=False))
    np.testing.assert_allclose(runtime.infer(photos), expected, atol=2e-5, rtol=1e-5)


def test_bits_do_not_depend_on_batch_threads_or_mode(model, photos):
    def features(batch, **settings):
        runtime = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", **settings)
        return np.concatenate([runtime.infer(photos[i : i + batch]) for i in range(0, 16, batch)])

    expected = features(16, workers=1)
    for batch in (1, 4, 8):
        for settings in ({"workers": 1}, {"workers": 2}, {"workers": 1, "latency": True}):
            np.testing.assert_array_equal(features(batch, **settings), expected)


RACE = """
import sys, threading
from pathlib import Path
import numpy as np
from finetune_cli.inference.runtimes import OpenVinoRuntime, read_ir
runtime = OpenVinoRuntime(read_ir(Path(sys.argv[1])), "float32", 4)
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(4)
def work():
    barrier.wait()
    runtime.infer(np.zeros((1, 32, 32, 3), np.uint8))
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_begin_together_do_not_wait_for_ever(model, tmp_path):
    runtimes.import_openvino().save_model(runtimes.convert(model), tmp_path / "model.xml")
    for _ in range(4):
        subprocess.run([sys.executable, "-c", RACE, tmp_path / "model.xml"], timeout=30, check=True)


def test_a_model_with_a_loop_is_refused_before_the_feature_pass():
    keras = import_keras()
    pixels = keras.Input((8, 8, 3))
    rows = keras.layers.Reshape((8, 24))(pixels)
    recurrent = keras.Model(pixels, keras.layers.GRU(4)(rows))
    with pytest.raises(FinetuneError, match=r"no plain feed-forward network: it needs .*(Loop|TensorIterator)"):
        runtimes.convert(recurrent)


def test_answers_are_copies(model, photos):
    runtime = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", 1)
    first = runtime.infer(photos[:1])
    before = first.copy()
    runtime.infer(photos[1:2])
    np.testing.assert_array_equal(first, before)


def test_equal_models_give_equal_files(model, tmp_path):
    ov = runtimes.import_openvino()
    for name in ("a", "b"):
        ov.save_model(runtimes.convert(model), tmp_path / f"{name}.xml", compress_to_fp16=False)
    assert (tmp_path / "a.xml").read_bytes() == (tmp_path / "b.xml").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_the_tensorflow_runtime_equals_keras(model, photos):
    # On the CPU: what differs on a GPU is where TensorFlow runs it.
    runtime = runtimes.TensorFlowRuntime(model, "float32")
    expected = np.asarray(model(photos.astype(np.float32), training=False))
    np.testing.assert_allclose(runtime.infer(photos), expected, atol=2e-5, rtol=1e-5)
    assert runtime.infer(photos[:3]).shape == expected[:3].shape


def test_bfloat16_is_near_where_the_processor_has_it(model, photos):
    try:
        precision = runtimes.training_precision("cpu", "bfloat16")
    except UsageError:
        pytest.skip("this processor has no bfloat16 arithmetic")
    exact = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", 1).infer(photos)
    near = runtimes.OpenVinoRuntime(runtimes.convert(model), precision, 1).infer(photos)
    assert 0 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


def test_precision_follows_the_config(monkeypatch):
    assert runtimes.training_precision("cpu", "float32") == "float32"
    assert runtimes.training_precision("gpu", "auto") == "mixed"
    assert runtimes.training_precision("cpu", "auto") in {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("details", "policy"),
    [
        ({"compute_capability": (9, 0)}, "mixed_bfloat16"),
        ({"compute_capability": (7, 5)}, "mixed_float16"),
        ({}, "mixed_float16"),
    ],
)
def test_a_gpu_trains_in_the_types_that_it_has(monkeypatch, details, policy):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["a GPU"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _gpu: details)
    assert runtimes.training_policy("gpu", "mixed") == policy
    assert runtimes.training_policy("gpu", "float32") == "float32"


@pytest.mark.parametrize(("precision", "policy"), [("bfloat16", "mixed_bfloat16"), ("float32", "float32")])
def test_a_cpu_trains_in_the_precision_of_its_features(precision, policy):
    assert runtimes.training_policy("cpu", precision) == policy


def test_a_gpu_that_is_not_there_is_an_error():
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    assert runtimes.choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="no GPU"):
        runtimes.choose_device("gpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere TensorFlow is always asked")
def test_tensorflow_is_asked_for_a_gpu_only_where_there_is_a_driver(monkeypatch, tmp_path):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["a GPU"])
    monkeypatch.setattr(runtimes, "_GPU_DRIVERS", (str(tmp_path / "driver"),))
    assert runtimes.choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="no GPU"):
        runtimes.choose_device("gpu")
    (tmp_path / "driver").touch()
    assert runtimes.choose_device("auto") == runtimes.choose_device("gpu") == "gpu"
    assert runtimes.choose_device("cpu") == "cpu"


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(RunError, match=r"model\.xml cannot be read"):
        runtimes.read_ir(tmp_path / "model.xml")


def test_openvino_starts_no_process_and_writes_nothing(tmp_path):
    script = """
import os, pathlib
from finetune_cli.inference.runtimes import import_openvino
ov = import_openvino()
ov.Core()
from openvino.tools.ovc import convert_model
children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
assert not children, children
"""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.skipif(os.name == "nt", reason="signal stacks are of POSIX")
def test_a_signal_after_two_models_is_survived():
    """The second of two plugins of OpenVINO used to leave the signal stack of the first behind, which was unmapped."""
    script = """
import signal
import numpy as np
from finetune_cli.inference.runtimes import OpenVinoRuntime, import_openvino

ov = import_openvino()
from openvino import opset13

def runtime():
    photos = opset13.parameter([-1, 4, 4, 3], np.float32)
    return OpenVinoRuntime(ov.Model([opset13.reduce_mean(photos, [1, 2])], [photos]))

first, second = runtime(), runtime()
print(first.infer(np.full((1, 4, 4, 3), 7, np.uint8)).tolist())
del first
del second
seen = []
signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
signal.raise_signal(signal.SIGTERM)
print(seen)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout) == (0, "[[7.0, 7.0, 7.0]]\n[15]\n"), answer.stderr
