"""Loads hostile OpenVINO files, each in a process of its own, for `untrusted/test_hostile_files.py`.

    python ir_child.py seed FOLDER    writes a good model, seed.xml and seed.bin, and others made of odd operations
    python ir_child.py load FOLDER    loads FOLDER/*/model.xml; one JSON line each: name, outcome, text, seconds

The outcome is `answered`, `refused` (a `RunError`), or what should not be: another error, or the number of a signal.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from finetune_cli.errors import RunError
from finetune_cli.inference import runtimes


def seed(folder: Path) -> None:
    """A network of the kinds of layer that every backbone has, 16 x 16 pixels to 3 classes, and odd ones around it."""
    ov = runtimes.import_openvino()
    from openvino import opset13 as op

    def constant(*numbers, kind=np.int64):
        return op.constant(np.array(numbers, kind))

    def save(name, make):
        image = op.parameter([-1, 16, 16, 3], np.float32, name="image")
        ov.save_model(ov.Model([make(image)], [image], name), folder / f"{name}.xml", compress_to_fp16=False)

    def good(image):
        rng = np.random.default_rng(0)
        kernel, depthwise, bias, head = (
            op.constant(rng.normal(size=shape).astype(np.float32))
            for shape in ((8, 3, 3, 3), (8, 1, 1, 3, 3), (1, 8, 1, 1), (8, 3))
        )
        x = op.transpose(image, constant(0, 3, 1, 2))
        x = op.convolution(x, kernel, [2, 2], [0, 0], [0, 0], [1, 1], "same_upper")
        x = op.clamp(op.add(x, bias), 0.0, 6.0)
        x = op.group_convolution(x, depthwise, [1, 1], [0, 0], [0, 0], [1, 1], "same_upper")
        x = op.matmul(op.reduce_mean(x, constant(2, 3), keep_dims=False), head, False, False)
        return op.softmax(op.multiply(x, constant(0.7, kind=np.float32)), 1)

    def mean(x):
        return op.reduce_mean(x, constant(1, 2), keep_dims=False)

    def doubled(times):
        def make(image):
            x = image
            for _ in range(times):
                x = op.concat([x, x], 1)
            return mean(x)

        return make

    def many(image):
        x = image
        for _ in range(25_000):
            x = op.relu(x)
        return mean(x)

    huge = constant(10**5, 10**5)
    one = constant(1.0, kind=np.float32)
    save("seed", good)
    save("unfolding", lambda image: op.add(op.reduce_sum(op.broadcast(one, huge), constant(0, 1), False), mean(image)))
    save("int8", lambda image: int8(op, mean(image)))
    save("outer product", lambda image: op.add(outer_product(op), mean(image)))
    save("endless", lambda image: op.add(
        op.reduce_sum(op.range(op.constant(np.float32(0)), op.constant(np.float32(1e11)), op.constant(np.float32(1)),
                               "f32"), constant(0), keep_dims=False), mean(image)))  # fmt: skip
    save("tiles", lambda image: mean(op.tile(image, constant(1, 10**4, 10**4, 1))))
    save("tiled photos", lambda image: mean(op.tile(image, constant(10**8, 1, 1, 1))))
    save("padding", lambda image: mean(op.pad(image, constant(0, 0, 0, 0), constant(0, 10**5, 10**5, 0), "constant")))
    save("doubled", doubled(20))
    save("doubled often", doubled(60))
    save("many layers", many)
    save("data-dependent", lambda image: op.reduce_sum(op.non_zero(image, "i64"), constant(0), keep_dims=False))


def int8(op, features):
    """A head whose weights are in int8 and are converted and scaled when they are loaded, as NNCF writes them."""
    rng = np.random.default_rng(0)
    stored = op.convert(op.constant(rng.integers(-127, 128, (3, 8), np.int8)), "f32")
    kernel = op.multiply(stored, op.constant(rng.uniform(0.01, 0.02, (1, 8)).astype(np.float32)))
    return op.softmax(op.matmul(features, kernel, False, False), 1)


def outer_product(op):
    """The sum of a product of two constants, which has many times the numbers of both."""
    column, line = (op.constant(np.ones(shape, np.float32)) for shape in ((30_000, 1), (1, 30_000)))
    return op.reduce_sum(op.multiply(column, line), op.constant(np.array([0, 1])), False)


def load(path: Path) -> dict[str, object]:
    """Load and use the model in a forked process."""
    receiver, sender = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            runtime = runtimes.OpenVinoRuntime(runtimes.read_ir(path), "float32", workers=1)
            answer = ("answered", str(runtime.infer(np.full((1, 16, 16, 3), 99, np.uint8)).shape))
        except RunError as exc:
            answer = ("refused", exc.problem)
        except BaseException as exc:
            answer = (type(exc).__name__, str(exc))
        os.write(sender, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcome, message = json.loads(text) if text else (f"signal {-code}", "")
    return {"name": path.parent.name, "outcome": outcome, "text": message, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    if sys.argv[1] == "seed":
        seed(Path(sys.argv[2]))
    else:
        runtimes.import_openvino()
        for model in sorted(Path(sys.argv[2]).glob("*/model.xml")):
            print(json.dumps(load(model)), flush=True)
