"""The toy world of the demo: drawn rooms and streets at dusk, each with an exact class mask.

Classes come in pairs that look alike locally (ceiling and sky, wall and building, floor and road, bed and car): the two
of a pair share colour and texture, and the rest of the picture tells which one it is. A lamp, a picture or a bed means
a room; a tree, the moon or a car means a street; at least one of them is in every scene.

The one local hint is deliberately weak: a canvas grain on the paired classes. Its contrast wanders smoothly over the
picture and takes either sign, but its mean is `+evidence` in rooms and `-evidence` in streets.

Coordinates are pixels of the final picture, x to the right, y down; pixel (0, 0) covers [0, 1) x [0, 1). H = W = 96.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

SIZE_PX = 96
CLASSES = (
    "ceiling", "sky", "wall", "building", "floor", "road", "bed", "car",
    "lamp", "tree", "picture", "window", "door", "person",
)  # fmt: skip
PAIR_OF = (1, 0, 3, 2, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13)
PALETTE = np.array([
    (233, 243, 150), (122, 193, 253), (240, 228, 209), (95, 99, 116), (205, 155, 88), (78, 50, 105), (222, 148, 181),
    (178, 34, 52), (250, 234, 40), (0, 140, 96), (162, 96, 217), (20, 42, 159), (72, 10, 14), (238, 139, 20),
], np.uint8)  # fmt: skip

# Paired surfaces: one colour for both classes of a pair.
TOP, SIDE, GROUND, BODY = (136, 148, 184), (184, 148, 124), (116, 104, 108), (190, 78, 74)
PANE, STEEL, HEADLIGHT, TAIL_LIGHT = (148, 176, 196), (176, 176, 182), (252, 236, 160), (236, 120, 60)
CREAM, LINEN, BRASS, WALNUT, INK = (226, 214, 194), (246, 240, 228), (206, 164, 78), (104, 62, 40), (44, 40, 48)
LIT, DARK = (246, 204, 112), (92, 128, 178)  # window panes, equally often in rooms and in streets
SHIRTS = ((206, 104, 58), (52, 128, 138), (172, 156, 68), (120, 92, 158))
SKINS, HAIRS = ((226, 178, 146), (168, 116, 84), (122, 80, 58)), ((58, 40, 34), (126, 82, 46), (34, 32, 38))
HILLS = ((92, 132, 92), (70, 104, 132), (150, 96, 92))
# Leafy discs of a crown, back to front: u, v and radius in the crown, brightness.
LEAVES = (
    (0.25, 0.68, 0.3, 0.75), (0.75, 0.68, 0.3, 0.7), (0.5, 0.55, 0.38, 0.85), (0.24, 0.45, 0.26, 1.0),
    (0.74, 0.42, 0.26, 0.9), (0.48, 0.28, 0.3, 1.1), (0.4, 0.26, 0.15, 1.3),
)  # fmt: skip

# One weave per pair, repeated over the picture. Rows and columns sum to zero: edges and shading do not excite it.
WEAVES = ("++-- --++ ++-- --++", "+-+- +-+- -+-+ -+-+", "+-+- -+-+ +-+- -+-+", "+-+- -+-+ -+-+ +-+-")
GRAIN_CONTRAST, PIXEL_NOISE = 0.03, 0.018
_GRAIN = np.zeros((len(CLASSES), 4, 4), np.float32)
_GRAIN[:8] = np.repeat([[[1 if sign == "+" else -1 for sign in row] for row in w.split()] for w in WEAVES], 2, axis=0)
_ROWS, _COLUMNS = np.mgrid[:SIZE_PX, :SIZE_PX]


@dataclass(frozen=True)
class Scene:
    """A picture with its truth: image `uint8[H, W, 3]`, mask `uint8[H, W]` of indices into CLASSES."""

    indoor: bool
    image: np.ndarray
    mask: np.ndarray


def draw_scene(rng: np.random.Generator, evidence: float = 0.1) -> Scene:
    """Draws a room or a street, by a fair coin.

    Args:
        rng: The only source of chance; the same state gives the same bytes.
        evidence: Mean of the grain in units of its spread; at 0 there is no local hint.
    """
    indoor = bool(rng.random() < 0.5)
    view, canvas = look(rng), Canvas()
    (room if indoor else street)(canvas, view, rng)
    mask = canvas.mask()
    image = canvas.image() + grain(mask, evidence if indoor else -evidence, rng)
    image = image * light(view, rng) + PIXEL_NOISE * rng.standard_normal(image.shape, np.float32)
    return Scene(indoor, (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), mask)


@dataclass(frozen=True)
class Quad:
    """A flat rectangle in perspective: u runs along it from left to right, v from top to bottom, both 0..1."""

    top_left: Point
    top_right: Point
    bottom_right: Point
    bottom_left: Point

    @classmethod
    def standing(cls, foot: Point, width: float, height: float) -> Quad:
        """An upright rectangle on its foot (the middle of the lower edge); a negative width mirrors what it holds."""
        (x, y), half = foot, width / 2
        return cls((x - half, y - height), (x + half, y - height), (x + half, y), (x - half, y))

    def at(self, u: float, v: float) -> Point:
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = self.top_left, self.top_right, self.bottom_right, self.bottom_left
        x = (1 - v) * (ax + u * (bx - ax)) + v * (dx + u * (cx - dx))
        return x, (1 - v) * (ay + u * (by - ay)) + v * (dy + u * (cy - dy))

    def part(self, u0: float, u1: float, v0: float, v1: float) -> Quad:
        return Quad(self.at(u0, v0), self.at(u1, v0), self.at(u1, v1), self.at(u0, v1))

    @property
    def width(self) -> float:
        return self.top_right[0] - self.top_left[0]

    @property
    def height(self) -> float:
        return self.bottom_left[1] - self.top_left[1]


WHOLE = Quad((0, 0), (SIZE_PX, 0), (SIZE_PX, SIZE_PX), (0, SIZE_PX))
CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))
ROUNDED = ((0.1, 0), (0.9, 0), (1, 0.2), (1, 0.8), (0.9, 1), (0.1, 1), (0, 0.8), (0, 0.2))


class Canvas:
    """A picture and its mask, drawn by the same calls, in the u, v of a quad; only calls with a name change the mask.

    Both are three times the final size. The picture is averaged over blocks of 3x3, the mask takes the middle of each
    block: the centre of the final pixel.
    """

    FINE = 3

    def __init__(self) -> None:
        side = self.FINE * SIZE_PX
        self._picture, self._classes = Image.new("RGB", (side, side)), Image.new("L", (side, side))
        self._pens = ImageDraw.Draw(self._picture), ImageDraw.Draw(self._classes)

    def polygon(self, quad: Quad, colour: Colour, name: str = "", points: Sequence[Point] = CORNERS) -> None:
        self._draw("polygon", quad, points, colour, name)

    def oval(self, quad: Quad, colour: Colour, name: str = "") -> None:
        """The upright ellipse that fills the quad (its corners top left and bottom right, where it is askew)."""
        self._draw("ellipse", quad, ((0, 0), (1, 1)), colour, name)

    def line(self, quad: Quad, colour: Colour, points: Sequence[Point], width: int = 2, name: str = "") -> None:
        """A line through the points; its width is in thirds of a pixel."""
        self._draw("line", quad, points, colour, name, width=width)

    def image(self) -> np.ndarray:
        """The picture as `float32[H, W, 3]` in 0..1."""
        return np.asarray(self._picture.reduce(self.FINE), np.float32) / 255

    def mask(self) -> np.ndarray:
        """The classes as `uint8[H, W]`."""
        return np.asarray(self._classes)[self.FINE // 2 :: self.FINE, self.FINE // 2 :: self.FINE].copy()

    def _draw(self, tool: str, quad: Quad, points: Sequence[Point], colour: Colour, name: str, **options: int) -> None:
        # Pillow counts from pixel centres, cuts fractions off, and wants the corners of an ellipse in order.
        fine = [tuple(round(self.FINE * c - 0.5) for c in quad.at(u, v)) for u, v in points]
        fine = [tuple(map(min, *fine)), tuple(map(max, *fine))] if tool == "ellipse" else fine
        getattr(self._pens[0], tool)(fine, fill=colour, **options)
        if name:
            getattr(self._pens[1], tool)(fine, fill=CLASSES.index(name), **options)


class Standing(NamedTuple):
    """A drawing of something that stands on the ground; half_width is in grown-ups' heights."""

    draw: Callable[[Canvas, Quad, np.random.Generator], None]
    half_width: float
    beside: bool = False


