"""The image settings that are allowed, once for the config, for the manifest of a run and for the card of an export.

Without pydantic, so that `predict` can check them, too.
"""

from typing import Literal, TypeAlias, get_args

# The sides in pixels of the square that a photo becomes.
SMALLEST_SIZE, LARGEST_SIZE = 32, 1024
# The smallest limit of the pixels of a photo file.
LEAST_MAX_PIXELS = 1
# `photos.decode.ImageSettings` describes them.
Resizing: TypeAlias = Literal["crop", "squash", "pad"]
RESIZINGS: tuple[Resizing, ...] = get_args(Resizing)
