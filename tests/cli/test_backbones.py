"""`finetune backbones`: every backbone, its size, and where its weights are, at once."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from finetune_cli.backbones import registry
from finetune_cli.cli.app import app


def rows() -> dict[str, dict]:
    answer = CliRunner().invoke(app, ["backbones", "--format", "json"])
    assert answer.exit_code == 0, answer.output
    return {row["name"]: row for row in json.loads(answer.stdout)}


def test_every_backbone_is_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    listed = rows()
    assert next(iter(listed)) == registry.BUNDLED
    assert listed.keys() == registry.TABLE.keys()
    assert listed[registry.BUNDLED]["weights"] == "bundled"
    assert {row["weights"] for name, row in listed.items() if name != registry.BUNDLED} == {"download"}
    resnet = {"name": "resnet50", "keras_name": "ResNet50", "parameters": 23_587_712, "megabytes": 94.4}
    assert listed["resnet50"].items() >= {**resnet, "input_size": 224, "features": 2048}.items()
    table = CliRunner().invoke(app, ["backbones"]).stdout
    assert "resnet50                       23.6    94    224  download" in table


def test_weights_in_kerass_cache_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    name = registry.TABLE["resnet50"].published_weights(224).name
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(b"")
    assert [row["name"] for row in rows().values() if row["weights"] == "keras-cache"] == ["resnet50"]


def test_listing_loads_nothing_heavy():
    script = """
import sys
from finetune_cli.cli.app import app
app(["backbones"], standalone_mode=False)
assert not {"tensorflow", "keras", "openvino", "scipy", "h5py"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("backbone", "advice"),
    [("resnet5", "did you mean resnet50"), ("yolov8n", "list them with: finetune backbones; or give the path")],
)
def test_an_unknown_backbone(tmp_path, backbone, advice):
    answer = CliRunner().invoke(app, ["train", f"data.train={tmp_path}", f"model.backbone={backbone}"])
    assert answer.exit_code == 2
    assert f"there is no backbone '{backbone}'\ntry: {advice}" in answer.stderr
