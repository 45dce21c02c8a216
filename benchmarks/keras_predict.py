"""The script that a person would write instead of `finetune predict`: Keras loads the model and one photo."""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

model = keras.models.load_model(sys.argv[1])
photo = keras.utils.load_img(sys.argv[2], target_size=model.input_shape[1:3])
print(model.predict(np.asarray(photo, np.float32)[None], verbose=0))
