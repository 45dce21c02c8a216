"""Keras with `photo.py`; the variable KERAS_BACKEND chooses what it runs on."""

import json
import sys

import keras
import numpy as np

folder, photos = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

model = keras.models.load_model(f"{folder}/model.keras", safe_mode=True)
rows = [model.predict_on_batch(pixels(path, f"{folder}/classes.json"))[0] for path in photos]
print(json.dumps(np.asarray(rows).tolist()))
