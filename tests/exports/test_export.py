"""Exports of a run: what other programs read in them, the proof, and what happens when something is wrong."""

import csv
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs_fixture
from paths import PROGRAMS, SOURCE
from PIL import Image
from typer.testing import CliRunner

from finetune_cli.cli.app import app
from finetune_cli.errors import DataError, GateError, MissingExtra, RunError, StorageError, UsageError, WeightsError
from finetune_cli.exports import keras, litert, opening, openvino, parity, savedmodel
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.exports.keras import OpenedKeras
from finetune_cli.exports.openvino import OpenedOpenVino
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.photos.decode import decode
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run

ALL = ("savedmodel", "keras", "onnx", "litert", "openvino")


@pytest.fixture(scope="module")
def folders(exported):
    """Form -> the folder of the export in that form."""
    return {one.form: one.folder for one in exported.exports}


@pytest.fixture(scope="module")
def validation(tiny_run):
    """The validation photos, decoded, and the probabilities that were measured for them in training."""
    with (tiny_run.run.folder / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    paths = [tiny_run.photos / "val" / row["path"] for row in rows]
    pixels = np.stack([decode(path, tiny_run.run.image_settings) for path in paths])
    return paths, pixels, np.array([[float(row[name]) for name in tiny_run.run.classes] for row in rows])


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="finetune")


def changed_run(tiny_run, folder, name, change):
    """A copy of the run in which the bytes of one file were changed."""
    copy = shutil.copytree(tiny_run.run.folder, folder / "runs" / "copy")
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return Run.load(copy)


# What other programs find


def test_every_form_says_what_it_is(folders, tiny_run):
    for form, folder in folders.items():
        card = json.loads((folder / "classes.json").read_text())
        assert card["classes"] == list(tiny_run.run.classes)
        assert card["image"] == {"size": 64, "resize": "crop", "max_pixels": 100_000_000}
        said = json.loads((folder / "manifest.json").read_text())
        assert said["form"] == form
        contents = files_below(folder)
        del contents["manifest.json"]
        assert said["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        assert (
            said["run"]["model_sha256"] == hashlib.sha256((folders["keras"] / "model.keras").read_bytes()).hexdigest()
        )
        assert json.loads((folder / "parity.json").read_text())["photos"] == 30


