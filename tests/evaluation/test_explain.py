"""`explain`: the map adds up to the logit, in the fast runtime, and is refused where it would be wrong."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from finetune_cli.cli.app import app
from finetune_cli.drawing import heatmap
from finetune_cli.errors import BadImage, RunError, UsageError
from finetune_cli.evaluation import explain as command
from finetune_cli.inference import linear_end, runtimes
from finetune_cli.keras_setup import import_keras
from finetune_cli.photos.decode import decode
from finetune_cli.runs.run import Run


@pytest.fixture
def photo(tiny_run) -> Path:
    return tiny_run.photos / "test" / "bee" / "bee-03.png"


def keras_logits(run: Run, photo: Path) -> np.ndarray:
    keras = import_keras()
    model = keras.models.load_model(run.folder / "model.keras", compile=False)
    up_to_logits = keras.Model(model.input, model.get_layer("logits").output)
    pixels = decode(photo, run.image_settings)[None].astype(np.float32)
    return np.asarray(up_to_logits(pixels, training=False))[0].astype(np.float64)


def test_the_map_and_the_bias_add_up_to_the_logit_of_keras(tiny_run, photo, tmp_path):
    logits = keras_logits(tiny_run.run, photo)
    limit = 1e-5 * np.abs(logits).max()
    for name, logit in zip(tiny_run.run.classes, logits, strict=True):
        found = command.explain(tiny_run.run, photo, name, tmp_path / "map.png")
        row = next(row for row in found.evidence if row.name == name)
        assert found.name == name
        assert found.map.mean() + row.bias == pytest.approx(logit, abs=limit)
        assert row.supporting + row.opposing + row.bias == pytest.approx(logit, abs=limit)
        assert row.supporting >= 0 >= row.opposing


def test_the_evidence_is_ordered_and_the_answer_is_drawn(tiny_run, photo, tmp_path):
    found = command.explain(tiny_run.run, photo, None, tmp_path / "map.png")
    probabilities = [row.probability for row in found.evidence]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert found.name == found.evidence[0].name


def test_the_picture_shows_photo_and_map(tiny_run, photo, tmp_path):
    command.explain(tiny_run.run, photo, None, tmp_path / "deep" / "map.png")
    with Image.open(tmp_path / "deep" / "map.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (2 * 448 + 8, 448)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    expected = decode(photo, replace(tiny_run.run.image_settings, size=448))
    np.testing.assert_array_equal(pixels[:, :448], expected)


def test_red_is_where_the_evidence_is():
    photo = np.full((64, 64, 3), 128, np.uint8)
    evidence = np.zeros((4, 4))
    evidence[0, 0], evidence[3, 3] = 2.0, -1.0
    red, _green, blue = heatmap.overlay(photo, evidence).astype(int).transpose(2, 0, 1)
    assert red[8, 8] - blue[8, 8] > 100
    assert blue[56, 56] - red[56, 56] > 40
    assert abs(red[8, 56] - blue[8, 56]) < 20
    flat = heatmap.overlay(photo, np.zeros((4, 4)))
    assert np.abs(flat.astype(int) - 128).max() <= 1


def bundled_with_head(folder: Path, classes: int):
    """EfficientNet-Lite0 with a random head as an OpenVINO file, and the Keras model up to the logits."""
    import finetune_cli

    keras = import_keras()
    path = Path(finetune_cli.__file__).parent / "assets" / "efficientnet_lite0.keras"
    backbone = keras.models.load_model(path, compile=False)
    # Named, because Keras numbers unnamed layers by what the process made before, and the file has a "rescaling".
    initial = keras.initializers.RandomNormal(0, 0.5, seed=2)
    logits = keras.layers.Dense(classes, kernel_initializer=initial, name="logits")
    up_to_logits = keras.Model(backbone.input, logits(backbone.output))
    logits.bias.assign(np.linspace(-1, 1, classes))
    scaled = keras.layers.Rescaling(0.4, name="temperature")(up_to_logits.output)
    model = keras.Model(backbone.input, keras.layers.Softmax(name="probabilities")(scaled))
    runtimes.import_openvino().save_model(runtimes.convert(model), folder / "model.xml", compress_to_fp16=False)
    return up_to_logits


@pytest.mark.slow
def test_a_real_backbone_adds_up_to_a_hundred_thousandth(tmp_path):
    up_to_logits = bundled_with_head(tmp_path, 7)
    model = runtimes.read_ir(tmp_path / "model.xml")
    end = linear_end.read_end(model, 2.5)
    assert end.kernel.shape == (1280, 7)
    model.add_outputs([end.features, end.feature_map])
    runtime = runtimes.OpenVinoRuntime(model)
    photos = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    _probabilities, features, feature_map = runtime.infer_all(photos)
    maps = linear_end.class_map(linear_end.channels_last(feature_map, end), end.kernel)
    logits = np.asarray(up_to_logits(photos.astype(np.float32), training=False))
    assert maps.shape == (2, 7, 7, 7)
    limit = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(maps.mean(axis=(1, 2)) + end.bias, logits, atol=limit)
    np.testing.assert_allclose(features @ end.kernel + end.bias, logits, atol=limit)


def test_a_backbone_without_a_map_is_refused_by_name(tiny_run, photo, tmp_path):
    manifest = tiny_run.run.manifest
    backbone = replace(manifest.backbone, name="convnext_tiny", feature_map=False)
    run = Run(tiny_run.run.folder, replace(manifest, backbone=backbone))
    with pytest.raises(RunError, match="convnext_tiny") as caught:
        command.explain(run, photo, None, tmp_path / "map.png")
    assert "resnet50" in caught.value.remedy
    assert not (tmp_path / "map.png").exists()


def test_something_between_pooling_and_head_is_seen_in_the_graph(tmp_path):
    """A LayerNormalization after pooling: features are found, a feature map is not."""
    keras = import_keras()
    inputs = keras.Input((16, 16, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    normal = keras.layers.LayerNormalization()(pooled)
    model = keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(3)(normal)))
    end = linear_end.read_end(runtimes.convert(model))
    assert end.feature_map is None
    assert end.kernel.shape == (4, 3)


def test_a_foreign_model_is_refused():
    keras = import_keras()
    inputs = keras.Input((16, 16, 3))
    model = keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(keras.layers.Conv2D(4, 3, activation="tanh")(inputs)))
    with pytest.raises(RunError, match="no linear softmax head"):
        linear_end.read_end(runtimes.convert(model))


def test_wrong_arguments(tiny_run, photo, tmp_path):
    with pytest.raises(UsageError) as caught:
        command.explain(tiny_run.run, photo, "bees", tmp_path / "map.png")
    assert "'bee'" in caught.value.remedy
    with pytest.raises(BadImage):
        command.explain(tiny_run.run, tmp_path / "none.png", None, tmp_path / "map.png")


def test_the_command_line(tiny_run, photo, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1")
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["explain", str(photo), "--class", "ant"])
    assert answer.exit_code == 0, answer.output
    assert "regions for" in answer.output
    assert "red regions support ant" in answer.output
    assert (tmp_path / "heatmap.png").is_file()


def test_no_training_package_is_loaded(tiny_run, photo, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from finetune_cli.evaluation import explain; from finetune_cli.runs.run import Run\n"
        "explain.explain(Run.load(Path(sys.argv[1])), Path(sys.argv[2]), None, Path(sys.argv[3]))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command_line = [sys.executable, "-c", code, str(tiny_run.run.folder), str(photo), str(tmp_path / "map.png")]
    answer = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for package in ("tensorflow", "keras", "scipy", "matplotlib", "pydantic"):
        assert f"'{package}'" not in answer.stdout
