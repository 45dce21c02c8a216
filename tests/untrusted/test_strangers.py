"""A run, a backbone, weights and a config from a stranger, whose every hash is right: refused in a line, in seconds.

The tests of single modules hold many more such files; here each kind goes through the function that a command calls.
"""

import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from built import built

from finetune_cli import files
from finetune_cli.backbones.weights import load_into
from finetune_cli.config.load import load_config
from finetune_cli.errors import FinetuneError
from finetune_cli.head import classifier
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.keras_setup import import_keras
from finetune_cli.runs import checkpoints
from finetune_cli.runs.manifest import seal
from finetune_cli.runs.run import Run

Make = Callable[["Stranger"], Callable[[], Any]]
CASES: dict[str, Make] = {}
SECONDS = 5.0


class Stranger:
    """Someone with a copy of a good run, who changes files and makes the hashes fit."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.home, self.canary = folder, folder / "run", folder / "canary"
        shutil.copytree(run.folder, self.home)

    def seal(self, change: Callable[[dict[str, Any]], object] = lambda _manifest: None) -> Run:
        """Change run.json and make every hash fit."""
        path = self.home / "run.json"
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: files.sha256(self.home / name) for name in manifest["files"]}
        change(manifest)
        path.write_text(json.dumps(seal(manifest)))
        return Run.load(self.home)

    def rewrite(self, name: str, change: Callable[[bytes], bytes]) -> None:
        (self.home / name).write_bytes(change((self.home / name).read_bytes()))

    def describe(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the description inside model.keras."""
        with zipfile.ZipFile(self.home / "model.keras") as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        description = json.loads(content["config.json"])
        change(next(layer for layer in description["config"]["layers"] if layer["config"]["name"] == "logits"))
        content["config.json"] = json.dumps(description).encode()
        with zipfile.ZipFile(self.home / "model.keras", "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)


def small_model() -> Any:
    keras = import_keras()
    return keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(8, 3)])


def case(make: Make) -> Make:
    CASES[make.__name__] = make
    return make


@case
def lambda_layer_in_a_run_to_start_from(stranger: Stranger):
    keras = import_keras()
    canary = str(stranger.canary)
    layer = keras.layers.Lambda(lambda x: (os.mkdir(canary), x)[1], name="logits", output_shape=(3,))  # noqa: PTH102
    keras.Sequential([keras.Input((3,)), layer]).save(stranger.home / "model.keras")
    assert not stranger.canary.exists()
    return lambda: classifier.read(stranger.seal().file("model.keras"))


@case
def lambda_layer_in_a_backbone(stranger: Stranger):
    keras = import_keras()
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Lambda(lambda x: x[:, 0, 0]), keras.layers.ReLU()])
    model.save(stranger.folder / "backbone.keras")
    return lambda: built(stranger.folder / "backbone.keras", "imagenet", 32)


@case
def function_gadget_in_a_run_to_start_from(stranger: Stranger):
    gadget = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
    stranger.describe(lambda layer: layer["config"].update(activation=gadget))
    return lambda: classifier.read(stranger.seal().file("model.keras"))


@case
def shape_bomb_in_a_run_to_start_from(stranger: Stranger):
    stranger.describe(lambda layer: layer["config"].update(units=10**14))
    return lambda: classifier.read(stranger.seal().file("model.keras"))


@case
def shape_bomb_in_weights(stranger: Stranger):
    path = stranger.folder / "bomb.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", (10**6, 10**6), np.float32, chunks=(1000, 1000), compression="gzip")
    return lambda: load_into(small_model(), path)


@case
def external_link_in_weights(stranger: Stranger):
    secret, path = stranger.folder / "secret.h5", stranger.folder / "link.weights.h5"
    with h5py.File(secret, "w") as file:
        file["kernel"] = np.zeros((3, 3, 3, 32), np.float32)
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = h5py.ExternalLink(str(secret), "kernel")
    return lambda: load_into(small_model(), path)


