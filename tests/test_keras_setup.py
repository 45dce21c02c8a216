import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_cli import keras_setup
from finetune_cli.errors import FinetuneError

SCRIPT = """
import json, os, sys
from finetune_cli.keras_setup import import_keras
keras = import_keras()
layer = keras.layers.Conv2D(2, 1)
layer(keras.ops.zeros((1, 5, 5, 3)))
print(json.dumps({
    "backend": keras.config.backend(), "floatx": keras.config.floatx(), "epsilon": keras.config.epsilon(),
    "format": keras.config.image_data_format(), "layer": [layer.data_format, layer.dtype],
    "home": os.environ.get("KERAS_HOME"), "again": import_keras() is keras,
    "unused": [name for name in ("matplotlib", "sklearn") if name in sys.modules],
}))
print("a line of our own", file=sys.stderr)
"""


def test_settings_of_the_user_do_not_matter_and_nothing_is_written_or_printed(tmp_path: Path):
    home, keras_home = tmp_path / "home", tmp_path / "keras"
    home.mkdir()
    keras_home.mkdir()
    settings = {"floatx": "float16", "epsilon": 0.5, "backend": "jax", "image_data_format": "channels_first"}
    (keras_home / "keras.json").write_text(json.dumps(settings))
    environment = os.environ | {"HOME": str(home), "KERAS_HOME": str(keras_home), "KERAS_BACKEND": "torch"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {
        "backend": "tensorflow",
        "floatx": "float32",
        "epsilon": 1e-7,
        "format": "channels_last",
        "layer": ["channels_last", "float32"],
        "home": str(keras_home),
        "again": True,
        "unused": [],
    }
    assert done.stderr == "a line of our own\n"
    assert list(home.iterdir()) == []
    assert [path.name for path in keras_home.iterdir()] == ["keras.json"]


def test_only_the_lines_of_the_logger_are_held_back(capfd: pytest.CaptureFixture[str]):
    with keras_setup._logger_silenced():
        os.write(2, b"I0000 00:00:1795442827.178263    6419 port.cc:153] oneDNN is on\n")
        os.write(2, b"E0000 00:00:1795442842.656664    6429 cuda_platform.cc:52] failed call to cuInit\n")
        os.write(2, b"Error: something that a person must see\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "Error: something that a person must see\nafter\n"


def test_absent_hides_a_module_and_brings_it_back():
    with keras_setup._absent(("this", "json")), pytest.raises(ImportError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    assert sys.modules["json"] is json


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch):
    keras = keras_setup.import_keras()
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(FinetuneError, match="jax backend"):
        keras_setup.import_keras()
