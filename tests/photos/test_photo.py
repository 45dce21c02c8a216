"""`photo.py` as it lies beside an export: alone, with Pillow and NumPy, and with the pixels of `decode`.

`test_decode.py` and `test_bad_images.py` compare the two on every odd picture that they decode.
"""

import ast
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from paths import SOURCE
from PIL import Image

from finetune_cli.photos.decode import ImageSettings, decode
from finetune_cli.photos.photo import pixels
from finetune_cli.photos.settings import to_json

FILE = SOURCE / "finetune_cli" / "photos" / "photo.py"


def card(folder, settings):
    path = folder / "classes.json"
    path.write_text(json.dumps({"classes": ["蜜蜂", "fourmi"], "image": to_json(settings)}))
    return path


def test_it_needs_pillow_and_numpy_alone():
    roots = set()
    for node in ast.walk(ast.parse(FILE.read_text("utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        roots |= {name.partition(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "PIL"}


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_program_with_pillow_alone_gets_the_pixels_of_the_decoder(resize, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 4), dtype=np.uint8)).resize((900, 600))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "transparent.png")
    Image.fromarray(rng.integers(0, 1 << 16, (60, 90), dtype=np.uint16)).save(tmp_path / "gray.png")
    settings = ImageSettings(96, resize)
    card(tmp_path, settings)
    (tmp_path / "photo.py").write_bytes(FILE.read_bytes())
    names = ["turned.jpg", "transparent.png", "gray.png"]
    program = f"""
import sys
sys.modules["finetune_cli"] = sys.modules["pillow_heif"] = None
import numpy
from photo import pixels
numpy.save("pixels.npy", numpy.concatenate([pixels(name, "classes.json") for name in {names}]))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60, env={"PYTHONPATH": "."})
    found = np.load(tmp_path / "pixels.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack([decode(tmp_path / name, settings) for name in names]))


def test_streams_are_read(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (10, 20, 30)).save(buffer, "PNG")
    assert pixels(io.BytesIO(buffer.getvalue()), card(tmp_path, ImageSettings(32))).max() == 30


def test_a_photo_of_too_many_pixels_is_refused(tmp_path):
    Image.new("L", (50, 40)).save(tmp_path / "photo.png")
    path = card(tmp_path, ImageSettings(32, max_pixels=1999))
    with pytest.raises(ValueError, match="50 x 40 pixels are more than 1999"):
        pixels(tmp_path / "photo.png", path)