@case
def weights_that_are_a_pickle(stranger: Stranger):
    path = stranger.folder / "weights.h5"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(stranger.canary).encode() + b"'\ntR.")
    return lambda: load_into(small_model(), path)


@case
def pickled_arrays_in_a_checkpoint(stranger: Stranger):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {stranger.canary}",)

    checkpoints.save(stranger.folder / "checkpoints", 1, {"kernel": np.zeros(3)}, {}, best=True)
    folder = stranger.folder / "checkpoints" / "epoch-0001"
    buffer = io.BytesIO()
    np.savez(buffer, **{"0": np.array([Payload()], dtype=object)}, allow_pickle=True)
    (folder / "arrays.npz").write_bytes(buffer.getvalue())
    names = (checkpoints.ARRAYS, checkpoints.STATE)
    (folder / checkpoints.SUMS).write_text("".join(f"{files.sha256(folder / name)}  {name}\n" for name in names))
    return lambda: checkpoints.load(folder)


@case
def path_that_leaves_the_run(stranger: Stranger):
    (stranger.folder / "outside").write_text("")
    return lambda: stranger.seal(
        lambda manifest: manifest["files"].update({"../outside": files.sha256(stranger.folder / "outside")})
    )


@case
def absolute_path_in_a_run(stranger: Stranger):
    return lambda: stranger.seal(lambda manifest: manifest["files"].update({"/etc/hostname": "0" * 64}))


@case
def truncated_openvino_weights(stranger: Stranger):
    stranger.rewrite("inference/model.bin", lambda data: data[: len(data) // 2])
    return lambda: RunPredictor(stranger.seal(), 1)


@case
def openvino_constant_out_of_bounds(stranger: Stranger):
    stranger.rewrite(
        "inference/model.xml", lambda data: re.sub(rb'offset="\d+"', b'offset="18446744073709551584"', data)
    )
    return lambda: RunPredictor(stranger.seal(), 1)


@case
def openvino_with_state(stranger: Stranger):
    stranger.rewrite("inference/model.xml", lambda data: data.replace(b'type="ReLU"', b'type="ReadValue"'))
    return lambda: RunPredictor(stranger.seal(), 1)


@case
def openvino_with_flipped_bits(stranger: Stranger):
    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        for i in range(100, len(changed), 997):
            changed[i] ^= 1 << i % 8
        return bytes(changed)

    stranger.rewrite("inference/model.xml", flip)
    return lambda: RunPredictor(stranger.seal(), 1)


@case
def billion_laughs_in_openvino_xml(stranger: Stranger):
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "ha"}">' for i in range(10))
    stranger.rewrite("inference/model.xml", lambda _data: f"<!DOCTYPE n [{laughs}]><net name='&a9;'/>".encode())
    return lambda: RunPredictor(stranger.seal(), 1)


@case
def billion_laughs_in_a_config(stranger: Stranger):
    lines = ["a: &a [x, x]"] + [f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (stranger.folder / "c.yaml").write_text("\n".join(lines))
    return lambda: load_config(stranger.folder / "c.yaml")


@case
def python_object_in_a_config(stranger: Stranger):
    (stranger.folder / "c.yaml").write_text(f"data: !!python/object/apply:os.system ['touch {stranger.canary}']")
    return lambda: load_config(stranger.folder / "c.yaml")


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(tiny_run, tmp_path, name, record_property):
    use = CASES[name](stranger := Stranger(tmp_path, tiny_run.run))
    import_keras()
    started = time.monotonic()
    with pytest.raises(FinetuneError) as caught:
        use()
    record_property("seconds", round(time.monotonic() - started, 2))
    assert time.monotonic() - started < SECONDS
    lines = caught.value.problem.splitlines()
    assert len(lines) == 1 or lines[0].endswith("in the configuration"), lines
    assert not stranger.canary.exists(), "its code ran"


def test_what_a_stranger_did_not_change_still_works(tiny_run, tmp_path):
    run = Stranger(tmp_path, tiny_run.run).seal()
    assert RunPredictor(run, 1).classes == run.classes
    assert classifier.read(run.file("model.keras")).kernel.shape[1] == len(run.classes)