def test_tensorflow_without_this_package_gives_the_measured_answers(folders, validation, tmp_path):
    paths, pixels, measured = validation
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, PROGRAMS / "outsider.py", folders["savedmodel"], folders["keras"] / "model.keras"]
    answer = subprocess.run(
        [*command, tmp_path / "pixels.npy", *paths],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    said = json.loads(answer.stdout.splitlines()[-1])
    for name in ("serving_default", "serve_uint8", "keras", "serve_bytes"):
        assert np.abs(np.array(said[name]) - measured).max() < 1e-4, name
    names = ["ant", "bee", "wasp"]
    assert said["label"] == [names[i] for i in measured.argmax(axis=1)]
    assert said["class_names"] == [names] * len(paths)


def test_onnx_runtime_gives_the_measured_answers(folders, validation):
    import onnxruntime

    _paths, pixels, measured = validation
    session = onnxruntime.InferenceSession(folders["onnx"] / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("image", [64, 64, 3])]
    for rows in (slice(0, 1), slice(0, 7), slice(None)):
        (answer,) = session.run(["probabilities"], {"image": pixels[rows].astype(np.float32)})
        assert np.abs(answer - measured[rows]).max() < 1e-4
    about = session.get_modelmeta()
    assert (about.producer_name, about.graph_name) == ("finetune-cli", "tiny-1")
    assert about.description == "tiny-1: ant, bee, wasp; tiny, 64 pixels"
    card = json.loads(about.custom_metadata_map["finetune"])
    assert card["classes"] == ["ant", "bee", "wasp"]


def test_onnx_with_channels_first_gives_the_measured_answers(tiny_run, validation, tmp_path):
    import onnxruntime

    _paths, pixels, measured = validation
    request = ExportRequest(("onnx",), tmp_path / "x", options={"layout": "nchw"})
    (one,) = export(tiny_run.run, request, Silent()).exports
    assert (one.options["quantize"], one.options["layout"]) == ("none", "nchw")
    session = onnxruntime.InferenceSession(one.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("image", [3, 64, 64])]
    (answer,) = session.run(["probabilities"], {"image": pixels.transpose(0, 3, 1, 2).astype(np.float32)})
    assert np.abs(answer - measured).max() < 1e-4
    assert np.abs(opening.open_model(one.folder, 1).probabilities(pixels) - measured).max() < 1e-4


def test_litert_gives_the_measured_answers(folders, validation):
    from ai_edge_litert.interpreter import Interpreter

    _paths, pixels, measured = validation
    path = folders["litert"] / "model.tflite"
    run = Interpreter(model_path=str(path)).get_signature_runner("serving_default")
    answers = [run(image=photo[None].astype(np.float32))["probabilities"] for photo in pixels]
    assert np.abs(np.concatenate(answers) - measured).max() < 1e-4
    assert (folders["litert"] / "labels.txt").read_text() == "ant\nbee\nwasp\n"
    with zipfile.ZipFile(path) as archive:
        assert archive.read("labels.txt") == b"ant\nbee\nwasp\n"


def test_openvino_gives_the_measured_answers(folders, validation):
    from finetune_cli.inference.runtimes import import_openvino

    _paths, pixels, measured = validation
    ov = import_openvino()
    model = ov.Core().read_model(folders["openvino"] / "model.xml")
    assert model.input("image").partial_shape.to_string() == "[1..64,64,64,3]"
    assert model.get_parameters()[0].get_layout().to_string() == "[N,H,W,C]"
    assert model.get_friendly_name() == "tiny-1"
    assert model.get_rt_info("producer").astype(str).startswith("finetune-cli ")
    assert model.get_rt_info("description").astype(str) == "tiny-1: ant, bee, wasp; tiny, 64 pixels"
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for rows in (slice(0, 1), slice(0, 7)):
        answer = compiled({"image": pixels[rows].astype(np.float32)})["probabilities"]
        assert np.abs(answer - measured[rows]).max() < 1e-4
    assert json.loads(model.get_rt_info("finetune").astype(str))["classes"] == ["ant", "bee", "wasp"]


def test_equal_runs_give_equal_files(tiny_run, folders, tmp_path):
    again = export(tiny_run.run, ExportRequest(("onnx", "litert", "openvino", "keras"), tmp_path / "x"), Silent())
    for one in again.exports:
        for name, data in files_below(one.folder).items():
            if name != "manifest.json":
                assert data == (folders[one.form] / name).read_bytes(), (one.form, name)


@pytest.mark.slow
def test_two_processes_give_equal_files(tiny_run, tmp_path):
    """Names that TensorFlow and tf2onnx count, and orders that they take from hashes, differ between processes."""
    for seed, names in (("1", ALL), ("2", ALL[::-1])):
        command = [sys.executable, "-m", "finetune_cli", "export", "--run", tiny_run.run.folder]
        subprocess.run(
            [*command, "--output", tmp_path / seed, *(text for name in names for text in ("--format", name))],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": seed},
            capture_output=True,
            timeout=300,
            check=True,
        )
    one, other = files_below(tmp_path / "1"), files_below(tmp_path / "2")
    assert len(one) > 20
    assert {name for name in one if Path(name).name != "manifest.json" and one[name] != other[name]} == set()
    assert set(one) == set(other)


def test_a_saved_model_holds_the_network_once(folders):
    from tensorflow.core.protobuf import saved_model_pb2

    written = saved_model_pb2.SavedModel.FromString((folders["savedmodel"] / "saved_model.pb").read_bytes())
    networks = [
        function
        for function in written.meta_graphs[0].graph_def.library.function
        if any(node.op == "Conv2D" for node in function.node_def)
    ]
    assert len(networks) == 1


@pytest.mark.slow
def test_saved_model_cli_shows_and_runs(folders, validation, tmp_path):
    _paths, pixels, measured = validation
    np.save(tmp_path / "image.npy", pixels[:2])
    tool = [Path(sys.executable).with_name("saved_model_cli")]
    where = ["--dir", folders["savedmodel"], "--tag_set", "serve"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}

    def call(*arguments):
        done = subprocess.run(
            [*tool, *arguments], env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    shown = call("show", "--dir", folders["savedmodel"], "--all")
    for text in ("serving_default", "serve_uint8", "serve_bytes", "shape: (-1, -1, -1, 3)", "DT_STRING", "class_names"):
        assert text in shown
    call("run", *where, "--signature_def", "serve_uint8", "--inputs", f"image={tmp_path / 'image.npy'}",
         "--outdir", tmp_path)  # fmt: skip
    assert np.abs(np.load(tmp_path / "probabilities.npy") - measured[:2]).max() < 1e-4


# predict --model


@pytest.mark.parametrize("form", ALL)
def test_predict_answers_as_the_run_does(form, folders, tiny_run, validation):
    paths, _pixels, measured = validation
    answer = command("predict", *paths[:6], "--model", folders[form], "--format", "jsonl", "--quiet")
    assert answer.exit_code == 0, answer.output
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    for row, expected in zip(rows, measured, strict=False):
        told = {one["label"]: one["probability"] for one in row["top"]}
        assert [told[name] for name in tiny_run.run.classes] == pytest.approx(expected, abs=1e-4)


def test_files_and_versions_can_be_named(folders, validation):
    _paths, pixels, measured = validation
    for path in (
        folders["savedmodel"].parent,
        folders["onnx"] / "model.onnx",
        folders["litert"] / "model.tflite",
        folders["openvino"] / "model.xml",
        folders["keras"] / "model.keras",
    ):
        model = opening.open_model(path, 1)
        assert tuple(model.classes) == ("ant", "bee", "wasp")
        assert np.abs(model.probabilities(pixels[:3]) - measured[:3]).max() < 1e-4


def test_files_alone_know_their_classes(folders, tmp_path, validation):
    _paths, pixels, measured = validation
    for form, names in (
        ("onnx", ["model.onnx"]),
        ("litert", ["model.tflite"]),
        ("openvino", ["model.xml", "model.bin"]),
    ):
        for name in names:
            shutil.copy(folders[form] / name, tmp_path / name)
        model = opening.open_model(tmp_path / names[0], 1)
        assert tuple(model.classes) == ("ant", "bee", "wasp")
        assert np.abs(model.probabilities(pixels[:3]) - measured[:3]).max() < 1e-4
    shutil.copy(folders["keras"] / "model.keras", tmp_path)
    with pytest.raises(WeightsError, match="does not contain its class names"):
        opening.open_model(tmp_path / "model.keras", 1)


@pytest.mark.parametrize("form", ALL)
def test_a_changed_file_is_named_before_it_is_loaded(form, folders, tmp_path):
    copy = shutil.copytree(folders[form], tmp_path / "copy")
    card = copy / "classes.json"
    card.write_text(card.read_text().replace("ant", "owl"))
    with pytest.raises(WeightsError, match=r"classes\.json is damaged"):
        opening.open_model(copy, 1)


@pytest.mark.parametrize("form", ["onnx", "litert", "openvino"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_cut_files_are_an_error(form, part, folders, tmp_path):
    name = {"onnx": "model.onnx", "litert": "model.tflite", "openvino": "model.xml"}[form]
    data = (folders[form] / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(part * len(data))])
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(WeightsError):
        opening.open_model(tmp_path / name, 1)


@pytest.mark.parametrize("form", ["onnx", "litert", "openvino"])
def test_answering_needs_only_the_runtime_of_the_form(form, folders):
    code = f"""
import json, sys
from pathlib import Path
from finetune_cli.exports import opening
opening.open_model(Path({str(folders[form])!r}), 1)
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    runtimes = {"onnx": "onnxruntime", "litert": "ai_edge_litert", "openvino": "openvino"}
    heavy = {"tensorflow", "keras", "scipy", "matplotlib", "cv2", "tf2onnx", *runtimes.values()}
    assert heavy & set(json.loads(child.stdout)) == {runtimes[form]}


def card_text():
    return json.dumps({"format": 1, "classes": ["a", "b"], "image": {"size": 32, "resize": "crop", "max_pixels": 99}})


@pytest.mark.parametrize("hostile", ["weights elsewhere", "weights at an absolute path", "an unknown operation"])
def test_onnx_runtime_refuses_what_it_must(hostile, tmp_path):
    """SECURITY.md says that it does; nothing of this package stands between."""
    import onnx
    from onnx import TensorProto, helper

    (tmp_path / "secret.bin").write_bytes(np.ones(2, np.float32).tobytes())
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    where = {"weights elsewhere": "../secret.bin", "weights at an absolute path": str(tmp_path / "secret.bin")}
    weights.external_data.add(key="location", value=where.get(hostile, "w.bin"))
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Fold" if hostile not in where else "Mul", ["mean", "w"], ["probabilities"]),
    ]
    ends = (
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N"])],
    )
    graph = helper.make_graph(nodes, "g", *ends, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {"finetune": card_text()})
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "w.bin").write_bytes(np.ones(2, np.float32).tobytes())
    (tmp_path / "inner" / "model.onnx").write_bytes(model.SerializeToString())
    assert onnx.load(tmp_path / "inner" / "model.onnx", load_external_data=False).graph.node[0].op_type == "ReduceMean"
    with pytest.raises(WeightsError, match="cannot be loaded as an ONNX model"):
        opening.open_model(tmp_path / "inner" / "model.onnx", 1)


CHANGED_LITERT = """
import random, sys
from pathlib import Path
from finetune_cli.errors import WeightsError
from finetune_cli.exports import opening
data, path, rng, refused = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), random.Random(0), 0
for _ in range(30):
    changed = bytearray(data)
    for _place in range(8):
        changed[rng.randrange(8, 400)] = rng.randrange(256)
    path.write_bytes(changed)
    try:
        opening.open_model(path, 1)
    except WeightsError:
        refused += 1
print(refused)
"""


def test_litert_refuses_changed_structures(folders, tmp_path):
    command = [sys.executable, "-c", CHANGED_LITERT, folders["litert"] / "model.tflite", tmp_path / "model.tflite"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert int(child.stdout) >= 25


def test_what_is_no_export(folders, tmp_path, tiny_run):
    (tmp_path / "x.pkl").write_bytes(b"x")
    for path, words in (
        (tmp_path / "absent", "there is no model"),
        (tmp_path, "not made by finetune export"),
        (tmp_path / "x.pkl", "is not an exported model"),
        (folders["savedmodel"] / "saved_model.pb", "a part of a SavedModel"),
        (folders["onnx"].parent, "holds several models"),
        (tiny_run.run.folder / "inference" / "model.xml", "names no classes"),
        (tiny_run.run.folder / "model.keras", "does not contain its class names"),
    ):
        with pytest.raises(WeightsError, match=words):
            opening.open_model(path, 1)
    answer = command("predict", tmp_path / "x.pkl", "--model", tmp_path, "--run", tiny_run.run.folder)
    assert answer.exit_code == 2
    assert "cannot be combined" in answer.stderr


# The proof


def test_the_proof_is_told_and_kept(exported):
    signatures = [check.signature for one in exported.exports for check in one.checks if one.form == "savedmodel"]
    assert signatures == [
        "serving_default", "serving_default, full size", "serve_uint8", "serve_uint8, full size", "serve_bytes",
    ]  # fmt: skip
    for one in exported.exports:
        said = json.loads((one.folder / "parity.json").read_text())
        assert said["photos"] == 30
        assert said["photos_not_found"] == 0
        assert said["run_against_predictions_csv"] < 1e-5
        for check in said["checks"]:
            assert check["passed"]
            assert check["photos"] == 30
            assert check["top1_agreement"] == 1
            assert 0 <= check["mean_difference"] <= check["largest_difference"] < 1e-4
        assert one.size == sum(len(data) for data in files_below(one.folder).values())
        assert one.milliseconds > 0


def answers_with(monkeypatch, change):
    probabilities = OpenedOpenVino.probabilities
    monkeypatch.setattr(OpenedOpenVino, "probabilities", lambda self, photos: change(probabilities(self, photos)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("two classes change places", lambda p: p[:, [1, 0, 2]]),
        ("a little more than allowed", lambda p: p + np.float32(2e-4)),
        ("not a number", lambda p: p * np.float32("nan")),
        ("a class too few", lambda p: p[:, :2]),
    ],
)
@pytest.mark.parametrize("quantize", ["none", "float16"])
def test_another_answer_ends_the_export(name, change, quantize, tiny_run, tmp_path, monkeypatch):
    answers_with(monkeypatch, change)
    request = ExportRequest(("keras", "openvino"), tmp_path / "out", options={"quantize": quantize})
    if quantize == "float16" and name == "a little more than allowed":
        export(tiny_run.run, request, Silent())
        return
    with pytest.raises(GateError, match=r"openvino export does not answer as the run does|answers .* numbers"):
        export(tiny_run.run, request, Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_cannot_be_run_ends_the_export(tiny_run, tmp_path, monkeypatch):
    def crash(_self, _photos):
        raise RuntimeError("\nno such operation\nat line 3")

    monkeypatch.setattr(OpenedKeras, "probabilities", crash)
    answer = command("export", "--run", tiny_run.run.folder, "--format", "keras", "--output", tmp_path / "out")
    assert answer.exit_code == 4
    assert "cannot be run: no such operation\n" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def check(answers, reference, limit=None):
    pixels = np.zeros((1, 1, 3), np.uint8)
    photos = tuple(parity.Photo(Path(str(i)), f"photo {i}", pixels, 1, 1, None) for i in range(len(answers)))
    replay = parity.Replay(photos, np.array(reference, np.float32), missing=0, measured=0.0)
    return parity._check("x", replay, np.array(answers, np.float32), limit)


def test_the_figures_of_the_comparison():
    found = check(
        [[0.6, 0.4], [0.45, 0.55], [0.2, 0.8], [0.1, 0.9]], [[0.6, 0.4], [0.52, 0.48], [0.2, 0.8], [0.6, 0.4]]
    )
    assert found.agreement == pytest.approx(2 / 4)
    assert found.agreement_or_tie.value == pytest.approx(3 / 4)  # the second was a tie within 0.1, the fourth was not
    assert found.largest == pytest.approx(0.5)
    assert found.mean == pytest.approx((0 + 0.07 + 0 + 0.5) / 4, abs=1e-6)
    assert found.worst == "photo 3"
    assert check([[0.50009, 0.49991]], [[0.5, 0.5]], 1e-4).passed
    assert not check([[0.50011, 0.49989]], [[0.5, 0.5]], 1e-4).passed
    assert not check([[np.nan, 0.5]], [[0.5, 0.5]]).passed


@pytest.mark.parametrize(
    ("photos", "misses", "passed"),
    # The upper ends of Wilson's 95 % intervals are 0.957 and 0.933 of 24 photos, 0.956 and 0.946 of 64, 0.952 and
    # 0.951 of 1,000, and 0.949 (statsmodels.stats.proportion.proportion_confint).
    [(24, 1, True), (24, 3, True), (24, 4, False), (64, 6, True), (64, 7, False), (1000, 63, True), (1000, 65, False)],
)
def test_a_form_is_refused_when_chance_cannot_explain_its_misses(photos, misses, passed):
    reference = [[0.9, 0.1]] * photos
    found = check([[0.1, 0.9]] * misses + reference[misses:], reference)
    assert found.passed == passed
    said = found.to_json()
    low, high = said["top1_agreement_or_tie_interval"]
    assert low < said["top1_agreement_or_tie"] == 1 - misses / photos < high
    assert (high >= 0.95) == passed


def test_the_hardest_photos_are_always_replayed():
    samples = [Sample(Path(str(i)), str(i), 0, "") for i in range(1000)]
    margins = np.random.default_rng(0).permutation(1000) / 1000
    chosen = parity.choose(samples, margins.tolist())
    found = sorted(margins[int(sample.name)] for sample in chosen)
    assert len({sample.name for sample in chosen}) == 64
    assert found[:32] == [i / 1000 for i in range(32)]
    assert found[-1] == 0.999
    assert np.diff(found[32:]).max() < 0.05
    assert parity.choose(samples[:5], [0.0] * 5) == samples[:5]


def test_quantized_forms_are_smaller_and_judged_by_their_answers(tiny_run, folders, tmp_path):
    names = ["litert", "onnx", "openvino"]
    for quantize in ("float16", "int8"):
        if quantize == "int8" and importlib.util.find_spec("nncf") is None:
            names.remove("openvino")
        result = export(
            tiny_run.run, ExportRequest(names, tmp_path / quantize, options={"quantize": quantize}), Silent()
        )
        assert {one.form for one in result.exports} == set(names)
        for one in result.exports:
            (figures,) = one.checks
            assert figures.limit is None
            assert 0 < figures.largest < 0.05
            assert figures.agreement_or_tie.value == 1
            model = {"litert": "model.tflite", "onnx": "model.onnx", "openvino": "model.bin"}[one.form]
            assert (one.folder / model).stat().st_size < 0.8 * (folders[one.form] / model).stat().st_size
            assert opening.open_model(one.folder, 1).classes == tiny_run.run.classes


def replayed(run, folder, *kinds, scale=1):
    """Validation photos of `run` saved anew: (format, orientation) for the first ones, the others as they are."""
    replay = parity.collect(run, None, Silent())
    photos = list(replay.photos)
    for i, (kind, orientation) in enumerate(kinds):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"{i}.{kind}"
        image = Image.open(photos[i].path)
        image.resize((scale * image.width, scale * image.height)).save(path, kind, exif=exif, lossless=True)
        photos[i] = parity._read(Sample(path, path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()), run)
    predictor = RunPredictor(run, 1)
    reference = predictor.probabilities(np.stack([photo.pixels for photo in photos]))
    return parity.Replay(tuple(photos), reference, 0, 0.0)


def checks_of(folder, replay):
    return {check.signature: check for check in parity.compare(savedmodel.OpenedSavedModel(folder), replay, exact=True)}


def test_a_bad_file_does_not_fail_the_others_of_its_request(folders, validation):
    import tensorflow as tf

    paths, _pixels, measured = validation
    good = [path.read_bytes() for path in paths[:3]]
    serve = tf.saved_model.load(str(folders["savedmodel"])).signatures["serve_bytes"]
    answer = {
        name: value.numpy()
        for name, value in serve(
            image_bytes=tf.constant([good[0], b"no photo", good[1], good[2][: len(good[2]) // 2], b"", good[2]])
        ).items()
    }
    damaged, unknown = b"damaged, or of more than 100000000 pixels", b"neither a JPEG nor a PNG file"
    assert answer["status"].tolist() == [b"ok", unknown, b"ok", damaged, unknown, b"ok"]
    assert np.abs(answer["probabilities"][[0, 2, 5]] - measured[:3]).max() < 1e-4
    assert (answer["probabilities"][[1, 3, 4]] == 0).all()
    assert (answer["label"] == b"").tolist() == [False, True, False, True, True, False]


def test_files_that_the_bytes_signature_does_not_read_are_given_as_png(tiny_run, tmp_path, folders):
    kinds = [("WEBP", 1), ("PNG", 6), ("JPEG", 6), ("PNG", 1), ("WEBP", 8)]
    figures = checks_of(folders["savedmodel"], replayed(tiny_run.run, tmp_path, *kinds))["serve_bytes"]
    assert figures.photos == 30
    assert figures.largest < 0.01  # turned before it is resized, where the run turns it afterwards
    assert [note.partition(" given")[0] for note in figures.notes] == [
        "2 WEBP files",
        "1 PNG files with an orientation",
    ]


@pytest.mark.parametrize("kind", ["BMP", "WEBP"])
def test_sets_without_a_file_that_it_reads_prove_the_bytes_signature_too(kind, tiny_run, tmp_path, folders):
    replay = replayed(tiny_run.run, tmp_path, *[(kind, 1)] * 30)
    figures = checks_of(folders["savedmodel"], replay)["serve_bytes"]
    assert figures.photos == 30
    assert figures.largest < 1e-4
    assert figures.notes[0].startswith(f"30 {kind} files given as PNG copies")
    others = replace(replay, reference=replay.reference[:, [1, 2, 0]])
    assert not checks_of(folders["savedmodel"], others)["serve_bytes"].passed


@pytest.mark.parametrize("signature", ["serving_default", "serve_uint8"])
def test_pixels_at_full_size_are_compared(signature, tiny_run, tmp_path, folders, monkeypatch):
    replay = replayed(tiny_run.run, tmp_path, ("JPEG", 1), scale=9)  # 810 x 720 pixels
    name, figures = f"{signature}, full size", checks_of(folders["savedmodel"], replay)
    assert figures[signature].largest < 1e-5
    # The run decodes that file at a quarter of its size, and the export is given all of its pixels.
    assert figures[name].worst == "0.JPEG"
    assert 1e-4 < figures[name].largest < 0.01
    assert (figures[name].photos, figures[name].notes) == (30, ())
    turned = Image.open(replay.photos[0].path).transpose(Image.Transpose.ROTATE_90)
    turned.save(replay.photos[0].path)
    again = checks_of(folders["savedmodel"], replay)
    assert again[signature] == figures[signature]
    assert again[name].largest > 2 * figures[name].largest


@pytest.mark.parametrize(
    ("most", "photos", "note"),
    [(610_000, 4, "4 of 30 photos, 0.6 megapixels"), (1, 1, "1 of 30 photos, 0.0 megapixels")],
)
def test_few_large_photos_are_enough_at_full_size(most, photos, note, tiny_run, tmp_path, folders, monkeypatch):
    replay = replayed(tiny_run.run, tmp_path, ("JPEG", 1), scale=9)
    monkeypatch.setattr(parity, "_FULL_SIZE_PIXELS", most)
    for signature in ("serving_default, full size", "serve_uint8, full size"):
        figures = checks_of(folders["savedmodel"], replay)[signature]
        assert (figures.photos, figures.notes) == (photos, (note,))


@pytest.mark.slow
def test_odd_class_names_come_through(tmp_path):
    classes = (os.fsdecode(b"caf\xe9"), "new\nline", "tab\t,<b> \u202e \U0001f98b")
    run = runs_fixture.build(tmp_path / "odd", classes).run
    result = export(run, ExportRequest(ALL, tmp_path / "out"), Silent())
    for one in result.exports:
        assert tuple(opening.open_model(one.folder, 1).classes) == classes
    labels = (tmp_path / "out" / "litert" / "labels.txt").read_text("utf-8").splitlines()
    assert labels == ["caf\\xe9", "new\\nline", "tab\\t,<b> \\u202e \U0001f98b"]
    import tensorflow as tf

    model = tf.saved_model.load(str(tmp_path / "out" / "savedmodel" / "1"))
    answer = model.signatures["serve_uint8"](image=tf.zeros((1, 64, 64, 3), tf.uint8))
    assert answer["class_names"].numpy()[0].tolist() == [name.encode("utf-8", "surrogateescape") for name in classes]


# What can be wrong


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ExportRequest(("coreml",), Path("x")), "unknown format 'coreml'"),
        (ExportRequest((" , ",), Path("x")), "no format is named"),
        (ExportRequest(("litert",), Path("x"), options={"quantize": "int4"}), "--quantize int4 is unknown"),
        (
            ExportRequest(("keras",), Path("x"), options={"quantize": "int8"}),
            "--quantize belongs to the formats onnx, litert and openvino",
        ),
        (ExportRequest(("litert",), Path("x"), options={"layout": "nchw"}), "--layout belongs to the format onnx"),
        (ExportRequest(("savedmodel",), Path("x"), version=0), "not a positive number"),
    ],
    ids=["format", "none", "value", "quantize", "layout", "zero"],
)
def test_wrong_options(request_, words, tiny_run):
    with pytest.raises(UsageError, match=words):
        export(tiny_run.run, request_, Silent())


def test_an_unknown_format_lists_the_known_ones(tiny_run):
    answer = command("export", "--run", tiny_run.run.folder, "--format", "coreml", "--output", "x")
    assert answer.exit_code == 2
    for name in ALL:
        assert name in answer.stderr


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("litert", "ai_edge_litert")])
def test_a_missing_extra_is_named(form, package, tiny_run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(MissingExtra) as caught:
        export(tiny_run.run, ExportRequest((form,), tmp_path / "out"), Silent())
    assert caught.value.remedy == f"pip install 'finetune-cli[{form}]'"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.interpreter", None)
    assert list(tmp_path.iterdir()) == []


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest)
    )


def test_int8_of_openvino_needs_its_quantizer(tiny_run, tmp_path, monkeypatch):
    without(monkeypatch, "nncf")
    request = ExportRequest(("openvino",), tmp_path / "out", options={"quantize": "int8"})
    with pytest.raises(MissingExtra) as caught:
        export(tiny_run.run, request, Silent())
    assert caught.value.remedy == "pip install 'finetune-cli[int8]'"
    assert list(tmp_path.iterdir()) == []
    export(tiny_run.run, replace(request, options={"quantize": "float16"}), Silent())


def test_all_missing_extras_are_named_at_once(tiny_run, tmp_path, monkeypatch):
    without(monkeypatch, "tf2onnx", "ai_edge_litert")
    answer = command("export", "--run", tiny_run.run.folder, "--format", "litert,onnx", "--output", tmp_path / "out")
    assert answer.exit_code == 1
    assert "onnx and litert" in answer.stderr
    assert "pip install 'finetune-cli[onnx,litert]'" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_possible_is_exported_although_an_extra_is_missing(tiny_run, tmp_path, monkeypatch):
    without(monkeypatch, "tf2onnx", "ai_edge_litert", "tensorflow")
    out = tmp_path / "out"
    answer = command("export", "--run", tiny_run.run.folder, "--format", "all", "--output", out)
    assert answer.exit_code == 1
    assert f"finetune predict PHOTO --model {out / 'openvino'}" in answer.stdout
    assert "savedmodel and onnx and litert" in answer.stderr
    assert {path.name for path in out.iterdir()} == {"keras", "openvino"}
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is not empty"):  # adding the others names them, not all
        export(tiny_run.run, ExportRequest(("all",), out), Silent())
    without(monkeypatch, "tf2onnx")
    again = command("export", "--run", tiny_run.run.folder, "--format", "onnx,openvino", "--output", tmp_path / "one")
    assert again.exit_code == 1
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"openvino"}


def test_progress_names_the_steps(tiny_run, tmp_path):
    answer = command("export", "--run", tiny_run.run.folder, "--format", "openvino", "--output", tmp_path / "out")
    for step in ("converting and writing", "loading what was written", "replaying photos", "timing"):
        assert f"openvino: {step}: " in answer.stderr
    assert "(0/s)" not in answer.stderr
    assert "openvino: replaying photos: 30 photos in" in answer.stderr


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("litert", "ai_edge_litert.interpreter")])
def test_predict_names_a_missing_extra(form, package, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra):
        opening.open_model(folders[form], 1)


@pytest.mark.parametrize("name", ["model.keras", "inference/model.xml", "inference/model.bin", "predictions.csv"])
def test_a_damaged_run_names_the_file(name, tiny_run, tmp_path):
    run = changed_run(tiny_run, tmp_path, name, lambda data: data[:-1] + b"~")
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    with pytest.raises(RunError, match=f"{name} is damaged"):
        export(run, ExportRequest(("openvino",), tmp_path / "out"), Silent())
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run.run.folder, tmp_path / "copy")
    (copy / "run.json").unlink()
    answer = command("export", "--run", copy, "--output", tmp_path / "out")
    assert answer.exit_code == 1
    assert "not a finished run" in answer.stderr


def test_photos_that_were_moved_are_found_by_their_content(tiny_run, tmp_path):
    run = Run.load(shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "copy"))
    with pytest.raises(DataError) as caught:
        export(run, ExportRequest(("openvino",), tmp_path / "out"), Silent())
    assert "--data" in caught.value.remedy
    for i, path in enumerate(sorted(tiny_run.photos.rglob("*.png"))):
        target = tmp_path / "elsewhere" / str(i % 3) / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    result = export(run, ExportRequest(("openvino",), tmp_path / "out", root=tmp_path / "elsewhere"), Silent())
    assert (result.photos, result.missing) == (30, 0)


def test_photos_that_are_gone_or_changed_are_counted(tiny_run, tmp_path):
    run = Run.load(shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "copy"))
    photos = shutil.copytree(tiny_run.photos, tmp_path / "photos")
    first, second, *_rest = sorted((photos / "val" / "bee").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes() + b"more")
    observer = Silent()
    result = export(run, ExportRequest(("openvino",), tmp_path / "out"), observer)
    assert (result.photos, result.missing) == (28, 2)
    assert "2 validation photos" in observer.warnings[0]
    for path in (photos / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match="have changed"):
        export(run, ExportRequest(("openvino",), tmp_path / "out2"), observer)


def test_a_new_version_stands_beside_the_old_one(folders, tiny_run, tmp_path, monkeypatch):
    def write(_self, _source, folder):
        shutil.copytree(folders["savedmodel"], folder, dirs_exist_ok=True)

    monkeypatch.setattr(savedmodel.SavedModel, "write", write)
    out = tmp_path / "models"
    shutil.copytree(folders["savedmodel"], out / "3")
    before = files_below(out)
    result = export(tiny_run.run, ExportRequest(("savedmodel",), out), Silent())
    assert result.exports[0].folder == out / "4"
    assert {name: data for name, data in files_below(out).items() if name.startswith("3/")} == before
    with pytest.raises(UsageError, match="is not empty"):
        export(tiny_run.run, ExportRequest(("savedmodel",), out, version=4), Silent())


def test_an_export_is_not_added_to_another(tiny_run, tmp_path):
    out = tmp_path / "out"
    export(tiny_run.run, ExportRequest(("openvino",), out), Silent())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for names in (("savedmodel",), ("keras", "openvino")):
        for force in (False, True):
            with pytest.raises(UsageError, match="is not empty"):
                export(tiny_run.run, ExportRequest(names, out, force=force), Silent())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_force_replaces_and_a_failure_leaves_the_old_one(tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for _ in range(2):
        export(tiny_run.run, ExportRequest(("openvino",), out, force=True), Silent())
    before = files_below(tmp_path)
    with pytest.raises(UsageError, match="is not empty"):
        export(tiny_run.run, ExportRequest(("openvino",), out), Silent())
    answers_with(monkeypatch, lambda p: p[:, ::-1])
    with pytest.raises(GateError):
        export(tiny_run.run, ExportRequest(("openvino",), out, force=True), Silent())
    assert files_below(tmp_path) == before


def test_several_forms_beside_older_ones(tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(tiny_run.run, ExportRequest(("openvino", "keras"), out), Silent())
    shutil.rmtree(out / "keras")
    (out / "notes.txt").write_text("mine")
    before = files_below(tmp_path)
    with pytest.raises(UsageError, match=r"out is not empty: it holds notes\.txt"):
        export(tiny_run.run, ExportRequest(("openvino", "keras"), out), Silent())
    with monkeypatch.context() as patch:
        answers_with(patch, lambda p: p[:, ::-1])
        with pytest.raises(GateError):
            export(tiny_run.run, ExportRequest(("keras", "openvino"), out, force=True), Silent())
    assert files_below(tmp_path) == before
    export(
        tiny_run.run, ExportRequest(("keras", "openvino"), out, options={"quantize": "float16"}, force=True), Silent()
    )
    assert {path.name for path in out.iterdir()} == {"keras", "openvino", "notes.txt"}
    assert json.loads((out / "openvino" / "manifest.json").read_text())["options"]["quantize"] == "float16"


@pytest.mark.parametrize("form", [keras.KerasFile, litert.LiteRt, openvino.OpenVino])
def test_a_full_disk_leaves_nothing(form, tiny_run, tmp_path, monkeypatch):
    write = form.write

    def full(self, source, folder):
        write(self, source, folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x"))

    monkeypatch.setattr(form, "write", full)
    with pytest.raises(StorageError, match="no space left to write"):
        export(tiny_run.run, ExportRequest((form.name,), tmp_path / "out"), Silent())
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.errors import StorageError
from finetune_cli.exports.registry import FORMS
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run
run, work = Run.load(Path(sys.argv[1])), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for name in FORMS:
    try:
        export(run, ExportRequest((name,), work / "out"), Silent())
    except StorageError as exc:
        print(name, exc.problem)
    assert list(work.iterdir()) == [], name
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_real_limit_of_the_disk_leaves_nothing(tiny_run, tmp_path):
    """No file may grow beyond 10 kB: Python, TensorFlow and OpenVINO each meet that in the middle of a write."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", LIMITED, tiny_run.run.folder, tmp_path]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    assert [line.split()[0] for line in child.stdout.splitlines()] == list(ALL)


def test_no_room_is_told_before_the_work(tiny_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"of disk space, and 1\.0 MB are free"):
        export(tiny_run.run, ExportRequest(ALL, tmp_path / "out"), Silent())


@pytest.mark.parametrize("names", [("savedmodel",), ("keras", "onnx"), ("onnx",)], ids="-".join)
def test_a_file_is_no_target(names, tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        export(tiny_run.run, ExportRequest(names, tmp_path / "file", force=True), Silent())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_cannot_be_written(tiny_run):
    answer = command("export", "--run", tiny_run.run.folder, "--format", "openvino", "--output", "/proc/finetune/out")
    assert answer.exit_code == 1
    assert answer.stderr.count("error:") == 1
    assert "Traceback" not in answer.output


AS_NOBODY = """
import os, sys
from finetune_cli.cli import console
from finetune_cli.cli.app import app
from finetune_cli.config.load import load_config
from finetune_cli.exports import export  # what is imported late is imported now: root may own Python's files
import rich.text
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
app(["export", *sys.argv[1:]])
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_may_not_be_written_is_told_before_the_work(exists, tiny_run):
    """An empty folder that may be written, in one that may not: a folder beside it cannot take its place."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are private
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(tiny_run.run.folder, folder / "run")
        locked = folder / "locked"
        locked.mkdir()
        if exists:
            (locked / "out").mkdir()
            (locked / "out").chmod(0o777)
        locked.chmod(0o555)
        answer = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, "--run", "run", "--format", "openvino", "--output", "locked/out"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            check=False,
        )
        locked.chmod(0o755)
        assert answer.returncode == 1, answer.stderr
        assert f"no permission to write {locked}\n" in answer.stderr
        assert "validation photos" not in answer.stderr


def test_a_mounted_folder_gets_folders_in_it(tiny_run, tmp_path, monkeypatch):
    """A volume that is mounted for a server: a version is made in it, and the folder itself is never moved."""
    (tmp_path / "volume").mkdir()
    before = (tmp_path / "volume").stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "volume")
    with pytest.raises(StorageError, match="mounted by itself"):
        export(tiny_run.run, ExportRequest(("openvino",), tmp_path / "volume"), Silent())
    export(tiny_run.run, ExportRequest(("openvino", "keras"), tmp_path / "volume"), Silent())
    assert {path.name for path in (tmp_path / "volume").iterdir()} == {"openvino", "keras"}
    assert (tmp_path / "volume").stat().st_ino == before


def test_the_table_on_the_screen(tiny_run, tmp_path):
    answer = command(
        "export",
        "--run",
        tiny_run.run.folder,
        "--format",
        "openvino",
        "--format",
        "keras",
        "--output",
        tmp_path / "out",
    )
    assert answer.exit_code == 0, answer.output
    for text in ("compared with the run on 30 validation photos", "<= 0.0001", "100.0%", "MB", "ms per photo"):
        assert text in answer.stdout
    assert f"finetune predict PHOTO --model {tmp_path / 'out' / 'keras'}" in answer.stdout
