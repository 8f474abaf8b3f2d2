"""Drawing a picture and its class mask with the same strokes, in one-point perspective.

Coordinates are pixels of the final picture, x to the right, y down; pixel (0, 0) covers [0, 1) x [0, 1). H = W = 96.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round(channel * factor)) for channel in colour)


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
