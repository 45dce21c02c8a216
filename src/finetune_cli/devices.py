"""What a network runs on, and in which precision: names that the config, runs and runtimes share."""

from typing import Literal

Device = Literal["cpu", "gpu"]
# mixed: bfloat16 or float16 for most of the work, float32 where it matters (Keras on a GPU).
Precision = Literal["float32", "bfloat16", "mixed"]
# Keras's names of the types in which the steps of a training compute. The weights are float32 in all of them.
TrainingPolicy = Literal["float32", "mixed_bfloat16", "mixed_float16"]
