"""LiteRT's interpreter with `photo.py`."""

import json
import sys

from ai_edge_litert.interpreter import Interpreter

folder, photos = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
from photo import pixels  # noqa: E402

run = Interpreter(model_path=f"{folder}/model.tflite").get_signature_runner()
rows = [run(image=pixels(path, f"{folder}/classes.json"))["probabilities"][0].tolist() for path in photos]
print(json.dumps(rows))
