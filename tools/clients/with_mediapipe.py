"""MediaPipe's ImageClassifier: with the files as they are, which it stretches, or with the square of `photo.py`."""

import json
import sys
from pathlib import Path

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision

folder, photos, whole = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:] == ["files"]
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

classes = json.loads(Path(folder, "classes.json").read_text("utf-8"))["classes"]
options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=f"{folder}/model.tflite"))


def image(path: str) -> mediapipe.Image:
    """The photo in the file `path`."""
    if whole:
        return mediapipe.Image.create_from_file(path)
    square = pixels(path, f"{folder}/classes.json")[0].astype(np.uint8)
    return mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=square)


with vision.ImageClassifier.create_from_options(options) as classifier:
    rows = []
    for path in photos:
        (answer,) = classifier.classify(image(path)).classifications
        scores = {category.category_name: category.score for category in answer.categories}
        rows.append([scores[name] for name in classes])
print(json.dumps(rows))