@dataclass(frozen=True)
class View:
    """One-point perspective: the vanishing point at eye height, and the far end (back wall or end of the street)."""

    eye: Point
    far: Quad

    def nearer(self, point: Point, scale: float) -> Point:
        """The point moved along its line to the vanishing point: nearer to the viewer for scale > 1, else farther."""
        (x, y), (eye_x, eye_y) = point, self.eye
        return eye_x + scale * (x - eye_x), eye_y + scale * (y - eye_y)

    def ground(self) -> Quad:
        left, right = self.far.bottom_left, self.far.bottom_right
        return Quad(left, right, self.nearer(right, 7), self.nearer(left, 7))

    def walls(self) -> tuple[Quad, Quad, Quad]:
        """Left wall, far end and right wall, as far as the picture shows them."""
        far, x = self.far, self.eye[0]
        to_left, to_right = x / (x - far.top_left[0]), (SIZE_PX - x) / (far.top_right[0] - x)
        outer_left = self.nearer(far.top_left, to_left), self.nearer(far.bottom_left, to_left)
        outer_right = self.nearer(far.top_right, to_right), self.nearer(far.bottom_right, to_right)
        left = Quad(outer_left[0], far.top_left, far.bottom_left, outer_left[1])
        return left, far, Quad(far.top_right, outer_right[0], outer_right[1], far.bottom_right)

    def foot(self, across: float, tall: float, reach: float) -> Point:
        """A place on the ground.

        Args:
            across: 0..1 from left to right.
            tall: Height of the viewer's eyes above that place, in pixels: the size of a grown-up there.
            reach: Pixels to keep clear of the walls and of the edge of the picture.
        """
        scale = tall / (self.far.bottom_left[1] - self.eye[1])
        left = max(0, self.nearer(self.far.bottom_left, scale)[0]) + reach
        right = min(SIZE_PX, self.nearer(self.far.bottom_right, scale)[0]) - reach
        return left + across * (right - left), self.eye[1] + tall


