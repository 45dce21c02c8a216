"""Forest scenes for the sample set: under the trees, a forest's edge, a path between trees, crowns from above."""

import math
import random
from dataclasses import dataclass

from PIL import Image

from finetune_cli.practice.scenery import DAY, FOG, GOLDEN, NIGHT, Canvas, Colour, Foot, Points, mix


@dataclass(frozen=True)
class Season:
    """The colours of leaves and of the ground; no leaves in winter."""

    leaves: tuple[Colour, ...]
    grass: Colour
    litter: Colour
    snow: bool = False


SPRING = Season(((136, 176, 74), (116, 164, 80), (158, 186, 96)), (124, 164, 78), (116, 132, 70))
SUMMER = Season(((62, 104, 50), (76, 120, 56), (52, 92, 54), (92, 130, 60)), (98, 132, 66), (96, 100, 60))
AUTUMN = Season(((204, 132, 44), (186, 84, 40), (218, 172, 62), (150, 112, 52)), (140, 136, 72), (168, 106, 56))
WINTER = Season((), (232, 236, 242), (214, 220, 228), snow=True)
NEEDLES: tuple[Colour, ...] = ((40, 74, 54), (50, 86, 56), (34, 64, 58), (62, 90, 52))
BARK: tuple[Colour, ...] = ((92, 70, 54), (112, 84, 64), (126, 118, 106), (74, 62, 54), (138, 92, 66))
EARTH: Colour = (150, 126, 96)


def paint(rng: random.Random) -> Image.Image:
    """One forest scene; one in six holds something that people built."""
    c = Canvas(rng)
    season = rng.choice((SPRING, SUMMER, SUMMER, AUTUMN, WINTER))
    scene = rng.choice((_inside, _inside, _edge, _edge, _avenue, _above))
    scene(c, season)
    return c.finish(snow=season.snow)


def _inside(c: Canvas, season: Season) -> None:
    """Trunk behind trunk, leaves above, litter and undergrowth below."""
    rng = c.rng
    horizon = c.h * rng.uniform(0.55, 0.72)
    leaf = c.rng.choice(season.leaves or ((146, 150, 156),))
    deep = c.tone(mix(leaf, (36, 44, 36), 0.5), 0.2)
    c.box(0, 0, c.w, horizon, mix(deep, c.light.haze, 0.8 if c.light is FOG else 0.4))
    c.ground(horizon, season.litter, mix(season.litter, leaf, 0.4), 260, season.litter)
    birch, pine = rng.random() < 0.25, rng.random() < 0.4
    for layer, number in ((0.9, 16), (0.7, 11), (0.45, 7), (0.2, 4), (0.0, 2)):
        depth = 1 - layer
        if not season.snow:
            for _ in range(10):
                y = rng.uniform(-0.05, 0.45 - 0.25 * depth) * c.h
                c.crown(
                    rng.uniform(0, c.w),
                    y,
                    c.u * (5 + 9 * depth),
                    c.vary(rng.choice(season.leaves), 10),
                    max(layer, 0.1),
                )
        for _ in range(number):
            base = horizon + (c.h - horizon) * depth * rng.uniform(0.5, 1.0)
            _trunk(c, Foot(rng.uniform(0, c.w), base, layer), c.u * (0.9 + 5.5 * depth**1.5), birch, pine)
        for _ in range(4):
            y = horizon + (c.h - horizon) * depth
            plant = season.grass if season.snow else rng.choice((*season.leaves, (72, 106, 52)))
            c.crown(rng.uniform(0, c.w), y, c.u * (1 + 3.5 * depth) * rng.uniform(0.5, 1), c.vary(plant, 12), layer)
    if c.light in (DAY, GOLDEN) and rng.random() < 0.6:
        for _ in range(3):
            x, wide = rng.uniform(-0.1, 0.9) * c.w, c.u * rng.uniform(5, 14)
            slant = c.w * 0.25
            shaft: Points = [(x + slant, 0), (x + slant + wide, 0), (x + wide * 1.6, c.h), (x, c.h)]
            c.veil(shaft, (255, 246, 206), 0.24, 3 * c.u)


