"""The finished model in its two forms, made of a converted backbone and a head without Keras or TensorFlow.

    backbone.xml (n, H, W, 3) -> (n, D)   + head, temperature  ->  model.xml    (n, H, W, 3) -> (n, C)
    classifier.keras, of two classes      + head, temperature  ->  model.keras

`template` makes the second of the sources, once a backbone, by Keras itself; `write_keras` changes in it what depends
on the run: the head's numbers, the number of classes and the temperature. That the files are right is not taken on
trust: before a run is finished, Keras loads the one and OpenVINO the other, and both must give the measured answers.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_cli import files
from finetune_cli.head import classifier
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference.runtimes import import_openvino

if TYPE_CHECKING:
    import openvino

# Where Keras keeps the weights of the one Dense layer of the outer model; the backbone is a model of its own.
_KERNEL, _BIAS = "layers/dense/vars/0", "layers/dense/vars/1"


def template(backbone_model: Any) -> Any:
    """The `keras.Model` of a backbone and a head of two classes, to be saved for `write_keras`."""
    width = backbone_model.output_shape[-1]
    head = Head(np.zeros((width, 2), np.float32), np.zeros(2, np.float32))
    return classifier.build(backbone_model, head, 1.0, ("0", "1"))


def write_keras(source: Path, target: Path, head: Head, temperature: float) -> None:
    """Write to `target` the archive `source`, a saved `template`, with another head and temperature.

    The file is what Keras would have saved, but for the order of what HDF5 stores. It is held in memory once.
    """
    import h5py

    with files.open_own(source) as file, zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
        metadata = json.loads(archive.read("metadata.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
    _fit_config(config, len(head.bias), temperature)
    metadata["date_saved"] = datetime.now().strftime("%Y-%m-%d@%H:%M:%S")
    with h5py.File(weights, "r+") as file:
        for path, values in ((_KERNEL, head.kernel), (_BIAS, head.bias)):
            del file[path]
            file.create_dataset(path, data=values)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getbuffer())


def _fit_config(config: dict[str, Any], n_classes: int, temperature: float) -> None:
    """Change the description of a `template` to `n_classes` and `temperature`."""
    layers = {layer["name"]: layer for layer in config["config"]["layers"]}
    layers["logits"]["config"]["units"] = n_classes
    layers["temperature"]["config"]["scale"] = 1 / temperature
    layers["temperature"]["build_config"]["input_shape"][-1] = n_classes
    for name in ("temperature", "probabilities"):
        for shape in _input_shapes(layers[name]["inbound_nodes"]):
            shape[-1] = n_classes


def _input_shapes(nodes: Any) -> Iterator[list[int | None]]:
    """The shapes of the tensors that a described layer is called with."""
    if isinstance(nodes, list):
        for node in nodes:
            yield from _input_shapes(node)
    elif isinstance(nodes, dict) and nodes.get("class_name") == "__keras_tensor__":
        yield nodes["config"]["shape"]
    elif isinstance(nodes, dict):
        yield from _input_shapes(list(nodes.values()))


def openvino_model(backbone: "openvino.Model", head: Head, temperature: float) -> "openvino.Model":
    """`backbone`, float32 pixels -> features (n, D), with the head, the temperature and the softmax appended.

    The operations become part of the new model: `backbone` is used up.
    """
    ov = import_openvino()
    from openvino import opset8 as operations

    features = backbone.output(0).get_node().input_value(0)
    logits = operations.add(operations.matmul(features, head.kernel, False, False), head.bias)
    scaled = operations.multiply(logits, np.float32(1 / temperature))
    probabilities = operations.softmax(scaled, axis=1)
    image = backbone.get_parameters()[0]
    image.set_friendly_name("image")
    image.output(0).get_tensor().set_names({"image"})
    model = ov.Model([operations.result(probabilities)], [image], "classifier")
    # Keras and OpenVINO number them through the life of a process; equal models shall give equal files.
    for i, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{i}")
            for output in node.outputs():
                output.get_tensor().set_names(set())
    probabilities.output(0).get_tensor().set_names({"probabilities"})
    return model