def look(rng: np.random.Generator) -> View:
    """A view down a room or a street, from one distribution for both."""
    x, y = SIZE_PX * rng.uniform(0.35, 0.65), SIZE_PX * rng.uniform(0.42, 0.54)
    half_width, half_height = SIZE_PX * rng.uniform(0.18, 0.27), SIZE_PX * rng.uniform(0.15, 0.22)
    up, down = half_height * rng.uniform(0.9, 1.3), half_height * rng.uniform(0.8, 1.1)
    return View((x, y), Quad.standing((x, y + down), 2 * half_width, up + down))


def room(canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """A room: ceiling, three walls and a board floor, with what hangs and stands there."""
    present = choose(rng, ("lamp", "picture", "bed"), lamp=0.65, picture=0.75, bed=0.6, window=0.7, door=0.5)
    canvas.polygon(WHOLE, TOP, "ceiling")
    canvas.polygon(view.ground(), GROUND, "floor")
    for u in np.arange(0.1, 1, 0.2):
        canvas.line(view.ground(), shade(GROUND, 0.85), [(u, 0), (u, 1)])
    for front, tint in zip(view.walls(), wall_tints(rng), strict=True):
        wall(canvas, front, "wall", tint)
    stretches = wall_stretches(view, rng)
    if "window" in present:
        window(canvas, stretches.pop().part(0, 1, 0.16, 0.58), rng)
    if "picture" in present:
        picture(canvas, stretches.pop().part(0, 1, 0.15, 0.59), rng)
    if "door" in present:
        door(canvas, stretches.pop().part(0.05, 0.95, 0.28, 1), rng)
    things = [Standing(partial(bed, view), 0.55)] if "bed" in present else []
    if "lamp" in present and rng.random() < 0.6:
        hanging_lamp(canvas, view, rng)
    elif "lamp" in present:
        things.append(Standing(standing_lamp, 0.3, beside=True))
    stand_on_ground(canvas, view, things, rng)


def street(canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """A street: sky, houses left, right and at the end, a road with kerbs and lane marks, with what stands there."""
    present = choose(rng, ("tree", "moon", "car"), tree=0.6, moon=0.3, car=0.6)
    canvas.polygon(WHOLE, TOP, "sky")
    if "moon" in present:
        moon(canvas, view, rng)
    canvas.polygon(view.ground(), GROUND, "road")
    for u in (0.16, 0.84):
        canvas.line(view.ground(), shade(GROUND, 0.85), [(u, 0), (u, 1)])
    for v in (0.03, 0.1, 0.22, 0.38):
        canvas.polygon(view.ground().part(0.48, 0.52, v, 1.5 * v + 0.01), shade(GROUND, 1.5))
    left, far, right = zip(view.walls(), wall_tints(rng), strict=True)
    for (front, tint), count in ((far, rng.integers(2, 4)), (left, rng.integers(1, 3)), (right, rng.integers(1, 3))):
        for i in range(count):
            house(canvas, front.part(i / count, (i + 1) / count, rng.uniform(-0.18, 0.16), 1), tint, rng)
    things = [Standing(car, 0.58)] if "car" in present else []
    if "tree" in present:
        things.append(Standing(tree, 0.3, beside=True))
    stand_on_ground(canvas, view, things, rng)


def choose(rng: np.random.Generator, cues: Sequence[str], **chances: float) -> set[str]:
    """The things of a scene: each by its own chance, and one of the cues for certain."""
    certain = cues[rng.integers(len(cues))]
    return {name for name, chance in chances.items() if rng.random() < chance or name == certain}


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round(channel * factor)) for channel in colour)