def _trunk(c: Canvas, foot: Foot, width: float, birch: bool, pine: bool) -> None:
    """A trunk up to the upper edge of the picture, with a lit and a dark side, and branches."""
    rng, (x, base, distance) = c.rng, foot
    bark = c.vary((216, 214, 206) if birch else (158, 98, 66) if pine else rng.choice(BARK), 12)
    lean, top = rng.uniform(-0.04, 0.04) * c.h, -c.h * 0.02
    tip = x + lean
    outline = [(x - width * 0.62, base), (x + width * 0.62, base), (tip + width * 0.4, top), (tip - width * 0.4, top)]
    c.draw.polygon(outline, fill=c.tone(mix(bark, (20, 18, 20), 0.4), distance))
    lit = [(x - width * 0.62, base), (x + width * 0.1, base), (tip + width * 0.05, top), (tip - width * 0.4, top)]
    c.draw.polygon(lit, fill=c.tone(bark, distance))
    c.disc(x, base, width * 0.95, width * 0.22, c.tone(mix(bark, (30, 36, 24), 0.6), distance))
    for _ in range(rng.randint(4, 9) if width > 2 * c.u else 2):
        share = rng.random()
        px, py = x + lean * share, base + (top - base) * share
        if birch or width > 3 * c.u:
            mark = c.tone((52, 48, 46) if birch else mix(bark, (20, 18, 20), 0.6), distance)
            left = px + width * rng.uniform(-0.45, 0.1)
            c.box(left, py, left + width * 0.3, py + max(width * 0.08, 1), mark)
        elif share > 0.4:
            side = rng.choice((-1, 1)) * width * rng.uniform(2, 5)
            c.draw.line(
                (px, py, px + side, py - abs(side) * 0.4), fill=c.tone(bark, distance), width=max(round(width * 0.2), 1)
            )


def _hills(c: Canvas, horizon: float) -> None:
    """Wooded hills or a mountain behind."""
    for distance, rise in ((1.0, 0.3), (0.8, 0.16)):
        phase, wave = c.rng.uniform(0, 6), c.rng.uniform(1.5, 4)
        ridge: Points = [
            (0, c.h),
            *(
                (x, horizon - c.h * rise * (0.55 + 0.45 * math.sin(phase + wave * x / c.w)) - c.rng.uniform(0, 2) * c.u)
                for x in range(0, c.w + 8, 8)
            ),
            (c.w, c.h),
        ]
        c.draw.polygon(ridge, fill=c.tone(mix((70, 96, 84), c.light.haze, 0.2), distance))


def _edge(c: Canvas, season: Season) -> None:
    """Rows of trees under the sky, behind a meadow, a lake or snow; at times with a hut or a pylon."""
    rng = c.rng
    horizon = c.h * rng.uniform(0.58, 0.72)
    if rng.random() < 0.7:
        _hills(c, horizon)
    needles = season.snow or rng.random() < 0.55
    built = rng.random() < 0.3
    for distance, size in ((0.75, 0.2), (0.5, 0.28), (0.25, 0.38)):
        foot = horizon + c.h * 0.05 * (1 - distance)
        behind = (mix(rng.choice(NEEDLES), (16, 24, 18), 0.3),)
        c.far_wood(foot, c.h * size * 0.5, behind, distance, needles)
        for _ in range(round(26 * (0.45 + distance) * c.w / c.h)):
            x, height = rng.uniform(-0.03, 1.03) * c.w, c.h * size * rng.uniform(0.6, 1.2)
            if needles and rng.random() < 0.93:
                c.conifer(Foot(x, foot, distance), height, rng.choice(NEEDLES), season.snow)
            else:
                c.broadleaf(x, foot, height, rng.choice(season.leaves) if season.leaves else None, distance)
    foot = horizon + c.h * 0.034
    if rng.random() < 0.3 and not season.snow:
        _lake(c, foot)
    else:
        c.ground(foot, season.grass, mix(season.grass, (60, 80, 50), 0.25), 160, season.grass)
        if rng.random() < 0.5:
            _path(c, foot, season)
    if built:
        rng.choice((_hut, _pylon))(c, rng.uniform(0.15, 0.85) * c.w, foot + c.h * 0.06)
    for _ in range(rng.randint(0, 3)):
        x, base = rng.choice((rng.uniform(-0.02, 0.2), rng.uniform(0.8, 1.02))) * c.w, c.h * rng.uniform(0.85, 1.05)
        if needles:
            c.conifer(Foot(x, base), c.h * rng.uniform(0.55, 0.95), rng.choice(NEEDLES), season.snow)
        else:
            c.broadleaf(x, base, c.h * rng.uniform(0.55, 0.9), rng.choice(season.leaves))


