"""The canvas that the sample scenes are painted on: light, haze, sky, trees and the traces of a camera.

A `Canvas` is twice as large as the picture that `finish` gives, which smooths the edges. Colours are RGB tuples; sizes
are pixels of the canvas; `distance` goes from 0 (here) to 1 (the horizon), where things fade into the haze.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Light:
    """An hour and its weather: the sky from top to horizon, what things fade into and how fast, how bright they are."""

    top: Colour
    horizon: Colour
    haze: Colour
    murk: float
    level: float
    tint: Colour = (255, 255, 255)
    lamps: float = 0.05


DAY = Light((84, 146, 214), (196, 222, 240), (190, 210, 228), 0.6, 1.0, lamps=0.015)
OVERCAST = Light((150, 158, 168), (205, 208, 210), (188, 193, 198), 0.7, 0.8, lamps=0.06)
GOLDEN = Light((104, 140, 190), (250, 205, 150), (236, 190, 146), 0.6, 0.95, (255, 226, 190), 0.08)
DUSK = Light((44, 46, 92), (226, 128, 98), (128, 84, 106), 0.65, 0.5, (232, 206, 226), 0.5)
NIGHT = Light((8, 11, 26), (34, 38, 62), (26, 30, 48), 0.7, 0.32, (190, 204, 255), 0.55)
FOG = Light((196, 200, 202), (212, 214, 214), (208, 211, 212), 1.05, 0.8, lamps=0.1)
LIGHTS = (DAY, DAY, DAY, OVERCAST, GOLDEN, DUSK, NIGHT, FOG)
SIZES = ((320, 240), (320, 240), (320, 240), (320, 214), (240, 320), (320, 320))


def mix(first: tuple[float, float, float], second: Colour, share: float) -> Colour:
    """`first` with this share of `second` in it."""
    share = min(max(share, 0.0), 1.0)
    rest = 1 - share
    return (
        int(first[0] * rest + second[0] * share),
        int(first[1] * rest + second[1] * share),
        int(first[2] * rest + second[2] * share),
    )


def _gradient(width: int, shares: NDArray[np.float64], first: Colour, second: Colour) -> Image.Image:
    """A picture whose rows go from `first` (share 0) to `second` (share 1)."""
    rows = shares[:, None, None]
    colours = (np.array(first) * (1 - rows) + np.array(second) * rows).astype(np.uint8)
    return Image.fromarray(colours).resize((width, len(shares)), Image.Resampling.NEAREST)


class Foot(NamedTuple):
    """Where something stands: the pixel of its foot, and how far away that is, from 0 to 1."""

    x: float
    base: float
    distance: float = 0.0


class Canvas:
    """A picture in the making, with its random numbers and its light; starts as a sky."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.light = rng.choice(LIGHTS)
        width, height = rng.choice(SIZES)
        self.w, self.h = 2 * width, 2 * height
        self.image = _gradient(self.w, np.linspace(0, 1.35, self.h).clip(0, 1), self.light.top, self.light.horizon)
        self.draw = ImageDraw.Draw(self.image)
        self.u = min(self.w, self.h) / 100
        self._heavens()

    def tone(self, colour: Colour, distance: float = 0.0) -> Colour:
        """`colour` as this light shows it at this distance."""
        light = self.light
        level = light.level / 255
        red, green, blue = (part * level * tint for part, tint in zip(colour, light.tint, strict=True))
        return mix((red, green, blue), light.haze, distance * light.murk)

    def vary(self, colour: Colour, spread: int) -> Colour:
        """`colour`, a little lighter or darker by chance."""
        step = self.rng.randint(-spread, spread)
        return (
            min(max(colour[0] + step, 0), 255),
            min(max(colour[1] + step, 0), 255),
            min(max(colour[2] + step, 0), 255),
        )

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse around (x, y)."""
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A filled rectangle; nothing if it is less than half a pixel wide or high."""
        if x1 - x0 >= 0.5 and y1 - y0 >= 0.5:
            self.draw.rectangle((x0, y0, x1, y1), fill=colour)

    def veil(self, points: Points, colour: Colour, opacity: float, blur: float = 0) -> None:
        """A translucent polygon with soft edges; made at a quarter of the size, because nobody sees more."""
        mask = Image.new("L", (self.w // 4, self.h // 4))
        ImageDraw.Draw(mask).polygon([(x / 4, y / 4) for x, y in points], fill=round(255 * opacity))
        mask = mask.filter(ImageFilter.GaussianBlur(blur / 4)) if blur else mask
        self.image.paste(colour, mask=mask.resize(self.image.size, Image.Resampling.BILINEAR))

    def ground(self, horizon: float, near: Colour, far: Colour, specks: int = 0, speck: Colour = (0, 0, 0)) -> None:
        """Everything below `horizon`: `far` there, `near` at the lower edge, with specks that grow towards us."""
        height = self.h - round(horizon)
        shares = np.linspace(0, 1, max(height, 1)) ** 0.6
        self.image.paste(_gradient(self.w, shares, self.tone(far, 0.5), self.tone(near)), (0, round(horizon)))
        tones = [self.tone(self.vary(speck, 22), 0.5 - 0.05 * step) for step in range(10)]
        for _ in range(specks):
            depth = self.rng.random() ** 1.5
            radius = self.u * (0.2 + depth)
            x, y = self.rng.uniform(0, self.w), horizon + depth * height
            self.disc(x, y, radius * 1.6, radius * 0.6, tones[int(depth * 10)])

    def conifer(self, foot: Foot, height: float, colour: Colour, snow: bool) -> None:
        """A spruce or fir."""
        x, base, distance = foot
        tiers = 5 if distance > 0.5 else 9
        width = height * self.rng.uniform(0.15, 0.24)
        self.box(x - width * 0.07, base - height * 0.12, x + width * 0.07, base, self.tone((74, 54, 40), distance))
        left: Points = [(x, base - height)]
        right: Points = [(x, base - height)]
        for tier in range(1, tiers + 1):
            y = base - height * (1 - 0.92 * tier / tiers)
            reach = width * tier / tiers
            for side, points in ((-1, left), (1, right)):
                points.append((x + side * reach * self.rng.uniform(0.85, 1.15), y + height * 0.03))
                points.append((x + side * reach * 0.55, y - height * 0.015))
        dark, bright = (
            self.tone(self.vary(colour, 8), distance),
            self.tone(mix(colour, (150, 180, 110), 0.22), distance),
        )
        self.draw.polygon(left + right[::-1], fill=dark)
        self.draw.polygon([*left, (x - width * 0.12, base - height * 0.1)], fill=bright)
        if snow:
            for points in (left, right):
                for (x0, y0), (x1, y1) in zip(points[1::2], points[2::2], strict=False):
                    self.draw.line((x0, y0 - 1, x1, y1 - 1), fill=self.tone((240, 244, 250), distance), width=3)

    def crown(self, x: float, y: float, radius: float, colour: Colour, distance: float = 0.0) -> None:
        """The leaves of a broadleaf tree or a bush around (x, y), lit from above on the left."""
        clumps = 6 if distance > 0.5 or radius < 5 * self.u else 13
        layers = ((0.0, (20, 30, 20), 0.45, 0.55), (-0.13, colour, 0.0, 0.45), (-0.28, (236, 240, 170), 0.2, 0.22))
        for shift, tint, share, size in layers:
            tones = [self.tone(self.vary(mix(colour, tint, share), 10), distance) for _ in range(3)]
            for clump in range(clumps):
                angle, reach = self.rng.random() * 2 * math.pi, self.rng.random() ** 0.5 * radius * 0.65
                px, py = x + math.cos(angle) * reach + shift * radius, y + math.sin(angle) * reach + shift * radius
                width = radius * size * (0.6 + 0.5 * self.rng.random())
                self.disc(px, py, width, width * 0.85, tones[clump % 3])

    def broadleaf(self, x: float, base: float, height: float, colour: Colour | None, distance: float = 0.0) -> None:
        """A broadleaf tree with its foot at (x, base); `None` for a bare one in winter."""
        wood = self.tone(self.vary((84, 66, 50), 14), distance)
        thick = max(height * 0.035, 1.5)
        self.draw.polygon(
            [(x - thick, base), (x + thick, base), (x + thick * 0.5, base - height * 0.6), (x, base - height * 0.6)],
            fill=wood,
        )
        if colour is None:
            self._twigs((x, base - height * 0.45), -math.pi / 2, height * 0.26, thick, wood)
        else:
            self.crown(x, base - height * 0.68, height * 0.32, colour, distance)

    def _twigs(self, start: tuple[float, float], angle: float, length: float, thick: float, colour: Colour) -> None:
        end = (start[0] + math.cos(angle) * length, start[1] + math.sin(angle) * length)
        self.draw.line((*start, *end), fill=colour, width=max(round(thick), 1))
        if length > 3 * self.u:
            for turn in (-0.55, 0.05, 0.6):
                side = angle + turn + self.rng.uniform(-0.2, 0.2)
                self._twigs(end, side, length * self.rng.uniform(0.6, 0.75), thick * 0.55, colour)

    def far_wood(self, foot: float, height: float, colours: Sequence[Colour], distance: float, pointed: bool) -> None:
        """A closed row of distant trees along the whole picture, standing at `foot`; `pointed` for conifers."""
        step = height * (0.28 if pointed else 0.5)
        self.box(0, foot - height * 0.5, self.w, foot, self.tone(mix(colours[0], (16, 24, 18), 0.35), distance))
        tones = [self.tone(self.vary(colour, 8), distance) for colour in colours for _ in range(3)]
        x = -step
        while x < self.w + step:
            tall, tone = height * self.rng.uniform(0.6, 1), self.rng.choice(tones)
            if pointed:
                self.draw.polygon([(x - step, foot), (x, foot - tall), (x + step, foot)], fill=tone)
            else:
                self.disc(x, foot - tall * 0.6, step * 0.9, tall * 0.4, tone)
            x += step * self.rng.uniform(0.4, 0.9)

    def _heavens(self) -> None:
        """Stars and a moon, or a sun and clouds."""
        rng, light = self.rng, self.light
        if light is NIGHT:
            for _ in range(70):
                glow = rng.randint(90, 230)
                x, y = rng.uniform(0, self.w), rng.uniform(0, 0.6) * self.h
                self.draw.rectangle((x, y, x + 1, y + 1), fill=(glow, glow, min(glow + 15, 255)))
        if light in (NIGHT, DAY, GOLDEN, DUSK) and rng.random() < 0.5:
            low = light in (GOLDEN, DUSK)
            x, y = rng.uniform(0.1, 0.9) * self.w, rng.uniform(0.3, 0.5) * self.h if low else 0.15 * self.h
            radius = rng.uniform(3, 5) * self.u
            colour = (232, 232, 220) if light is NIGHT else mix((255, 250, 225), light.horizon, 0.2)
            around = [(x + 3 * radius * math.cos(t), y + 3 * radius * math.sin(t)) for t in range(7)]
            self.veil(around, colour, 0.35, 3 * radius)
            self.disc(x, y, radius, radius, colour)
        if light in (DAY, GOLDEN, DUSK, OVERCAST):
            self._clouds(rng.randint(0, 5) if light is not OVERCAST else 9)

    def _clouds(self, number: int) -> None:
        mask = Image.new("L", (self.w // 6, self.h // 10))
        draw = ImageDraw.Draw(mask)
        for _ in range(number):
            x, y = self.rng.uniform(0, mask.width), self.rng.uniform(0, mask.height * 0.75)
            for _ in range(7):
                px, py, r = x + self.rng.gauss(0, 9), y + self.rng.gauss(0, 1.6), self.rng.uniform(2, 5)
                draw.ellipse((px - 1.7 * r, py - r * 0.7, px + 1.7 * r, py + r * 0.7), fill=self.rng.randint(90, 210))
        soft = mask.filter(ImageFilter.GaussianBlur(1.6)).resize((self.w, self.h * 6 // 10), Image.Resampling.BILINEAR)
        self.image.paste(mix((255, 255, 255), self.light.haze, 0.25 if self.light is DAY else 0.75), (0, 0), soft)

    def finish(self, snow: bool = False) -> Image.Image:
        """The picture at its final size, with rain or snow in the air, a tilt of the camera, and sensor noise."""
        rng = self.rng
        if snow and rng.random() < 0.4:
            for _ in range(180):
                radius = rng.uniform(0.8, 2.8)
                self.disc(rng.uniform(0, self.w), rng.uniform(0, self.h), radius, radius, (244, 246, 250))
        elif self.light is OVERCAST and rng.random() < 0.4:
            for _ in range(160):
                x, y, length = rng.uniform(0, self.w), rng.uniform(0, self.h), rng.uniform(6, 20)
                self.draw.line((x, y, x - length * 0.25, y + length), fill=mix(self.light.haze, (255, 255, 255), 0.3))
        pixels = np.asarray(self.image.reduce(2), dtype=np.float32)
        noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(pixels.shape[:2], dtype=np.float32)
        pixels = pixels * np.float32(rng.uniform(0.88, 1.1)) + noise[..., None] * np.float32(rng.uniform(1, 5))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
