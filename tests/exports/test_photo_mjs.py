"""`photo.mjs`, in Node: the resizing is Pillow's, bit for bit, whatever the size and the kind of pixels."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from paths import SOURCE
from PIL import Image

from finetune_cli.photos.photo import square

NODE = shutil.which("node")
PROGRAM = """
import { readFileSync, writeFileSync } from "node:fs";
import { pixels } from "./photo.mjs";

const cases = JSON.parse(readFileSync("cases.json"));
const results = cases.map(({ file, image, ...size }) => pixels({ data: readFileSync(file), ...size }, image));
writeFileSync("results.bin", Buffer.concat(results.map((result) => Buffer.from(result.buffer))));
"""
SIZES = [
    (64, 64),
    (150, 100),
    (100, 150),
    (40, 30),
    (30, 200),
    (200, 30),
    (1, 1),
    (1, 7),
    (700, 450),
    (451, 1003),
    (32, 48),
]
pytestmark = pytest.mark.skipif(NODE is None, reason="no Node")


def run(folder, program):
    (folder / "program.mjs").write_text(program)
    shutil.copy(SOURCE / "finetune_cli" / "exports" / "photo.mjs", folder)
    return subprocess.run([NODE, "program.mjs"], cwd=folder, capture_output=True, text=True, timeout=100, check=False)


def test_it_resizes_as_pillow_does(tmp_path):
    rng, cases, expected, differ = np.random.default_rng(0), [], [], []
    for number, (width, height) in enumerate(SIZES):
        for mode, channels in (("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)):
            shape = (height // 3 + 1, width // 3 + 1, channels)
            noise = rng.integers(0, 256, shape, dtype=np.uint8)
            photo = Image.fromarray(noise[..., 0] if channels == 1 else noise, mode).resize((width, height))
            file = f"{number}-{mode}.bin"
            (tmp_path / file).write_bytes(photo.tobytes())
            for resize in ("crop", "squash", "pad"):
                image = {"size": 48, "resize": resize, "max_pixels": 10**6}
                cases.append({"file": file, "width": width, "height": height, "image": image})
                expected.append(square(photo, photo.size, 48, resize))
                # Pillow lays transparent photos on white after resizing them, and approximates division by a block.
                differ.append(16 if "A" in mode else 1 if max(width, height) > 6 * 48 else 0)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    answer = run(tmp_path, PROGRAM)
    assert answer.returncode == 0, answer.stderr
    results = np.fromfile(tmp_path / "results.bin", np.float32).reshape(len(cases), 48, 48, 3)
    for case, result, photo, most in zip(cases, results, expected, differ, strict=True):
        difference = np.abs(result - photo)
        assert difference.max() <= most, case
        assert difference.mean() < (1 if most > 1 else 0.3), case


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("{ data: new Uint8Array(5), width: 2, height: 2 }", "5 bytes for 2 x 2 pixels"),
        ("{ data: new Uint8Array(12), width: 2, height: 2 }", "2 x 2 pixels are more than 3"),
    ],
)
def test_what_it_refuses(picture, words, tmp_path):
    program = f'import {{ pixels }} from "./photo.mjs"; pixels({picture}, {{size: 8, resize: "crop", max_pixels: 3}});'
    answer = run(tmp_path, program)
    assert answer.returncode == 1
    assert f"RangeError: {words}" in answer.stderr
