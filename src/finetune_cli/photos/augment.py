"""Views of a photo: the transforms that Keras would draw, applied by OpenCV.

In: ``uint8 (size, size, 3)`` RGB as `decode.decode` makes it, the photo's digest and a view number. Out: the same
shape and type. View 0 is the photo itself. The transform of view i >= 1 is what `get_random_transform` of Keras's
`ImageDataGenerator` draws, bit for bit, seeded by (seed, digest, i) alone, so that order, threads, batches and machines
do not matter. `Augmenter.apply` equals the generator's own `apply_transform` within 1 grey level on average, whatever
the arguments and the fill mode, and takes a tenth of its time (`tests/photos/test_augment.py` compares them).

One bug is fixed: in Keras 3 `width_shift_range` moves the picture down and `height_shift_range` sideways. Here both
do what their names say.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.config.generator import GENERATOR_DEFAULTS, is_active, problems, zoom_bounds
from finetune_cli.errors import ConfigError

# Part of the cache key of every augmented view: raise it when `draw` or `apply` give other pixels than before.
_VERSION = 1

Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Transform:
    """What `ImageDataGenerator.apply_transform` takes, field by field: degrees, pixels and factors.

    `tx` and `ty` move the picture along its width and its height; positive values move it left and up.
    """

    theta: float = 0.0
    tx: float = 0.0
    ty: float = 0.0
    shear: float = 0.0
    zx: float = 1.0
    zy: float = 1.0
    flip_horizontal: bool = False
    flip_vertical: bool = False
    channel_shift_intensity: float | None = None
    brightness: float | None = None


class Augmenter:
    """Draws and applies the views of photos; safe to use from several threads.

    `arguments`: augmenting arguments of `ImageDataGenerator` (those left out keep their defaults). `views`: the number
    of views of a photo, view 0 included. `size`: the side of the square photos in pixels, for shifts given as
    fractions. Raises `ConfigError` for refused, unknown or invalid arguments.
    """

    def __init__(self, arguments: Mapping[str, Any], views: int, seed: int, size: int) -> None:
        found = problems(arguments)
        if found:
            message = "; ".join(f"`{name}` {text}" for name, text in found.items())
            raise ConfigError(message, "fix the section `augmentation` of the config")
        self._arguments = {**GENERATOR_DEFAULTS, **arguments}
        self._seed = seed
        self._size = size
        self.active = is_active(self._arguments)
        self.views = views if self.active else 1

    def with_views(self, views: int) -> "Augmenter":
        """The same transforms with another number of views; a view looks the same under either."""
        return Augmenter(self.changed, views, self._seed, self._size)

    def key(self, view: int) -> str:
        """A stable text that identifies what view `view` of a photo looks like; empty for view 0."""
        if view == 0:
            return ""
        return json.dumps(
            {"version": _VERSION, "arguments": self.changed, "seed": self._seed, "view": view}, sort_keys=True
        )

    @property
    def changed(self) -> dict[str, Any]:
        """The arguments whose values differ from Keras's defaults."""
        return {name: value for name, value in self._arguments.items() if value != GENERATOR_DEFAULTS[name]}

    def draw(self, digest: str, view: int) -> Transform:
        """The transform of view `view` (1 or more) of the photo with this digest.

        These are the numbers of `ImageDataGenerator.get_random_transform`, drawn in its order from a generator of the
        same kind and seed. Keras itself would take seconds to import, and draws from NumPy's global state, so that
        only one thread could draw at a time.
        """
        text = f"{self._seed}/{digest}/{view}".encode()
        rng = np.random.RandomState(int.from_bytes(hashlib.sha256(text).digest()[:4], "big"))
        given = self._arguments
        theta = _symmetric(rng, given["rotation_range"])
        # The height's shift is drawn first. Keras 3 calls it `tx` and then moves the photo along its width: see above.
        ty = _shift(rng, given["height_shift_range"], self._size)
        tx = _shift(rng, given["width_shift_range"], self._size)
        shear = _symmetric(rng, given["shear_range"])
        low, high = zoom_bounds(given["zoom_range"])
        zx, zy = (1.0, 1.0) if low == high == 1 else map(float, rng.uniform(low, high, 2))
        flips = [bool(rng.random_sample() < 0.5 and given[name]) for name in ("horizontal_flip", "vertical_flip")]
        shifted, brightness = given["channel_shift_range"], given["brightness_range"]
        return Transform(
            theta=theta,
            tx=tx,
            ty=ty,
            shear=shear,
            zx=zx,
            zy=zy,
            flip_horizontal=flips[0],
            flip_vertical=flips[1],
            channel_shift_intensity=_symmetric(rng, shifted) if shifted else None,
            brightness=None if brightness is None else float(rng.uniform(*brightness)),
        )

    def apply(self, image: NDArray[np.uint8], transform: Transform) -> NDArray[np.uint8]:
        """`image`, ``uint8 (n, n, 3)``, under `transform`: the same shape and type, in the order of Keras."""
        cv2 = _opencv()
        pixels: Pixels = image
        if transform.channel_shift_intensity is not None or transform.brightness is not None:
            # Like Keras: what follows the warp sees its fractions. Brightness cuts them off, where uint8 is rounded.
            pixels = image.astype(np.float32)
        matrix = _matrix(transform, image.shape[0])
        if matrix is not None:
            pixels = _warp(pixels, matrix, self._arguments["fill_mode"], self._arguments["cval"])
        if transform.channel_shift_intensity is not None:
            pixels = np.clip(pixels + np.float32(transform.channel_shift_intensity), pixels.min(), pixels.max())
        if transform.flip_horizontal or transform.flip_vertical:
            around = {(True, False): 1, (False, True): 0, (True, True): -1}
            pixels = cv2.flip(pixels, around[transform.flip_horizontal, transform.flip_vertical])
        if transform.brightness is not None:
            pixels = cv2.LUT(pixels.astype(np.uint8), _brightness_table(transform.brightness))
        return np.rint(pixels).astype(np.uint8) if pixels.dtype == np.float32 else pixels.astype(np.uint8, copy=False)

    def view(self, image: NDArray[np.uint8], digest: str, view: int) -> NDArray[np.uint8]:
        """View `view` of `image`: for 0 the image itself, else a new array."""
        return image if view == 0 else self.apply(image, self.draw(digest, view))


