"""Models that take pixels of any size and resize them as training does."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from finetune_cli.errors import UsageError, WeightsError
from finetune_cli.exports import any_size, manifest, opening
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.exports.openvino import OpenedOpenVino
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.inference.runtimes import converter, import_openvino
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.photo import square
from finetune_cli.progress import Silent

# Smaller and larger than the model, tall, wide, of one pixel; the last is so large that whole blocks are averaged.
SIZES = [(64, 64), (150, 100), (100, 150), (40, 30), (30, 90), (1, 1), (1, 7), (700, 450)]


def photo_of(width, height):
    noise = np.random.default_rng(width).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tiny_run, tmp_path_factory):
    """The two forms of the tiny run that take pixels of any size."""
    request = ExportRequest(("onnx", "openvino"), tmp_path_factory.mktemp("any") / "x", options={"pixels": "any-size"})
    return {one.form: one.folder for one in export(tiny_run.run, request, Silent()).exports}


def onnx_answers(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("image", "tensor(uint8)", ["N", "H", "W", 3])
    return lambda pixels: session.run(["probabilities"], {"image": pixels})[0]


def openvino_answers(path):
    ov = import_openvino()
    model = ov.Core().read_model(path)
    assert model.input("image").partial_shape.to_string() == "[1..64,?,?,3]"
    assert model.input("image").element_type == ov.Type.u8
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled({"image": pixels})["probabilities"]


def test_pixels_of_any_size_get_the_answer_of_the_run(folders, tiny_run):
    answers = [onnx_answers(folders["onnx"] / "model.onnx"), openvino_answers(folders["openvino"] / "model.xml")]
    run = RunPredictor(tiny_run.run, 1)
    for size in SIZES:
        photo = photo_of(*size)
        expected = run.probabilities(square(photo, size, 64, "crop")[None])
        for answer in answers:
            # A few pixels are a grey level away, and the tiny network answers those with as much.
            assert np.abs(answer(np.asarray(photo)[None]) - expected).max() < 2e-3, size
            twice = np.repeat(np.asarray(photo)[None], 2, axis=0)
            assert np.abs(answer(twice) - expected).max() < 2e-3, size


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_each_kind_of_resizing(resize):
    import tf2onnx

    settings = ImageSettings(48, resize)
    function = any_size.resizing(settings)
    ov = import_openvino()
    model = converter()(function.get_concrete_function())
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    fitted = [lambda pixels: compiled({0: pixels})[0]]
    if resize == "pad":  # the only one with operations of its own; the conversion takes seconds
        import onnxruntime

        converted, _ = tf2onnx.convert.from_function(function, function.input_signature, opset=17)
        session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
        fitted.append(lambda pixels: session.run(None, {"image": pixels})[0])
    for size in SIZES:
        photo = photo_of(*size)
        expected = square(photo, size, 48, resize).astype(np.float32)
        for resized in fitted:
            difference = np.abs(resized(np.asarray(photo)[None])[0] - expected)
            tall = size[1] > 2 * size[0]  # Pillow takes the columns of tall pictures first
            assert difference.max() <= (6 if tall else 2), size
            assert difference.mean() < (0.3 if tall else 0.15), size


def test_the_proof_covers_photos_at_their_own_size(folders, tiny_run):
    for folder in folders.values():
        assert manifest.read(folder).options["pixels"] == "any-size"
        checks = json.loads((folder / "parity.json").read_text())["checks"]
        assert [check["signature"] for check in checks] == ["image", "image, full size"]
        assert [check["limit"] for check in checks] == ["<= 0.0001", "interval reaches 95%"]


def test_it_goes_with_the_other_options(tiny_run, tmp_path):
    options = {"pixels": "any-size", "quantize": "float16"}
    request = ExportRequest(("onnx", "openvino"), tmp_path / "x", version=2, options=options)
    for one in export(tiny_run.run, request, Silent()).exports:
        assert {key: one.options[key] for key in options} == options
        config = (one.folder.parent / "config.pbtxt").read_text()
        assert "data_type: TYPE_UINT8" in config
        assert "dims: [ -1, -1, 3 ]" in config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pixels": "any-size", "layout": "nchw"}, "--pixels any-size"),
        ({"page": "page", "layout": "nchw"}, "--page"),
        ({"pixels": "any-size", "page": "page"}, "page"),
    ],
)
def test_options_that_exclude_each_other(tiny_run, tmp_path, options, named):
    with pytest.raises(UsageError) as caught:
        export(tiny_run.run, ExportRequest(("onnx",), tmp_path / "x", options=options), Silent())
    assert named in caught.value.problem
    assert not (tmp_path / "x").exists()


def test_predict_reads_them(folders, tiny_run):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for folder in folders.values():
        answers = opening.open_model(folder, 1).probabilities(pixels)
        assert np.abs(answers - RunPredictor(tiny_run.run, 1).probabilities(pixels)).max() < 1e-4


@pytest.mark.slow
def test_equal_runs_give_equal_files(folders, tiny_run, tmp_path):
    request = ExportRequest(("onnx", "openvino"), tmp_path / "x", options={"pixels": "any-size"})
    for one in export(tiny_run.run, request, Silent()).exports:
        for path in one.folder.iterdir():
            if path.name != manifest.FILE:
                assert path.read_bytes() == (folders[one.form] / path.name).read_bytes(), path.name


def test_an_openvino_file_without_the_place_where_the_model_begins_is_refused(folders, tmp_path):
    """Its size would depend on the photo; nothing of it is compiled."""
    text = (folders["openvino"] / "model.xml").read_text("utf-8")
    (tmp_path / "model.bin").write_bytes((folders["openvino"] / "model.bin").read_bytes())
    (tmp_path / "model.xml").write_text(re.sub(r"\bfitted\b", "renamed", text), "utf-8")
    with pytest.raises(WeightsError, match="its input and its output are not float32"):
        OpenedOpenVino(tmp_path / "model.xml", 1)


def test_the_option_belongs_to_two_formats(tiny_run, tmp_path):
    with pytest.raises(UsageError, match="--pixels belongs to the formats onnx and openvino"):
        export(tiny_run.run, ExportRequest(("keras",), tmp_path / "x", options={"pixels": "any-size"}), Silent())
