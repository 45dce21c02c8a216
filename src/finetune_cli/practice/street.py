"""A street towards its vanishing point, for the sample set; and the colours of a city."""

from dataclasses import dataclass

from finetune_cli.practice.scenery import Canvas, Colour, Points, mix

WALLS: tuple[Colour, ...] = (
    (168, 160, 150),
    (140, 142, 148),
    (182, 120, 92),
    (206, 192, 166),
    (150, 92, 76),
    (214, 210, 204),
    (120, 132, 142),
    (196, 170, 120),
    (112, 110, 116),
)
GLASS: tuple[Colour, ...] = ((92, 128, 156), (70, 104, 128), (124, 152, 164), (60, 78, 96))
PAINT: tuple[Colour, ...] = (
    (186, 40, 40),
    (236, 236, 236),
    (40, 44, 50),
    (56, 88, 150),
    (150, 154, 160),
    (214, 170, 50),
)
LAMPLIGHT: Colour = (255, 214, 138)
ASPHALT: Colour = (92, 92, 96)


@dataclass(frozen=True)
class _View:
    """A look along a road towards the vanishing point (x, y); `near` is the width of the road in pixels at depth 1."""

    x: float
    y: float
    near: float

    def at(self, side: float, height: float, depth: float) -> tuple[float, float]:
        """Where a point is seen; `side` (to the right) and `height` in widths of the road, from its middle."""
        return self.x + side * self.near / depth, self.y + (0.85 - height) * self.near / depth

    def quad(self, side: float, low: float, high: float, near: float, far: float) -> Points:
        """An upright rectangle along the road."""
        return [self.at(side, low, near), self.at(side, low, far), self.at(side, high, far), self.at(side, high, near)]

    def patch(self, left: float, right: float, near: float, far: float) -> Points:
        """A rectangle on the ground."""
        return [self.at(left, 0, near), self.at(right, 0, near), self.at(right, 0, far), self.at(left, 0, far)]


def street(c: Canvas) -> None:
    """A street with houses on both sides, cars, lamps and people, towards one vanishing point."""
    rng = c.rng
    height = c.h * rng.uniform(0.5, 0.6)
    view = _View(c.w * rng.uniform(0.38, 0.62), height, (c.h - height) * 1.2)
    c.ground(view.y, (150, 148, 144), (160, 158, 156))
    c.draw.polygon(view.patch(-0.75, 0.75, 0.8, 60), fill=c.tone(c.vary(ASPHALT, 12), 0.1))
    for side in (-1, 1):
        depth = 14.0
        while depth > 0.7:
            nearer = depth * rng.uniform(0.6, 0.78)
            _facade(c, view, side * 1.3, (nearer, depth), rng.uniform(1.8, 4.5))
            depth = nearer
    for step in range(12):
        depth = 0.9 * 1.35**step
        c.draw.polygon(view.patch(-0.02, 0.02, depth, depth * 1.13), fill=c.tone((230, 228, 220), 0.1))
    if rng.random() < 0.4:
        for stripe in range(-6, 7):
            left = stripe * 0.11
            c.draw.polygon(view.patch(left, left + 0.06, 1.5, 1.9), fill=c.tone((226, 224, 218)))
    for depth in sorted((rng.uniform(1.2, 8) for _ in range(rng.randint(6, 14))), reverse=True):
        rng.choice((_car, _car, _lamp, _person))(c, view, depth)


