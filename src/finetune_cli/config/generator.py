"""The arguments of Keras's `ImageDataGenerator`: which of them augment, and which are refused and why.

Plain data and a check of it: a wrong config is reported at once, without NumPy or Keras.
"""

from collections.abc import Mapping
from typing import Any

# The augmenting arguments of `ImageDataGenerator` and the values with which it does not change a photo.
GENERATOR_DEFAULTS: dict[str, Any] = {
    "horizontal_flip": False,
    "vertical_flip": False,
    "width_shift_range": 0.0,
    "height_shift_range": 0.0,
    "rotation_range": 0,
    "zoom_range": 0.0,
    "shear_range": 0.0,
    "brightness_range": None,
    "channel_shift_range": 0.0,
    "fill_mode": "nearest",
    "cval": 0.0,
}

_SCALING = "the model does its own scaling, so that it cannot be fed the wrong one; delete this key"
_SET_STATISTICS = "it needs statistics of the whole training set, which a pretrained backbone was not trained with"
_PHOTO_STATISTICS = "a pretrained backbone expects photos as they are, not each one brought to the same statistics"
_FIXED = "it is fixed: photos are float32 (height, width, channel), as the backbone expects"

# The other arguments of `ImageDataGenerator`, and why they are not available.
REFUSED: dict[str, str] = {
    "rescale": _SCALING,
    "preprocessing_function": _SCALING,
    "featurewise_center": _SET_STATISTICS,
    "featurewise_std_normalization": _SET_STATISTICS,
    "samplewise_center": _PHOTO_STATISTICS,
    "samplewise_std_normalization": _PHOTO_STATISTICS,
    "zca_whitening": _SET_STATISTICS,
    "zca_epsilon": "it belongs to zca_whitening, which is refused as well",
    "validation_split": "photos are split before they are augmented; set `data.val_split`",
    "data_format": _FIXED,
    "interpolation_order": "it is fixed: order 1, which is bilinear and what Keras does by default",
    "dtype": _FIXED,
}

FILL_MODES = ("nearest", "constant", "reflect", "wrap")


def problems(arguments: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each argument that is refused, unknown or invalid; empty when all are fine."""
    found = {}
    for name, value in arguments.items():
        if name in REFUSED:
            found[name] = f"is refused: {REFUSED[name]}"
        elif name not in GENERATOR_DEFAULTS:
            found[name] = f"is unknown; known are: {', '.join(GENERATOR_DEFAULTS)}"
        elif name == "fill_mode" and value not in FILL_MODES:
            found[name] = f"is {value!r}, not one of {', '.join(FILL_MODES)}"
        elif name == "cval" and not 0 <= value <= 255:
            found[name] = f"is {value}, not a grey level between 0 and 255"
        elif name == "zoom_range" and zoom_factors(value)[0] <= 0:
            found[name] = f"is {value}: the smallest factor, {zoom_factors(value)[0]:g}, must be above 0"
        elif name == "brightness_range" and value is not None and min(value) < 0:
            found[name] = f"is {value}: factors below 0 have no meaning"
    return found


def is_active(arguments: Mapping[str, Any]) -> bool:
    """Whether any transform would be drawn by all the `arguments`; filling alone does nothing."""
    plain = ("horizontal_flip", "vertical_flip", "rotation_range", "shear_range", "channel_shift_range")
    shifts = (arguments[name] for name in ("width_shift_range", "height_shift_range"))
    return (
        any(arguments[name] for name in plain)
        or any(any(shift) if isinstance(shift, list | tuple) else shift for shift in shifts)
        or zoom_factors(arguments["zoom_range"]) != (1, 1)
        or arguments["brightness_range"] is not None
    )


def zoom_factors(value: Any) -> tuple[float, float]:
    """The smallest and the largest factor of a `zoom_range`."""
    low, high = zoom_bounds(value)
    return min(low, high), max(low, high)


def zoom_bounds(value: Any) -> tuple[float, float]:
    """The two factors that a `zoom_range` stands for, in the order in which they were given."""
    low, high = (1 - value, 1 + value) if isinstance(value, int | float) else value
    return low, high