def _lake(c: Canvas, shore: float) -> None:
    """Still water that mirrors the trees."""
    top, depth = round(shore), c.h - round(shore)
    mirrored = c.image.crop((0, max(top - 2 * depth, 0), c.w, top)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = mirrored.resize((c.w, depth))
    c.image.paste(Image.blend(mirrored, Image.new("RGB", mirrored.size, c.tone((52, 82, 96))), 0.4), (0, top))
    for _ in range(30):
        x, y, length = c.rng.uniform(0, c.w), top + c.rng.random() * depth, c.u * c.rng.uniform(3, 14)
        c.draw.line((x, y, x + length, y), fill=c.tone((150, 170, 180), 0.3), width=1)


def _path(c: Canvas, far: float, season: Season, wide: float = 0.16) -> None:
    """A winding path from the lower edge to `far`."""
    rng = c.rng
    middle, sway, phase = c.w * rng.uniform(0.35, 0.65), c.w * rng.uniform(0.02, 0.12), rng.uniform(0, 6)
    left: Points = []
    right: Points = []
    for step in range(21):
        near = (step / 20) ** 1.6
        x, y = middle + sway * math.sin(phase + 4 * near), far + (c.h - far) * near
        half = c.w * (0.008 + wide * near)
        left.append((x - half, y))
        right.append((x + half, y))
    colour = mix(EARTH, season.litter, 0.75 if season.snow else 0.2)
    c.draw.polygon(left + right[::-1], fill=c.tone(mix(colour, (90, 90, 96), 0.15), 0.2))


def _avenue(c: Canvas, season: Season) -> None:
    """A path between trees that lean over it."""
    rng = c.rng
    horizon = c.h * rng.uniform(0.52, 0.62)
    c.far_wood(horizon + 2, c.h * rng.uniform(0.12, 0.24), season.leaves or NEEDLES, 0.8, season.snow)
    c.ground(horizon, mix(season.grass, season.litter, 0.5), season.litter, 240, season.litter)
    _path(c, horizon, season, 0.22)
    for step in range(9, -1, -1):
        depth, distance = 1.35**step, min(step / 10, 0.9)
        for side in (-1, 1):
            x = c.w / 2 + side * c.w * rng.uniform(0.5, 0.75) / depth * 1.1
            base, height = horizon + (c.h - horizon) / depth, c.h * 1.25 / depth * rng.uniform(0.8, 1.1)
            if season.snow and step % 2:
                c.conifer(
                    Foot(x + side * c.w * 0.1 / depth, base, distance), height * 0.9, rng.choice(NEEDLES), snow=True
                )
            else:
                c.broadleaf(x, base, height, c.vary(rng.choice(season.leaves), 12) if season.leaves else None, distance)
    if c.light is not NIGHT and rng.random() < 0.4:
        glow = [(c.w / 2 + 14 * c.u * math.cos(t), horizon - 8 * c.u + 14 * c.u * math.sin(t)) for t in range(7)]
        c.veil(glow, mix((255, 250, 220), c.light.horizon, 0.4), 0.7, 8 * c.u)


def _above(c: Canvas, season: Season) -> None:
    """Crowns from the air, at times cut by a track or a stream."""
    rng = c.rng
    c.box(0, 0, c.w, c.h, c.tone(mix(season.litter, (30, 44, 30), 0.2 if season.snow else 0.7), 0.1))
    colours = (*season.leaves, *NEEDLES) if season.leaves else (*NEEDLES, (196, 204, 212))
    size, cut = c.u * rng.uniform(3.5, 7), rng.random() < 0.5
    start, slope = rng.uniform(0.2, 0.8) * c.h, rng.uniform(-0.5, 0.5)
    bend, phase = c.h * rng.uniform(0.02, 0.1), rng.uniform(0, 6)

    def middle(x: float) -> float:
        return start + slope * (x - c.w / 2) + bend * math.sin(phase + 5 * x / c.w)

    if cut:
        line = [(x, middle(x)) for x in range(-10, c.w + 20, 10)]
        bed = rng.choice((EARTH, (92, 116, 124))) if not season.snow else season.litter
        c.draw.line(line, fill=c.tone(bed, 0.1), width=round(size * 1.4), joint="curve")
    spots = sorted((rng.uniform(-5, c.h), rng.uniform(-5, c.w)) for _ in range(round(c.w * c.h / size**2 / 1.6)))
    for y, x in spots:
        radius = size * rng.uniform(0.6, 1.1)
        if cut and abs(y - middle(x)) < size * 0.9 + radius * 0.6:
            continue
        colour = c.vary(rng.choice(colours), 12)
        c.disc(x + radius * 0.25, y + radius * 0.3, radius, radius, c.tone((24, 32, 28), 0.1))
        for share, shrink in ((0.0, 1.0), (0.14, 0.72), (0.28, 0.4)):
            nudge = radius * (1 - shrink) * 0.4
            c.disc(
                x - nudge, y - nudge, radius * shrink, radius * shrink, c.tone(mix(colour, (236, 240, 190), share), 0.1)
            )


def _hut(c: Canvas, x: float, base: float) -> None:
    """A small wooden hut."""
    unit = c.u * c.rng.uniform(5, 9)
    c.box(x - unit, base - unit * 0.9, x + unit, base, c.tone((116, 82, 56), 0.1))
    for plank in range(1, 5):
        y = base - unit * 0.18 * plank
        c.draw.line((x - unit, y, x + unit, y), fill=c.tone((84, 58, 40), 0.1), width=1)
    roof = [(x - unit * 1.25, base - unit * 0.85), (x, base - unit * 1.7), (x + unit * 1.25, base - unit * 0.85)]
    c.draw.polygon(roof, fill=c.tone((92, 60, 50), 0.1))
    c.box(x - unit * 0.15, base - unit * 0.6, x + unit * 0.25, base, c.tone((60, 42, 32), 0.1))
    pane = (255, 214, 138) if c.light.lamps > 0.2 else c.tone((120, 140, 150))
    c.box(x - unit * 0.7, base - unit * 0.6, x - unit * 0.4, base - unit * 0.3, pane)


def _pylon(c: Canvas, x: float, base: float) -> None:
    """A mast of a power line that crosses the wood."""
    height, steel = c.h * 0.5, c.tone((120, 124, 130), 0.3)
    foot, top = c.u * 3.5, base - height
    for side in (-1, 1):
        c.draw.line((x + side * foot, base, x + side * c.u * 0.4, top), fill=steel, width=2)
        for step in range(6):
            share, further = step / 6, (step + 1) / 6
            c.draw.line(
                (
                    x + side * foot * (1 - share),
                    base - height * share,
                    x - side * foot * (1 - further),
                    base - height * further,
                ),
                fill=steel,
                width=1,
            )
    for share in (0.7, 0.84, 0.97):
        arm, y = c.u * (9 - 5 * share), base - height * share
        c.draw.line((x - arm, y, x + arm, y), fill=steel, width=2)
        for side in (-1, 1):
            end = c.w * (side > 0)
            c.draw.line((x + side * arm, y, (x + end) / 2, y + c.u * 5, end, y - c.u), fill=steel, width=1)
