"""Every snippet of docs/serving.md that can run here, run in a process that has nothing of finetune-cli."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT
from PIL import Image

from finetune_cli.exports import registry
from finetune_cli.exports.savedmodel import OpenedSavedModel
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.photos.decode import decode

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
SNIPPETS = {
    text.splitlines()[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
SHELL = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
FORMS = {"with_tensorflow.py", "with_keras.py", "with_onnx.py", "with_litert.py", "with_openvino.py"}
RUNNER = """
import runpy, sys
sys.modules["finetune_cli"] = None
sys.modules["openvino_telemetry"] = None
sys.path.insert(0, ".")
for name in sys.argv[1:]:
    print(name, end=": ", flush=True)
    runpy.run_path(name)
"""


@pytest.fixture(scope="module")
def place(tiny_run, exported, tmp_path_factory):
    """A folder with what the page speaks of: `models/scenes`, a photo, and the snippets under their names."""
    folder = tmp_path_factory.mktemp("serving")
    shutil.copytree(exported.exports[1].folder.parents[1], folder / "models")
    photo = Image.open(tiny_run.photos / "val" / "wasp" / "wasp-02.png").resize((400, 300), Image.Resampling.BICUBIC)
    photo.save(folder / "photo.jpg", quality=95)
    shutil.copy(folder / "models" / "scenes" / "onnx" / "photo.py", folder)
    for name, text in SNIPPETS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(place, tiny_run):
    """The run's own answer for the photo."""
    run = tiny_run.run
    pixels = decode(place / "photo.jpg", run.image_settings)
    (row,) = RunPredictor(run, 1).probabilities(pixels[None])
    return run.classes[row.argmax()], float(row.max())


def test_the_page_has_a_snippet_for_every_form():
    assert set(SNIPPETS) == FORMS | {"with_mediapipe.py"}  # which tools/test_clients.py runs


def test_every_python_snippet_gives_the_answer_of_the_run(place, expected):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", RUNNER, *sorted(FORMS)]
    answer = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    rows = re.findall(r"^(with_\w+\.py): (\S+) ([\d.e-]+)$", answer.stdout, re.MULTILINE)
    assert {name for name, _label, _probability in rows} == FORMS
    for name, label, probability in rows:
        assert label == expected[0], name
        assert float(probability) == pytest.approx(expected[1], abs=0.003), name


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_request_for_tensorflow_serving(place, expected):
    """Serving makes a batch of the instances; what is under `b64` reaches the signature as bytes."""
    (place / "curl").write_text('#!/bin/sh\necho "$@" > curl.txt\n')
    (place / "curl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", SHELL[1]], cwd=place, env=environment, check=True, timeout=30)
    assert "--data @request.json http://localhost:8501/v1/models/scenes:predict" in (place / "curl.txt").read_text()
    request = json.loads((place / "request.json").read_text())
    model = OpenedSavedModel(place / "models" / "scenes" / "savedmodel" / "1")
    (signature,) = (one for one in model.signatures() if one.name == request["signature_name"])
    (row,) = signature.answer([base64.b64decode(one["image_bytes"]["b64"]) for one in request["instances"]])
    assert model.classes[row.argmax()] == expected[0]
    assert row.max() == pytest.approx(expected[1], abs=0.003)


def test_the_first_command_writes_the_folders_that_the_page_names(place):
    formats = re.findall(r"--format (\w+)", SHELL[0])
    assert sorted(path.name for path in (place / "models" / "scenes").iterdir()) == sorted(registry.parse(formats))
    for path in re.findall(r'"(models/scenes/[\w./]+)"', PAGE):
        assert (place / path).exists(), path
