"""The Task Library's ImageClassifier: with the files as they are, or with the square of `photo.py`."""

import json
import sys
from pathlib import Path

import numpy as np
from tflite_support.task import vision

folder, photos, whole = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:] == ["files"]
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

classes = json.loads(Path(folder, "classes.json").read_text("utf-8"))["classes"]
classifier = vision.ImageClassifier.create_from_file(f"{folder}/model.tflite")


squares = []  # the images are views of them, and do not keep them alive


def image(path: str) -> vision.TensorImage:
    """The photo in the file `path`."""
    if whole:
        return vision.TensorImage.create_from_file(path)
    squares.append(pixels(path, f"{folder}/classes.json")[0].astype(np.uint8))
    return vision.TensorImage.create_from_array(squares[-1])


rows = []
for path in photos:
    (answer,) = classifier.classify(image(path)).classifications
    scores = {category.category_name: category.score for category in answer.categories}
    rows.append([scores[name] for name in classes])
print(json.dumps(rows))
