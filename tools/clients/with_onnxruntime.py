"""ONNX Runtime with `photo.py`, or with Pillow's own pixels where the model resizes them."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder, photos = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
any_size = session.get_inputs()[0].type == "tensor(uint8)"


def given(path: str) -> np.ndarray:
    """The photo in the file `path` as the input of the model."""
    if any_size:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    return pixels(path, f"{folder}/classes.json")


rows = [session.run(["probabilities"], {"image": given(path)})[0][0].tolist() for path in photos]
print(json.dumps(rows))
