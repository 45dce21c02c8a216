"""Folders of versions, and what Triton reads beside them."""

import json
import re

import pytest

from finetune_cli.errors import UsageError
from finetune_cli.exports import opening, triton
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.exports.triton import Tensor
from finetune_cli.progress import Silent


def test_the_config_says_what_the_model_takes_and_gives():
    image, probabilities = Tensor("image", "float32", (3, 64, 96)), Tensor("probabilities", "float32", (6,))
    text = triton.config("onnxruntime", image, probabilities)
    assert re.findall(r'(\w+): "?([^"\n]+)"?', text) == [
        ("backend", "onnxruntime"),
        ("max_batch_size", "64"),
        ("name", "image"),
        ("data_type", "TYPE_FP32"),
        ("format", "FORMAT_NCHW"),
        ("dims", "[ 3, 64, 96 ]"),
        ("name", "probabilities"),
        ("data_type", "TYPE_FP32"),
        ("dims", "[ 6 ]"),
        ("label_filename", "labels.txt"),
    ]
    free = triton.config("openvino", Tensor("image", "uint8", (-1, -1, 3)), probabilities)
    assert "TYPE_UINT8" in free
    assert "FORMAT_NHWC" in free
    assert "dims: [ -1, -1, 3 ]" in free


def test_versions_of_every_form(tiny_run, tmp_path):
    out = tmp_path / "models"
    request = ExportRequest(("openvino", "keras"), out, version=3)
    folders = [one.folder for one in export(tiny_run.run, request, Silent()).exports]
    assert folders == [out / "keras" / "3", out / "openvino" / "3"]
    assert {path.name for path in (out / "openvino").iterdir()} == {"3", "config.pbtxt", "labels.txt"}
    assert {path.name for path in (out / "keras").iterdir()} == {"3"}
    assert (out / "openvino" / "labels.txt").read_text() == "ant\nbee\nwasp\n"
    config = (out / "openvino" / "config.pbtxt").read_text()
    assert 'backend: "openvino"' in config
    assert "dims: [ 64, 64, 3 ]" in config
    for name in ("keras", "openvino"):
        assert tuple(opening.open_model(out / name, 1).classes) == ("ant", "bee", "wasp")  # the newest version
        assert json.loads((out / name / "3" / "manifest.json").read_text())["form"] == name


def test_a_further_version_keeps_what_people_changed(tiny_run, tmp_path):
    out, observer = tmp_path / "scenes", Silent()
    export(tiny_run.run, ExportRequest(("openvino",), out, version=1), observer)
    config = out / "config.pbtxt"
    export(tiny_run.run, ExportRequest(("openvino",), out, version=2), observer)
    assert observer.warnings == []
    before = config.read_text()
    config.write_text(before + "instance_group [ { count: 2 } ]\n")
    export(tiny_run.run, ExportRequest(("openvino",), out, version=3), observer)
    assert config.read_text() == before + "instance_group [ { count: 2 } ]\n"
    assert [warning for warning in observer.warnings if "was left as it is" in warning] == observer.warnings != []
    with pytest.raises(UsageError, match="is not empty"):
        export(tiny_run.run, ExportRequest(("openvino",), out, version=3), observer)
    export(tiny_run.run, ExportRequest(("openvino",), out, version=3, force=True), observer)
    assert config.read_text() == before
    assert {path.name for path in out.iterdir()} == {"1", "2", "3", "config.pbtxt", "labels.txt"}


def test_a_version_with_other_classes_is_refused_before_the_work(tiny_run, tmp_path):
    out = tmp_path / "scenes"
    export(tiny_run.run, ExportRequest(("openvino",), out, version=1), Silent())
    (out / "labels.txt").write_text("ant\nbee\nfly\n")
    with pytest.raises(UsageError, match=r"labels\.txt lists other classes"):
        export(tiny_run.run, ExportRequest(("openvino",), out, version=2), Silent())
    assert {path.name for path in out.iterdir()} == {"1", "config.pbtxt", "labels.txt"}
    (out / "labels.txt").unlink()
    (out / "labels.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"labels\.txt"):
        export(tiny_run.run, ExportRequest(("openvino",), out, version=2), Silent())
    assert not (tmp_path / "elsewhere").exists()
