"""City scenes for the sample set: a skyline, a street, a row of houses, roofs from above."""

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from finetune_cli.practice.scenery import DUSK, NIGHT, Canvas, Colour, Points, mix
from finetune_cli.practice.street import ASPHALT, GLASS, LAMPLIGHT, PAINT, WALLS, street


def paint(rng: random.Random) -> Image.Image:
    """One city scene; one in six hides behind trees."""
    c = Canvas(rng)
    scene = rng.choice((_skyline, _skyline, street, street, _houses, _houses, _above))
    scene(c)
    if scene is not _above and rng.random() < 0.17:
        for _ in range(rng.randint(2, 4)):
            c.broadleaf(rng.uniform(0, c.w), c.h * 1.02, c.h * rng.uniform(0.5, 0.8), c.vary((84, 122, 62), 20))
    return c.finish(snow=False)


def _skyline(c: Canvas) -> None:
    """Three rows of buildings over water, a park or roofs."""
    rng = c.rng
    horizon = c.h * rng.uniform(0.62, 0.84)
    c.box(0, horizon - c.h * 0.03, c.w, c.h, c.tone((110, 112, 112), 0.6))
    tallest = c.h * rng.uniform(0.35, 0.6)
    for distance, share in ((0.85, 0.75), (0.5, 0.9), (0.12, 0.7)):
        x = -c.w * rng.uniform(0, 0.08)
        while x < c.w:
            width = c.u * rng.uniform(5, 15) * (1.2 - 0.5 * distance)
            middle = 1 - abs((x + width / 2) / c.w - 0.5)
            top = horizon - tallest * share * rng.uniform(0.25, 1) * middle
            _building(c, (x, top, x + width, horizon), distance)
            x += width * rng.uniform(0.85, 1.25)
    rng.choice((_water, _park, _near_roofs))(c, horizon)


def _building(c: Canvas, box: tuple[float, float, float, float], distance: float) -> None:
    """A block with a shaded side, windows and something on its roof."""
    rng, (x0, top, x1, base) = c.rng, box
    glass = rng.random() < 0.35
    wall = c.vary(rng.choice(GLASS if glass else WALLS), 12)
    c.box(x0, top, x1, base, c.tone(wall, distance))
    edge = x0 + (x1 - x0) * rng.uniform(0.72, 0.85)
    c.box(edge, top, x1, base, c.tone(mix(wall, (10, 10, 20), 0.3), distance))
    _windows(c, (x0 + 2, top + 4, edge - 1, base), wall, distance, glass)
    kind, middle, wide = rng.random(), (x0 + x1) / 2, x1 - x0
    roof = c.tone(mix(wall, (20, 20, 26), 0.35), distance)
    if kind < 0.2:
        c.draw.line((middle, top, middle, top - wide * rng.uniform(0.5, 1.2)), fill=roof, width=2)
    elif kind < 0.4:
        c.box(x0 + wide * 0.2, top - wide * 0.18, x1 - wide * 0.2, top, roof)
        c.box(x0 + wide * 0.36, top - wide * 0.32, x1 - wide * 0.36, top - wide * 0.18, roof)
    elif kind < 0.5:
        c.draw.polygon([(x0, top), (middle, top - wide * 0.6), (x1, top)], fill=roof)
    elif kind < 0.7:
        left = x0 + wide * rng.uniform(0.1, 0.6)
        c.box(left, top - wide * 0.12, left + wide * 0.25, top, roof)


def _windows(c: Canvas, box: tuple[float, float, float, float], wall: Colour, distance: float, glass: bool) -> None:
    """A grid of windows, some of them lit, pasted through a mask."""
    rng = c.rng
    x0, y0 = round(box[0]), round(box[1])
    across, down = rng.choice((4, 5, 6, 8)), rng.choice((6, 7, 8, 11))
    columns, rows = (round(box[2]) - x0) // across, (round(box[3]) - y0) // down
    if columns < 1 or rows < 1:
        return
    pane = np.zeros((down, across), np.uint8)
    pane[1 : down - (1 if glass else 3), 1 : across - (0 if glass else 1)] = 255
    mask = Image.fromarray(np.tile(pane, (rows, columns)))
    c.image.paste(c.tone(mix(wall, (24, 34, 52), 0.2 if glass else 0.62), distance), (x0, y0), mask)
    lit = np.frombuffer(rng.randbytes(rows * columns), np.uint8).reshape(rows, columns) < 255 * c.light.lamps
    mask = Image.fromarray(np.kron(lit, pane).astype(np.uint8))
    c.image.paste(mix(c.vary(LAMPLIGHT, 10), c.light.haze, distance * 0.4), (x0, y0), mask)


