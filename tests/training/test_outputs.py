"""The two saved forms of a model: proven, and on the disk whole or not at all."""

import io
import json
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import runs_fixture

from finetune_cli.backbones.source import Wanted
from finetune_cli.errors import FinetuneError, GateError, StorageError, WeightsError
from finetune_cli.head import finished
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.training import converted, outputs
from finetune_cli.training.keras_process import KerasProcess

SIZE = runs_fixture.SIZE
PHOTOS = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
TEMPERATURE = 1.5
_RNG = np.random.default_rng(1)
HEAD = Head(_RNG.normal(size=(24, 3)).astype(np.float32), _RNG.normal(size=3).astype(np.float32))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    runs_fixture.tiny_backbone().save(folder / "tiny.keras")
    converted.make(folder, "key", Wanted(str(folder / "tiny.keras"), "imagenet", SIZE, 0))
    return converted.Converted.read(folder / "backbones" / "key")


@pytest.fixture(scope="module")
def keras():
    with KerasProcess("openvino") as process:
        process.start()
        yield process


@pytest.fixture(scope="module")
def expected():
    """From Keras on TensorFlow, through a model that was never saved; the head and the softmax in NumPy."""
    features = np.asarray(runs_fixture.tiny_backbone()(PHOTOS.astype(np.float32)), np.float64)
    z = (features @ HEAD.kernel + HEAD.bias) / TEMPERATURE
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def save(folder, backbone, expected, keras):
    return outputs.save_with_proof(folder, outputs.Parts(backbone, HEAD, TEMPERATURE), PHOTOS, expected, keras)()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_answers_alike(backbone, expected, keras, tmp_path):
    parity = save(tmp_path, backbone, expected, keras)
    assert parity.photos == 3
    assert max(parity.openvino_against_keras, parity.openvino_against_measured) < 1e-5
    assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]
    with pytest.raises(GateError, match="disagrees with the trained one"):
        save(tmp_path, backbone, expected[:, ::-1], keras)


def test_a_model_of_this_process_is_saved_and_compared_here(tmp_path):
    model = runs_fixture.with_head(runs_fixture.tiny_backbone(), HEAD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # inside Keras
        measured = np.asarray(model(PHOTOS.astype(np.float32), training=False))
        parity = outputs.save_models(tmp_path, model, runtimes.convert(model), PHOTOS, measured)
        assert parity.photos == 3
        assert max(parity.openvino_against_keras, parity.openvino_against_measured) < 1e-5
        assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]
        with pytest.raises(GateError, match="disagrees with the trained one"):
            outputs.save_models(tmp_path, model, runtimes.convert(model), PHOTOS, measured[:, ::-1])


def test_without_photos_there_is_nothing_to_compare(backbone, expected, tmp_path):
    with KerasProcess("openvino") as process:
        parts = outputs.Parts(backbone, HEAD, TEMPERATURE)
        assert outputs.save_with_proof(tmp_path, parts, PHOTOS[:0], expected[:0], process)() is None
    assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]


