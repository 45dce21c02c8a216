"""`inspect --filters`: what the first layer of a network looks for, and where it finds it in a photo.

A picture of every filter of the first convolution: its kernel in colours, its response to the photo (red where the
photo is like it, blue where it is the opposite), strongest first, and a name for what it finds, derived from the
kernel alone.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import FinetuneError
from finetune_cli.files import atomic_output
from finetune_cli.inspection.layers import first_convolution

if TYPE_CHECKING:
    import keras
    from PIL.Image import Image

# Share of a kernel's energy in differences between the channels, from which on it is about colour. A filter that looks
# at one channel alone has 2/3, and finds brightness all the same: in photos the channels nearly move together (their
# differences had 4 % of the variance in 300 photos). Trained filters lie below 2/3 or above 0.9.
_COLOUR_SHARE = 0.8
_COHERENCE = 1 / 3  # twice as much energy along one direction as across it: from here on it has a direction
_FLAT = 0.5  # of the energy in the mean: from here on it measures brightness, not a change of it
_SILENT = 1e-3  # of the strongest kernel's energy: a filter below learned nothing
_DIRECTIONS = ["vertical lines", "rising lines", "horizontal lines", "falling lines", "vertical lines"]
_NOTHING = "nothing"
_LEGEND = """Left: the kernel, gray where it is zero. Right: its response to the photo,
red where the photo is like the kernel, blue where it is the opposite."""
_TILE, _GAP, _TEXT = 112, 8, 18  # pixels
_COLUMNS = 6
_RED, _WHITE, _BLUE = np.array([178, 24, 43]), np.array([247, 247, 247]), np.array([33, 102, 172])


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of the first layer. `strength`: standard deviation of its response, as a share of the strongest's."""

    index: int
    label: str
    strength: float


def filters(model: "keras.Model", photo: NDArray[np.uint8], output: Path) -> tuple[Filter, ...]:
    """Draw the first layer's filters and their responses to `photo` (H, W, 3), the size that `model` takes, to a PNG.

    Returns what is drawn, strongest first. Raises `FinetuneError` if no convolution looks at the three colours.
    """
    found = first_convolution(model)
    if found is None:
        raise FinetuneError(
            "this model has no convolution that looks at the three colours of a photo", "leave --filters out"
        )
    way, convolution = found
    if photo.shape != tuple(model.input_shape[1:]):
        raise ValueError(f"a photo of shape {photo.shape} for a model that takes {model.input_shape[1:]}")
    seen, mix = _what_it_sees(way, photo)
    kernels = np.einsum("hwcn,cr->nhwr", np.asarray(convolution.kernel.numpy(), np.float64), mix)
    responses = np.moveaxis(np.asarray(convolution(seen[None]))[0].astype(np.float64), -1, 0)
    spread = responses.std(axis=(1, 2))
    energy = (kernels**2).sum(axis=(1, 2, 3))
    described = [
        Filter(
            index=int(index),
            label=describe(kernels[index]) if energy[index] > _SILENT * energy.max() else _NOTHING,
            strength=float(spread[index] / spread.max()) if spread.max() else 0.0,
        )
        for index in np.argsort(-spread, kind="stable")
    ]
    picture = _draw(photo, described, kernels, responses)
    with atomic_output(output) as temporary:
        picture.save(temporary, "PNG")
    return tuple(described)