def wall_tints(rng: np.random.Generator) -> tuple[float, float, float]:
    """Brightness of the left, far and right wall: light falls in from one side."""
    return (0.84, 1.0, 0.93) if rng.random() < 0.5 else (0.93, 1.0, 0.84)


def wall(canvas: Canvas, front: Quad, name: str, tint: float) -> None:
    """A wall of a room or of a house: the same plaster, dark base and outline."""
    canvas.polygon(front, shade(SIDE, tint), name)
    canvas.polygon(front.part(0, 1, 0.95, 1), shade(SIDE, tint * 0.84))
    canvas.line(front, shade(SIDE, tint * 0.7), [*CORNERS, CORNERS[0]])


def wall_stretches(view: View, rng: np.random.Generator) -> list[Quad]:
    """Stretches of wall from floor to ceiling, in random order: two on a wide wall, one on a narrow one."""
    stretches = []
    for front in view.walls():
        count = min(2, int(front.width / 13))
        stretches += [front.part((i + 0.1) / count, (i + 0.9) / count, 0, 1) for i in range(count)]
    return [stretches[i] for i in rng.permutation(len(stretches))]


def house(canvas: Canvas, front: Quad, tint: float, rng: np.random.Generator) -> None:
    """A house of two storeys, perhaps with a gable, with windows and perhaps a door."""
    tint *= rng.uniform(0.96, 1.04)
    if rng.random() < 0.5:
        gable = [(0, 0), (0.5, -0.18), (1, 0)]
        canvas.polygon(front, shade(SIDE, tint), "building", gable)
        canvas.line(front, shade(SIDE, tint * 0.7), gable)
    wall(canvas, front, "building", tint)
    columns = max(1, round(front.width / 17))
    door_column = rng.integers(columns) if rng.random() < 0.45 else None
    for column in range(columns):
        bay = front.part(column / columns, (column + 1) / columns, 0, 1)
        if rng.random() < 0.45:
            window(canvas, bay.part(0.2, 0.8, 0.14, 0.42), rng)
        if column == door_column:
            door(canvas, bay.part(0.26, 0.74, 0.54, 1), rng)
        elif rng.random() < 0.45:
            window(canvas, bay.part(0.2, 0.8, 0.54, 0.82), rng)