def rewritten(path, change_config=None, change_weights=None):
    """Change a `.keras` file as a fault in this package would have written it."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config, weights = json.loads(parts["config.json"]), io.BytesIO(parts["model.weights.h5"])
    if change_config:
        change_config(config)
    if change_weights:
        with h5py.File(weights, "r+") as file:
            change_weights(file)
    parts |= {"config.json": json.dumps(config).encode(), "model.weights.h5": weights.getvalue()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


CONVOLUTION = "layers/functional/layers/conv2d/vars/0"


def swap_axes(file):
    file[CONVOLUTION][...] = np.swapaxes(file[CONVOLUTION][()], 0, 1)


def double_a_weight(file):
    file["layers/dense/vars/0"][5, 1] *= 2


def forget_to_fill_the_head(file):
    file["layers/dense/vars/0"][...] = 0


def lose_the_activation(config):
    inner = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Functional")
    layer = next(layer for layer in inner["config"]["layers"] if layer["class_name"] == "Conv2D")
    assert layer["config"]["activation"] == "relu"
    layer["config"]["activation"] = "linear"


def lose_the_temperature(config):
    next(layer for layer in config["config"]["layers"] if layer["name"] == "temperature")["config"]["scale"] = 1.0


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (None, swap_axes),
        (None, double_a_weight),
        (None, forget_to_fill_the_head),
        (lose_the_activation, None),
        (lose_the_temperature, None),
    ],
)
def test_a_wrong_model_keras_is_found(backbone, expected, keras, tmp_path, monkeypatch, config, weights):
    write = finished.write_keras

    def wrong(source, target, head, temperature):
        write(source, target, head, temperature)
        rewritten(target, config, weights)

    monkeypatch.setattr(finished, "write_keras", wrong)
    with pytest.raises(GateError, match="disagrees with the trained one"):
        save(tmp_path, backbone, expected, keras)


def nodes(model, kind):
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def swap_axes_of_photos(model):
    from openvino import opset8

    pixels = model.get_parameters()[0].output(0)
    readers = list(pixels.get_target_inputs())
    swapped = opset8.transpose(pixels, np.array([0, 2, 1, 3]))
    for reader in readers:
        reader.replace_source_output(swapped.output(0))
    model.validate_nodes_and_infer_types()


def lose_a_relu(model):
    node = nodes(model, "Relu")[0]
    node.output(0).replace(node.input_value(0))


def lose_the_last_scaling(model):
    node = nodes(model, "Multiply")[-1]
    node.output(0).replace(node.input_value(0))


def double_a_column(model):
    from openvino import opset8

    product = nodes(model, "MatMul")[-1]
    kernel = np.array(product.input_value(1).get_node().get_data())
    kernel[:, 1] *= 2
    product.input(1).replace_source_output(opset8.constant(kernel).output(0))


@pytest.mark.parametrize("fault", [swap_axes_of_photos, lose_a_relu, lose_the_last_scaling, double_a_column])
def test_a_wrong_openvino_model_is_found(backbone, expected, keras, tmp_path, monkeypatch, fault):
    make = finished.openvino_model

    def wrong(*arguments):
        model = make(*arguments)
        fault(model)
        return model

    monkeypatch.setattr(finished, "openvino_model", wrong)
    with pytest.raises(GateError, match="disagrees with the trained one"):
        save(tmp_path, backbone, expected, keras)


def test_weights_that_are_not_finite_are_found(backbone, expected, keras, tmp_path, monkeypatch):
    write = finished.write_keras

    def wrong(source, target, head, temperature):
        write(source, target, head, temperature)
        rewritten(target, None, lambda file: file["layers/dense/vars/1"].write_direct(np.full(3, np.nan, np.float32)))

    monkeypatch.setattr(finished, "write_keras", wrong)
    with pytest.raises(WeightsError, match="not finite"):
        save(tmp_path, backbone, expected, keras)


def test_a_model_that_nobody_could_prove_is_not_finished(backbone, expected, tmp_path):
    with KerasProcess("openvino") as process:
        process.start()
        process._process.kill()
        with pytest.raises(FinetuneError, match="ended unexpectedly"):
            save(tmp_path, backbone, expected, process)


def test_a_write_that_fails_leaves_neither_half_a_folder_nor_litter(backbone, expected, keras, tmp_path, monkeypatch):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "model.bin").write_bytes(b"of a killed training")

    def fail(_model, path, **_options):
        path.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("a stream broke")

    monkeypatch.setattr(runtimes.import_openvino(), "save_model", fail)
    with pytest.raises(StorageError, match=r"inference cannot be written \(\d"):
        save(tmp_path, backbone, expected, keras)
    keras.answer()
    assert names(tmp_path) == ["model.keras"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    monkeypatch.undo()
    save(tmp_path, backbone, expected, keras)
    assert names(tmp_path) == ["inference/model.bin", "inference/model.xml", "model.keras"]


def test_the_folder_appears_when_it_is_whole(backbone, expected, keras, tmp_path, monkeypatch):
    ov, seen = runtimes.import_openvino(), []
    write = ov.save_model

    def watched(model, path, **options):
        seen.append((tmp_path / "inference").exists())
        write(model, path, **options)
        seen.append((tmp_path / "inference").exists())

    monkeypatch.setattr(ov, "save_model", watched)
    save(tmp_path, backbone, expected, keras)
    assert seen == [False, False]
    assert (tmp_path / "inference" / "model.xml").is_file()


@pytest.mark.parametrize("n_classes", [2, 3, 40])
def test_the_archive_is_what_keras_itself_would_have_saved(backbone, tmp_path, n_classes):
    from finetune_cli.head import classifier
    from finetune_cli.keras_setup import import_keras

    rng = np.random.default_rng(n_classes)
    head = Head(rng.normal(size=(24, n_classes)).astype(np.float32), rng.normal(size=n_classes).astype(np.float32))
    finished.write_keras(backbone.template, tmp_path / "ours.keras", head, TEMPERATURE)
    load = import_keras().models.load_model
    outer = load(backbone.template, safe_mode=True, compile=False)
    inner = next(layer for layer in outer.layers if layer.name == "tiny")
    theirs = classifier.build(inner, head, TEMPERATURE, [str(i) for i in range(n_classes)])
    theirs.save(tmp_path / "theirs.keras")
    found = []
    for name in ("ours", "theirs"):
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            arrays = {}
            with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
                file.visititems(
                    lambda path, item, arrays=arrays: (
                        arrays.update({path: item[()].tolist()}) if isinstance(item, h5py.Dataset) else None
                    )
                )
            found.append((json.loads(archive.read("config.json")), arrays, set(archive.namelist())))
    assert found[0] == found[1]
    ours = load(tmp_path / "ours.keras", safe_mode=True, compile=False)
    photos = PHOTOS.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(ours(photos)), np.asarray(theirs(photos)))
