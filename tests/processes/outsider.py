"""Uses exports with TensorFlow and without finetune-cli; `exports/test_export.py` compares the answers.

    python outsider.py SAVEDMODEL_FOLDER KERAS_FILE PIXELS_NPY PHOTO...

Prints JSON: the probabilities by signature, the labels, and the class names.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np


def main(saved_model, keras_file, pixels_file, *photos):
    sys.modules["finetune_cli"] = None  # any import of it fails
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    pixels = np.load(pixels_file)
    signatures = tf.saved_model.load(saved_model).signatures
    answers = {
        "serving_default": signatures["serving_default"](image=tf.constant(pixels, tf.float32)),
        "serve_uint8": signatures["serve_uint8"](image=tf.constant(pixels)),
        "serve_bytes": signatures["serve_bytes"](image_bytes=tf.constant([Path(p).read_bytes() for p in photos])),
    }
    import keras

    model = keras.models.load_model(keras_file, safe_mode=True)
    said = {name: answer["probabilities"].numpy().tolist() for name, answer in answers.items()}
    said["keras"] = np.asarray(model(pixels.astype(np.float32))).tolist()
    label, names = (answers["serve_uint8"][key].numpy() for key in ("label", "class_names"))
    said["label"] = [name.decode() for name in label]
    said["class_names"] = [[name.decode() for name in row] for row in names]
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