def _symmetric(rng: np.random.RandomState, limit: float) -> float:
    """A draw between -`limit` and `limit`; 0, without a draw, when that is 0."""
    return float(rng.uniform(-limit, limit)) if limit else 0.0


def _shift(rng: np.random.RandomState, given: float | Sequence[float], size: int) -> float:
    """A shift in pixels: a whole number n gives one of 0 to n - 1 and a list one of its own, with either sign.

    A fraction is a limit. What is below 1 is a part of the `size` of the photo.
    """
    if not given:
        return 0.0
    drawn = rng.uniform(-given, given) if isinstance(given, float) else rng.choice(given) * rng.choice([-1, 1])
    return float(drawn * size if np.max(given) < 1 else drawn)


@functools.cache
def _opencv() -> Any:
    """OpenCV with one thread per call: the callers are threads already, one for each core."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _matrix(transform: Transform, size: int) -> NDArray[np.float64] | None:
    """The ``(2, 3)`` matrix from output (x, y) to input (x, y) in pixels, about the centre; `None` when it is 1.

    Rotation, shift, shear, zoom, in this order, as in `apply_affine_transform` of Keras.
    """
    theta, shear = np.deg2rad([transform.theta, transform.shear])
    linear = (
        np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]),
        np.array([[1, -np.sin(shear)], [0, np.cos(shear)]]) @ np.diag([transform.zx, transform.zy]),
    )
    product = linear[0] @ linear[1]
    centre = np.full(2, size / 2 - 0.5)
    offset = linear[0] @ [transform.tx, transform.ty] + centre - product @ centre
    if np.array_equal(product, np.eye(2)) and not offset.any():
        return None
    return np.column_stack([product, offset])


def _warp(pixels: Pixels, matrix: NDArray[np.float64], fill_mode: str, cval: float) -> Pixels:
    """`pixels`, ``(n, n, 3)``, through `matrix`, bilinear; beyond the edges as SciPy does, and so Keras."""
    cv2 = _opencv()
    size = pixels.shape[0]
    if fill_mode == "wrap":
        return _warp_wrapped(pixels, matrix)
    border = cv2.BORDER_REFLECT if fill_mode == "reflect" else cv2.BORDER_REPLICATE
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped: Pixels = cv2.warpAffine(pixels, matrix, (size, size), flags=flags, borderMode=border)
    if fill_mode == "constant":
        # SciPy does not blend the last pixel with `cval`, as OpenCV would: it is the photo up to the centres of the
        # outermost pixels, and `cval` from there.
        x, y = _coordinates(matrix, size)
        outside = (x < 0) | (x > size - 1) | (y < 0) | (y > size - 1)
        level = cval if pixels.dtype == np.float32 else round(cval)
        cv2.copyTo(np.full_like(warped, level), outside.view(np.uint8), warped)
    return warped


def _warp_wrapped(pixels: Pixels, matrix: NDArray[np.float64]) -> Pixels:
    """Like `_warp` for SciPy's mode `wrap`, which repeats after n - 1 pixels: the last one lies on the next first."""
    cv2 = _opencv()
    last = np.float32(pixels.shape[0] - 1)
    wrapped = []
    for positions in _coordinates(matrix, pixels.shape[0]):
        quotient = positions / last
        turns = np.trunc(quotient)
        turns -= (quotient < 0) | (quotient == 1)
        wrapped.append(positions - turns * last)
    result: Pixels = cv2.remap(pixels, *wrapped, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return result


def _coordinates(matrix: NDArray[np.float64], size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each output pixel the input x and the input y, each ``float32 (size, size)``."""
    steps = np.arange(size)
    x, y = (
        (row[0] * steps).astype(np.float32)[None, :] + (row[1] * steps + row[2]).astype(np.float32)[:, None]
        for row in matrix
    )
    return x, y


def _brightness_table(factor: float) -> NDArray[np.uint8]:
    """Pillow's `ImageEnhance.Brightness` as a table of 256 grey levels: the product, clipped, fraction cut off."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor)
    return levels.clip(0, 255).astype(np.uint8)