def window(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    glass = LIT if rng.random() < 0.5 else DARK
    canvas.polygon(frame, CREAM, "window")
    canvas.polygon(frame.part(0.12, 0.88, 0.1, 0.9), glass)
    canvas.polygon(frame.part(0.12, 0.88, 0.1, 0.45), shade(glass, 1.1))
    canvas.line(frame, CREAM, [(0.5, 0), (0.5, 1)], 3)
    canvas.line(frame, CREAM, [(0, 0.45), (1, 0.45)], 3)


def door(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    canvas.polygon(frame, CREAM, "door")
    canvas.polygon(frame.part(0.1, 0.9, 0.06, 1), WALNUT)
    for top, bottom in ((0.14, 0.48), (0.58, 0.92)):
        canvas.polygon(frame.part(0.24, 0.76, top, bottom), shade(WALNUT, 1.25))
    handle = frame.at(0.8 if rng.random() < 0.5 else 0.2, 0.58)
    canvas.oval(Quad.standing(handle, 1.8, 1.8), BRASS)


def picture(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """A framed landscape: hills under a low sun."""
    canvas.polygon(frame, BRASS, "picture")
    canvas.polygon(frame.part(0.1, 0.9, 0.1, 0.9), CREAM)
    scenery, sun = frame.part(0.2, 0.8, 0.2, 0.8), rng.uniform(0.2, 0.6)
    canvas.polygon(scenery, (232, 190, 150))
    canvas.oval(scenery.part(sun, sun + 0.24, 0.12, 0.46), (252, 240, 206))
    ridge = [(0, 0.6), (0.3, 0.42), (0.55, 0.68), (0.8, 0.5), (1, 0.65), (1, 1), (0, 1)]
    canvas.polygon(scenery, HILLS[rng.integers(3)], points=ridge)


def moon(canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """The moon above the roofs; it is part of the sky."""
    x, roofs = view.far.at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    disc = Quad.standing((x, max(4, roofs * rng.uniform(0.2, 0.5)) + size / 2), size, size)
    canvas.oval(disc, (250, 244, 220))
    for left, top, width in ((0.22, 0.28, 0.24), (0.5, 0.55, 0.28), (0.6, 0.22, 0.16)):
        canvas.oval(disc.part(left, left + width, top, top + width), (232, 222, 192))


def hanging_lamp(canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    x, ceiling_end = view.far.at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    canvas.line(Quad((x, 0), (x, 0), (x, y), (x, y)), INK, [(0, 0), (0, 0.6)], 3, "lamp")
    lamp_shade(canvas, (x, y), rng.uniform(24, 31))


def standing_lamp(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    canvas.oval(place.part(0.37, 0.63, 0.95, 1.03), INK, "lamp")
    canvas.line(place, INK, [(0.5, 0.98), (0.5, 0.1)], 4, "lamp")
    lamp_shade(canvas, place.at(0.5, 0.2), place.height * rng.uniform(0.65, 0.75))


def lamp_shade(canvas: Canvas, rim: Point, size: float) -> None:
    """A shade with its bulb, on the middle of the lower rim."""
    place = Quad.standing(rim, size, 0.56 * size)
    canvas.oval(place.part(0.31, 0.69, 0.66, 1.3), (255, 246, 214), "lamp")
    canvas.polygon(place, (236, 178, 72), "lamp", [(0.3, 0), (0.7, 0), (1, 1), (0, 1)])
    canvas.polygon(place, (248, 208, 110), points=[(0.3, 0), (0.5, 0), (0.5, 1), (0, 1)])


def stand_on_ground(canvas: Canvas, view: View, things: list[Standing], rng: np.random.Generator) -> None:
    """Draws things and up to two people from far to near, each with its shadow.

    What stands beside the way goes to the left or the right wall; the others share the middle in lanes of their own.
    """
    things = things + [Standing(person, 0.2)] * int((rng.random(2) < (0.55, 0.35)).sum())
    lanes = 0.12 + 0.76 * (rng.permutation(len(things)) + rng.random(len(things))) / max(1, len(things))
    sizes = rng.uniform(27, 41, len(things))
    for i in np.argsort(sizes):
        thing, size = things[i], sizes[i]
        x, y = view.foot(rng.integers(2) if thing.beside else lanes[i], size, thing.half_width * size)
        width = 2 * thing.half_width * size
        canvas.oval(Quad.standing((x, y + 0.1 * width), width, 0.2 * width), shade(GROUND, 0.66))
        thing.draw(canvas, Quad.standing((x, y), size * rng.choice((-1, 1)), size), rng)


def person(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    shirt, trousers = (SHIRTS[i] for i in rng.permutation(len(SHIRTS))[:2])
    skin, hair = SKINS[rng.integers(3)], HAIRS[rng.integers(3)]
    body = place.part(0, 1, rng.uniform(-0.12, 0.05), 1)
    for half in (body, body.part(1, 0, 0, 1)):  # one half and its mirror image
        canvas.polygon(half, shade(trousers, 0.62), "person", [(0.5, 0.54), (0.63, 0.54), (0.62, 0.98), (0.53, 0.98)])
        canvas.polygon(half, INK, "person", [(0.53, 0.97), (0.62, 0.97), (0.65, 1), (0.53, 1)])
        canvas.polygon(half, shade(shirt, 0.85), "person", [(0.6, 0.23), (0.67, 0.27), (0.7, 0.54), (0.63, 0.54)])
        canvas.oval(half.part(0.63, 0.7, 0.52, 0.59), skin, "person")
        canvas.polygon(half, shirt, "person", [(0.5, 0.22), (0.6, 0.22), (0.64, 0.28), (0.63, 0.57), (0.5, 0.57)])
    canvas.oval(body.part(0.38, 0.62, 0, 0.23), hair, "person")
    canvas.oval(body.part(0.41, 0.59, 0.05, 0.23), skin, "person")


def bed(view: View, canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """A bed seen from its foot: headboard, mattress, two pillows and a blanket."""
    depth = rng.uniform(0.62, 0.72)
    front = place.part(0, 1, 0.62, 1)
    head = Quad(*(view.nearer(front.at(u, v), depth) for u, v in CORNERS))
    top = Quad(head.top_left, head.top_right, front.top_right, front.top_left)
    canvas.polygon(head.part(-0.04, 1.04, -1.1, 1), WALNUT, "bed")
    canvas.polygon(head.part(0.06, 0.94, -0.85, 0), shade(WALNUT, 1.3))
    for u in (0, 1):
        canvas.polygon(Quad(head.at(u, 0), front.at(u, 0), front.at(u, 1), head.at(u, 1)), shade(BODY, 0.72), "bed")
    canvas.polygon(top, CREAM, "bed")
    for u in (0.06, 0.53):
        canvas.polygon(head.part(u, u + 0.41, -0.4, 0.16), LINEN, "bed", ROUNDED)
    canvas.polygon(top.part(0, 1, 0.4, 1), shade(BODY, 1.08))
    canvas.polygon(front, WALNUT, "bed")
    canvas.polygon(front.part(0, 1, 0, 0.84), shade(BODY, 0.88))


def car(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """A small car from the side, heading right (or left, in a mirrored place)."""
    longer = rng.uniform(0.02, 0.08)
    side = place.part(-longer, 1 + longer, 0, 1)
    cabin = [(0.1, 0.7), (0.16, 0.49), (0.24, 0.44), (0.54, 0.44), (0.62, 0.47), (0.8, 0.7)]
    hull = [(0.02, 0.9), (0, 0.79), (0.04, 0.68), (0.76, 0.67), (0.94, 0.71), (1, 0.79), (0.99, 0.91), (0.9, 0.93)]
    canvas.polygon(side, shade(BODY, 1.08), "car", cabin)
    canvas.polygon(side, shade(BODY, 0.88), "car", [*hull, (0.1, 0.93)])
    canvas.polygon(side, PANE, points=[(0.18, 0.67), (0.22, 0.51), (0.39, 0.5), (0.39, 0.67)])
    canvas.polygon(side, PANE, points=[(0.44, 0.67), (0.44, 0.5), (0.57, 0.51), (0.71, 0.67)])
    for u in (0.22, 0.79):
        canvas.oval(side.part(u - 0.12, u + 0.12, 0.77, 1.02), INK, "car")
        canvas.oval(side.part(u - 0.055, u + 0.055, 0.84, 0.95), STEEL)
    canvas.polygon(side.part(0.94, 1, 0.73, 0.82), HEADLIGHT, "car")
    canvas.polygon(side.part(0.01, 0.06, 0.73, 0.81), TAIL_LIGHT)


def tree(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """A trunk and a crown of leafy discs, lit from above."""
    place, green = place.part(0, 1, rng.uniform(-0.75, -0.45), 1), rng.uniform(0.9, 1.15)
    canvas.polygon(place, (88, 60, 44), "tree", [(0.45, 0.4), (0.55, 0.4), (0.58, 1), (0.42, 1)])
    crown = place.part(0.1, 0.9, 0, 0.48)
    for u, v, radius, brightness in LEAVES:
        u, v = u + rng.uniform(-0.05, 0.05), v + rng.uniform(-0.05, 0.05)
        disc = crown.part(u - radius, u + radius, v - radius, v + radius)
        canvas.oval(disc, shade((72, 128, 84), brightness * green), "tree")


def grain(mask: np.ndarray, mean: float, rng: np.random.Generator) -> np.ndarray:
    """The weak local hint, `float32[H, W, 1]`: a grain on the paired classes, to be added to the picture.

    Args:
        mask: Classes `uint8[H, W]`.
        mean: Mean contrast, in units of the spread of its smooth random field.
    """
    knots = Image.fromarray(rng.standard_normal((9, 9), np.float32))
    field = np.asarray(knots.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)) / 0.67  # to unit spread
    return (GRAIN_CONTRAST * (field + mean) * _GRAIN[mask, _ROWS % 4, _COLUMNS % 4])[..., None]


def light(view: View, rng: np.random.Generator) -> np.ndarray:
    """The light of the evening as a factor `float32[H, W, 3]`; nothing in it depends on the scene.

    A warm glow at the far end and, at random, brightness, colour cast, a slope across the picture and a vignette.
    """
    sideways, upwards = abs(_COLUMNS - view.eye[0]), abs(_ROWS - view.eye[1])
    depth = 1 - (1.5 * np.maximum(sideways, upwards) / SIZE_PX).clip(0, 1)
    glow = 1 + (depth**2)[..., None] * (0.18, 0.12, 0.03)
    across, down = _COLUMNS / SIZE_PX - 0.5, _ROWS / SIZE_PX - 0.5
    slope = 1 + rng.uniform(-0.2, 0.2) * across + rng.uniform(-0.2, 0.2) * down
    vignette = 1 - rng.uniform(0.4, 0.8) * (across**2 + down**2)
    cast = rng.uniform(0.78, 1.2) * (1 + rng.uniform(-1, 1, 3) * (0.12, 0.06, 0.12))
    return (glow * (slope * vignette)[..., None] * cast).astype(np.float32)
