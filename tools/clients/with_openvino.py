"""OpenVINO with `photo.py`, or with Pillow's own pixels where the model resizes them."""

import json
import sys

import numpy as np
import openvino
from PIL import Image, ImageOps

folder, photos = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

model = openvino.Core().read_model(f"{folder}/model.xml")
any_size = model.input("image").element_type == openvino.Type.u8
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def given(path: str) -> np.ndarray:
    """The photo in the file `path` as the input of the model."""
    if any_size:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    return pixels(path, f"{folder}/classes.json")


print(json.dumps([compiled({"image": given(path)})["probabilities"][0].tolist() for path in photos]))