def _facade(c: Canvas, view: _View, side: float, depths: tuple[float, float], height: float) -> None:
    """The front of a house along the street between two depths, and its wall across."""
    near, far = depths
    distance = min(far / 16, 0.9)
    wall = c.vary(c.rng.choice(WALLS + GLASS[:1]), 14)
    away = side * 3
    across = [view.at(side, 0, far), view.at(away, 0, far), view.at(away, height, far), view.at(side, height, far)]
    c.draw.polygon(across, fill=c.tone(mix(wall, (20, 20, 30), 0.4), distance))
    c.draw.polygon(view.quad(side, 0, height, near, far), fill=c.tone(mix(wall, (20, 20, 30), 0.12), distance))
    floors, bays = max(round(height / 0.42), 2), max(round((far - near) / 0.35), 2) if far < 6 else 3
    shop = c.rng.random() < 0.5
    for bay in range(min(bays, 7)):
        first = near + (far - near) * (bay + 0.22) / min(bays, 7)
        last = near + (far - near) * (bay + 0.78) / min(bays, 7)
        for floor in range(floors):
            low, high = height * (floor + 0.3) / floors, height * (floor + 0.8) / floors
            if floor == 0:
                low, high = 0.06, height * 0.75 / floors
            lit = c.rng.random() < c.light.lamps * (1.6 if floor == 0 and shop else 0.8)
            pane = c.vary(LAMPLIGHT, 10) if lit else mix(wall, (26, 34, 48), 0.68)
            colour = mix(pane, c.light.haze, distance * 0.4) if lit else c.tone(pane, distance)
            c.draw.polygon(view.quad(side, low, high, first, last), fill=colour)
    if shop:
        band = view.quad(side, height * 0.8 / floors, height * 0.98 / floors, near, far)
        c.draw.polygon(band, fill=c.tone(c.rng.choice(PAINT), distance))


def _car(c: Canvas, view: _View, depth: float) -> None:
    """A car seen from behind or from the front, in one of the lanes or parked."""
    rng = c.rng
    x, base = view.at(rng.choice((-0.62, -0.3, 0.3, 0.62)), 0, depth)
    unit, distance = view.near / depth * 0.16, min(depth / 16, 0.8)
    body = c.tone(rng.choice(PAINT), distance)
    c.disc(x, base, unit * 1.1, unit * 0.16, c.tone((30, 30, 32), distance))
    for wheel in (-0.75, 0.75):
        c.box(
            x + unit * (wheel - 0.15),
            base - unit * 0.4,
            x + unit * (wheel + 0.15),
            base,
            c.tone((20, 20, 22), distance),
        )
    c.draw.rounded_rectangle((x - unit, base - unit * 0.95, x + unit, base - unit * 0.2), unit * 0.2, fill=body)
    roof = [(x - unit * 0.85, base - unit * 0.9), (x - unit * 0.62, base - unit * 1.5)]
    roof += [(x + unit * 0.62, base - unit * 1.5), (x + unit * 0.85, base - unit * 0.9)]
    c.draw.polygon(roof, fill=body)
    pane = [(x - unit * 0.7, base - unit * 0.95), (x - unit * 0.54, base - unit * 1.4)]
    pane += [(x + unit * 0.54, base - unit * 1.4), (x + unit * 0.7, base - unit * 0.95)]
    c.draw.polygon(pane, fill=c.tone((52, 66, 80), distance))
    lights = rng.choice(((230, 40, 30), (255, 246, 214)))
    for lamp in (-0.8, 0.8):
        c.disc(
            x + unit * lamp,
            base - unit * 0.65,
            unit * 0.16,
            unit * 0.11,
            lights if c.light.lamps > 0.2 else c.tone(lights),
        )


def _lamp(c: Canvas, view: _View, depth: float) -> None:
    """A street lamp at the kerb."""
    side = c.rng.choice((-0.9, 0.9))
    (x, base), (_, top) = view.at(side, 0, depth), view.at(side, 1.5, depth)
    arm, post = view.near / depth * 0.12 * (1 if side < 0 else -1), c.tone((52, 56, 60), depth / 16)
    width = max(round(6 / depth), 1)
    c.draw.line([(x, base), (x, top), (x + arm, top - abs(arm) * 0.3)], fill=post, width=width)
    glow = abs(arm) * 0.3
    c.disc(x + arm, top - glow, glow, glow * 0.7, (255, 232, 176) if c.light.lamps > 0.2 else c.tone((222, 222, 214)))


def _person(c: Canvas, view: _View, depth: float) -> None:
    """Somebody on the pavement."""
    x, base = view.at(c.rng.choice((-1, 1)) * c.rng.uniform(0.85, 1.2), 0, depth)
    unit, distance = view.near / depth * 0.3, min(depth / 16, 0.8)
    c.box(x - unit * 0.1, base - unit * 0.5, x + unit * 0.1, base, c.tone((44, 46, 60), distance))
    c.box(
        x - unit * 0.15, base - unit * 0.86, x + unit * 0.15, base - unit * 0.42, c.tone(c.rng.choice(PAINT), distance)
    )
    c.disc(x, base - unit * 0.95, unit * 0.1, unit * 0.12, c.tone((206, 164, 136), distance))