def _what_it_sees(way: Sequence[Any], photo: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The photo as the convolution gets it (h, w, c), and the matrix (c, 3) from RGB to its channels.

    The scaling in front is affine for each pixel: four photos of one colour reveal its matrix, and with it the order
    of the channels (ResNet50 takes blue first), which the kernel alone does not show.
    """
    probes = np.zeros((4, *photo.shape), np.float32)
    for colour in range(3):
        probes[colour + 1, ..., colour] = 255
    seen = np.concatenate([photo[None].astype(np.float32), probes])
    for model in way:
        seen = np.asarray(model(seen, training=False))
    middle = seen[1:, seen.shape[1] // 2, seen.shape[2] // 2].astype(np.float64)
    return seen[0], (middle[1:] - middle[0]).T / 255


def describe(kernel: NDArray[np.float64]) -> str:
    """Name what a kernel (h, w, RGB) finds: colour, brightness, lines of one direction, or spots.

    Colour, if nearly all energy lies in differences between the channels; which one, by the axis (red-green or
    blue-yellow) along which they differ most. Else the direction in which the gray kernel finds most change, in a photo
    whose power falls with the square of the frequency, as that of natural photos does (Field 1987).
    """
    gray = kernel.mean(axis=2)
    colour = kernel - gray[..., None]
    if (colour**2).sum() > _COLOUR_SHARE * (kernel**2).sum():
        red_green = ((colour @ np.array([1, -1, 0]) / math.sqrt(2)) ** 2).sum()
        blue_yellow = ((colour @ np.array([1, 1, -2]) / math.sqrt(6)) ** 2).sum()
        return "colour: red-green" if red_green > blue_yellow else "colour: blue-yellow"
    if gray.sum() ** 2 / gray.size > _FLAT * (gray**2).sum():
        return "brightness"
    power = np.abs(np.fft.fft2(gray - gray.mean(), (64, 64))) ** 2
    down, across = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    power[0, 0] = 0
    power /= np.maximum(down**2 + across**2, 1e-9)
    # Directions are the same after half a turn: double the angles, then average.
    mean = (power * np.exp(2j * np.arctan2(down, across))).sum() / power.sum()
    if abs(mean) < _COHERENCE:
        return "spots"
    change = math.degrees(np.angle(mean)) / 2 % 180  # 0: from left to right; lines run across the change
    return _DIRECTIONS[round(change / 45)]


def _draw(
    photo: NDArray[np.uint8], found: list[Filter], kernels: NDArray[np.float64], responses: NDArray[np.float64]
) -> "Image":
    from PIL import Image, ImageDraw, ImageFont

    width, height = 2 * _TILE + 3 * _GAP, _TILE + 2 * _TEXT + _GAP
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    top = 2 * _TILE + 2 * _GAP
    sheet = Image.new("RGB", (max(columns * width, 5 * _TILE), top + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(13), ImageFont.load_default(22)
    sheet.paste(Image.fromarray(photo).resize((2 * _TILE, 2 * _TILE)), (_GAP, _GAP))
    left = 2 * _TILE + 3 * _GAP
    pen.text((left, _GAP), f"The {len(found)} filters of the first layer, strongest first", "black", large)
    pen.text((left, 44), _LEGEND, "black", small, spacing=6)
    for i, text in enumerate(_counts(found)):
        pen.text((left + i // 5 * 200, 110 + i % 5 * 22), text, "black", small)
    for i, item in enumerate(found):
        x, y = i % columns * width + _GAP, top + i // columns * height
        kernel = Image.fromarray(_in_colours(kernels[item.index])).resize((_TILE, _TILE), Image.Resampling.NEAREST)
        sheet.paste(kernel, (x, y))
        if item.label != _NOTHING:  # what it answers is rounding, and would look like an answer
            response = Image.fromarray(_in_red_and_blue(responses[item.index])).resize((_TILE, _TILE))
            sheet.paste(response, (x + _TILE + _GAP, y))
        pen.rectangle((x - 1, y - 1, x + _TILE, y + _TILE), outline="gray")
        pen.text((x, y + _TILE + 2), item.label, "black", small)
        pen.text((x, y + _TILE + _TEXT), f"filter {item.index}, strength {item.strength:.0%}", "gray", small)
    return sheet


def _counts(found: list[Filter]) -> list[str]:
    """How many filters find what, the most frequent first."""
    counts = Counter(sorted(item.label for item in found))
    return [f"{count} x {label}" for label, count in counts.most_common()]


def _in_colours(kernel: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A kernel (h, w, RGB) as a picture, zero as middle gray."""
    largest = np.abs(kernel).max() or 1.0
    picture: NDArray[np.uint8] = np.round(127.5 + 127.5 * kernel / largest).astype(np.uint8)
    return picture


def _in_red_and_blue(response: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A response (h, w) as a picture: white at its median, red above, blue below."""
    centred = response - np.median(response)
    # The most extreme hundredth may saturate, so that one bright pixel does not leave the rest pale.
    share = np.clip(centred / (np.quantile(np.abs(centred), 0.99) or 1.0), -1, 1)[..., None]
    colours = np.where(share > 0, _WHITE + (_RED - _WHITE) * share, _WHITE + (_WHITE - _BLUE) * share)
    picture: NDArray[np.uint8] = np.round(colours).astype(np.uint8)
    return picture