def _water(c: Canvas, horizon: float) -> None:
    """A river that mirrors what stands above it, broken by ripples."""
    top, depth = round(horizon), c.h - round(horizon)
    above = c.image.crop((0, max(top - 2 * depth, 0), c.w, top)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = above.resize((c.w, depth)).filter(ImageFilter.GaussianBlur(2))
    c.image.paste(Image.blend(mirrored, Image.new("RGB", mirrored.size, c.tone((60, 92, 110), 0.3)), 0.5), (0, top))
    for _ in range(60):
        y = top + c.rng.random() ** 1.3 * depth
        x, length = c.rng.uniform(0, c.w), c.u * c.rng.uniform(2, 9)
        c.draw.line((x, y, x + length, y), fill=c.tone(c.vary((128, 150, 164), 30), 0.3), width=1)
    c.box(0, top - 2, c.w, top + 2, c.tone((70, 68, 66), 0.2))


def _park(c: Canvas, horizon: float) -> None:
    """Lawn and trees in front of the buildings."""
    c.ground(horizon, (92, 130, 70), (110, 140, 90), 40, (84, 120, 62))
    for _ in range(c.rng.randint(8, 16)):
        c.crown(c.rng.uniform(0, c.w), horizon, c.u * c.rng.uniform(3, 6), c.vary((74, 112, 58), 18), 0.2)


def _near_roofs(c: Canvas, horizon: float) -> None:
    """The tops of near houses."""
    x = -c.w * 0.05
    while x < c.w:
        width, top = c.u * c.rng.uniform(16, 34), horizon + c.rng.uniform(-0.02, 0.06) * c.h
        wall, roof = c.rng.choice(WALLS), c.rng.choice(((146, 78, 58), (96, 92, 94), (122, 62, 52)))
        c.box(x, top + c.u * 5, x + width, c.h, c.tone(wall))
        _windows(c, (x + 3, top + c.u * 7, x + width - 3, c.h), wall, 0, glass=False)
        eaves = [
            (x - 4, top + c.u * 6),
            (x + width * 0.15, top),
            (x + width * 0.85, top),
            (x + width + 4, top + c.u * 6),
        ]
        c.draw.polygon(eaves, fill=c.tone(c.vary(roof, 12)))
        c.box(x + width * 0.6, top - c.u * 3, x + width * 0.7, top + c.u * 2, c.tone((110, 80, 70)))
        x += width + c.u * c.rng.uniform(-1, 3)


def _houses(c: Canvas) -> None:
    """A row of old town houses from across the street."""
    rng = c.rng
    kerb = c.h * rng.uniform(0.78, 0.86)
    c.box(0, kerb, c.w, c.h, c.tone(c.vary(ASPHALT, 10)))
    c.box(0, kerb, c.w, kerb + c.u * 4, c.tone((168, 164, 158)))
    x, floor = -c.u * rng.uniform(0, 20), c.u * rng.uniform(12, 16)
    while x < c.w:
        width, floors = c.u * rng.uniform(24, 42), rng.randint(3, 5)
        _house(c, (x, kerb), width, floor * rng.uniform(0.9, 1.1), floors)
        x += width
    for _ in range(rng.randint(0, 3)):
        _car_aside(c, rng.uniform(0, c.w), kerb + c.u * rng.uniform(6, 9))
    if rng.random() < 0.4:
        c.broadleaf(rng.uniform(0, c.w), kerb + c.u * 3, c.h * rng.uniform(0.35, 0.55), c.vary((84, 124, 62), 20))


def _house(c: Canvas, corner: tuple[float, float], width: float, floor: float, floors: int) -> None:
    """One front from its lower left `corner` on: windows with frames and sills, a door or a shop, and a roof."""
    rng, (x, base) = c.rng, corner
    top = base - floor * floors
    wall = c.vary(rng.choice(WALLS), 16)
    trim, roof = mix(wall, (250, 248, 240), 0.55), c.tone(c.vary(rng.choice(((132, 70, 54), (84, 84, 92))), 12))
    kind = rng.random()
    if kind < 0.4:
        c.draw.polygon([(x, top), (x + width / 2, top - floor * 1.2), (x + width, top)], fill=roof)
    elif kind < 0.8:
        rise = floor * 0.8
        c.draw.polygon(
            [(x, top), (x + rise / 2, top - rise), (x + width - rise / 2, top - rise), (x + width, top)], fill=roof
        )
    c.box(x, top, x + width, base, c.tone(wall))
    c.box(x - 1, top, x + width + 1, top + floor * 0.12, c.tone(trim))
    bays = max(round(width / (floor * 0.62)), 2)
    for level in range(floors):
        for bay in range(bays):
            lit = rng.random() < c.light.lamps
            left = x + width * (bay + 0.25) / bays
            right, y0 = left + width * 0.5 / bays, base - floor * (floors - level) + floor * 0.3
            y1 = y0 + floor * 0.52
            c.box(left - 2, y0 - 2, right + 2, y1 + 2, c.tone(trim))
            pane = c.vary(LAMPLIGHT, 10) if lit else c.tone(mix(c.vary((74, 92, 112), 16), c.light.top, 0.2))
            c.box(left, y0, right, y1, pane)
            c.box((left + right) / 2 - 1, y0, (left + right) / 2, y1, c.tone(trim))
            c.box(left - 4, y1 + 2, right + 4, y1 + 5, c.tone(mix(wall, (30, 30, 30), 0.3)))
    ground = base - floor
    if rng.random() < 0.5:
        c.box(x + width * 0.06, ground + floor * 0.2, x + width * 0.94, base, c.tone(mix(wall, (30, 30, 36), 0.5)))
        window = LAMPLIGHT if c.light in (NIGHT, DUSK) else c.tone((120, 140, 150))
        c.box(x + width * 0.1, ground + floor * 0.36, x + width * 0.66, base - floor * 0.1, window)
        c.box(
            x + width * 0.06, ground + floor * 0.12, x + width * 0.94, ground + floor * 0.32, c.tone(rng.choice(PAINT))
        )
    door = x + width * 0.74
    c.box(
        door,
        base - floor * 0.7,
        door + floor * 0.36,
        base,
        c.tone(rng.choice(((70, 46, 34), (40, 70, 60), (90, 30, 30)))),
    )


def _car_aside(c: Canvas, x: float, base: float) -> None:
    """A parked car from its side."""
    unit, body = c.u * 6.5, c.tone(c.rng.choice(PAINT))
    roof = [(x - unit * 0.8, base - unit * 0.65), (x - unit * 0.45, base - unit * 1.1)]
    roof += [(x + unit * 0.4, base - unit * 1.1), (x + unit * 0.85, base - unit * 0.65)]
    c.draw.polygon(roof, fill=c.tone((58, 72, 86)))
    c.draw.line([*roof, roof[0]], fill=body, width=max(round(unit * 0.09), 1), joint="curve")
    c.draw.rounded_rectangle(
        (x - unit * 1.4, base - unit * 0.7, x + unit * 1.4, base - unit * 0.2), unit * 0.2, fill=body
    )
    for wheel in (-0.85, 0.85):
        c.disc(x + unit * wheel, base - unit * 0.22, unit * 0.27, unit * 0.27, c.tone((24, 24, 26)))
        c.disc(x + unit * wheel, base - unit * 0.22, unit * 0.12, unit * 0.12, c.tone((170, 172, 176)))


def _above(c: Canvas) -> None:
    """Blocks of roofs and streets from the air, turned by some angle."""
    rng = c.rng
    c.box(0, 0, c.w, c.h, c.tone((116, 116, 118), 0.1))
    angle, cell = rng.uniform(0, math.pi / 2), c.u * rng.uniform(14, 22)
    cos, sin, reach = math.cos(angle), math.sin(angle), round(max(c.w, c.h) / cell) + 1

    def turned(x: float, y: float, width: float, height: float) -> Points:
        corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
        return [(c.w / 2 + px * cos - py * sin, c.h / 2 + px * sin + py * cos) for px, py in corners]

    for row in range(-reach, reach):
        for column in range(-reach, reach):
            x, y, width = column * cell, row * cell * 1.3, cell * rng.uniform(0.55, 0.84)
            corner = turned(x, y, 0, 0)[0]
            if -cell < corner[0] < c.w + cell and -cell < corner[1] < c.h + cell:
                _roof(c, x, y, width, turned)
    for _ in range(rng.randint(15, 40)):
        lane, along = rng.randint(-reach, reach) * cell - cell * 0.08, rng.uniform(-c.w, c.w)
        c.draw.polygon(turned(lane, along, c.u, c.u * 2), fill=c.tone(rng.choice(PAINT)))
    for row in range(-reach, reach) if c.light.lamps > 0.2 else ():
        for column in range(-reach, reach):
            x, y = turned(column * cell - cell * 0.08, row * cell * 0.65, 0, 0)[0]
            c.disc(x, y, c.u * 0.7, c.u * 0.7, mix(LAMPLIGHT, c.light.haze, 0.5))
            c.disc(x, y, c.u * 0.3, c.u * 0.3, (255, 240, 204))


def _roof(c: Canvas, x: float, y: float, width: float, turned: Callable[[float, float, float, float], Points]) -> None:
    """One house from the air with its shadow, or a small park in its place."""
    rng, height = c.rng, width * 1.3
    if rng.random() < 0.12:
        c.draw.polygon(turned(x, y, width, height), fill=c.tone((96, 128, 78), 0.1))
        for _ in range(3):
            tree = turned(x + width * rng.uniform(0.2, 0.8), y + height * rng.uniform(0.2, 0.8), 0, 0)[0]
            c.crown(*tree, width * 0.2, c.vary((70, 108, 58), 12), 0.2)
        return
    roof, tall = c.vary(rng.choice((*WALLS, (158, 84, 60), (132, 66, 52))), 14), width * rng.uniform(0.06, 0.3)
    c.draw.polygon(turned(x + tall, y + tall, width, height), fill=c.tone((54, 54, 60)))
    c.draw.polygon(turned(x, y, width, height), fill=c.tone(roof, 0.1))
    c.draw.polygon(turned(x, y, width / 2, height), fill=c.tone(mix(roof, (255, 250, 240), 0.16), 0.1))
    c.draw.polygon(turned(x + width * 0.6, y + height * 0.2, width * 0.2, width * 0.2), fill=c.tone((90, 90, 94)))
