"""The recipe of a hundred tutorials, to measure against: `ImageDataGenerator` + `fit` through the frozen backbone.

Usage: textbook.py BACKBONE.keras|resnet50 TRAIN TEST [EPOCHS]
Prints the seconds of `fit`, those of the whole process so far, and the accuracy on TEST.
"""

import os
import sys
import time

STARTED = time.perf_counter()
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras.src.legacy.preprocessing.image import ImageDataGenerator

backbone_name, train, test = sys.argv[1:4]
epochs = int(sys.argv[4]) if len(sys.argv) > 4 else 20
keras.utils.set_random_seed(0)

image = keras.Input((224, 224, 3))
if backbone_name == "resnet50":
    backbone = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=(224, 224, 3))
    pixels = keras.applications.resnet50.preprocess_input(image)
else:
    backbone = keras.models.load_model(backbone_name)
    pixels = image
backbone.trainable = False

photos = ImageDataGenerator(horizontal_flip=True, width_shift_range=0.2, height_shift_range=0.2).flow_from_directory(
    train, target_size=(224, 224), batch_size=32, class_mode="categorical", seed=0
)
test_photos = ImageDataGenerator().flow_from_directory(
    test, target_size=(224, 224), batch_size=32, class_mode="categorical", shuffle=False
)
model = keras.Model(
    image, keras.layers.Dense(photos.num_classes, activation="softmax")(backbone(pixels, training=False))
)
model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
fit_started = time.perf_counter()
model.fit(photos, epochs=epochs, verbose=0)
fit_seconds = time.perf_counter() - fit_started
_loss, accuracy = model.evaluate(test_photos, verbose=0)
print(f"fit {fit_seconds:.1f} s, process {time.perf_counter() - STARTED:.1f} s, accuracy {accuracy:.4f}")
