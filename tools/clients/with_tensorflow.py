"""TensorFlow with the files themselves."""

import json
import sys
from pathlib import Path

import tensorflow as tf

folder, photos = sys.argv[1], json.loads(sys.argv[2])
serve = tf.saved_model.load(folder).signatures["serve_bytes"]
rows = [
    serve(image_bytes=tf.constant([Path(path).read_bytes()]))["probabilities"][0].numpy().tolist() for path in photos
]
print(json.dumps(rows))
