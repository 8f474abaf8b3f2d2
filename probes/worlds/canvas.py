"""Draw a picture and the classes of its pixels with the same calls, in one-point perspective.

Coordinates are pixels of the final picture, x to the right and y down. Pixel (0, 0) covers [0, 1) x [0, 1).
Shapes: H = W = 96.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

SIZE_PX = 96
# of each class in coloured masks
CLASS_COLOURS = {
    "ceiling": (233, 243, 150),
    "sky": (122, 193, 253),
    "wall": (240, 228, 209),
    "building": (95, 99, 116),
    "floor": (205, 155, 88),
    "road": (78, 50, 105),
    "bed": (222, 148, 181),
    "car": (178, 34, 52),
    "lamp": (250, 234, 40),
    "tree": (0, 140, 96),
    "picture": (162, 96, 217),
    "window": (20, 42, 159),
    "door": (72, 10, 14),
    "person": (238, 139, 20),
}
CLASSES = tuple(CLASS_COLOURS)
PALETTE = np.array(list(CLASS_COLOURS.values()), np.uint8)
PAIR_OF = (1, 0, 3, 2, 5, 4, 7, 6, *range(8, 14))


@dataclass(frozen=True)
class Quad:
    """A rectangle in perspective with coordinates u (left to right) and v (top to bottom), both 0..1.

    Its corners come clockwise, as those of `CORNERS`.
    """

    top_left: Point
    top_right: Point
    bottom_right: Point
    bottom_left: Point

    @classmethod
    def upright(cls, foot: Point, width: float, height: float) -> Quad:
        """Return an upright rectangle on `foot`, the middle of its lower edge. A negative width mirrors its content."""
        x, bottom = foot
        top = bottom - height
        left = x - width / 2
        right = x + width / 2
        return cls(
            top_left=(left, top),
            top_right=(right, top),
            bottom_right=(right, bottom),
            bottom_left=(left, bottom),
        )

    def point_at(self, u: float, v: float) -> Point:
        """Return the pixel coordinates of (u, v)."""
        ax, ay = self.top_left
        bx, by = self.top_right
        cx, cy = self.bottom_right
        dx, dy = self.bottom_left
        upper_x = ax + u * (bx - ax)
        upper_y = ay + u * (by - ay)
        lower_x = dx + u * (cx - dx)
        lower_y = dy + u * (cy - dy)
        x = (1 - v) * upper_x + v * lower_x
        y = (1 - v) * upper_y + v * lower_y
        return x, y

    def part(self, left: float = 0, right: float = 1, top: float = 0, bottom: float = 1) -> Quad:
        """Return the part of the rectangle between two values of u and two of v."""
        return Quad(
            top_left=self.point_at(left, top),
            top_right=self.point_at(right, top),
            bottom_right=self.point_at(right, bottom),
            bottom_left=self.point_at(left, bottom),
        )

    @property
    def width(self) -> float:
        """Length of the upper edge in pixels."""
        return self.top_right[0] - self.top_left[0]

    @property
    def height(self) -> float:
        """Length of the left edge in pixels."""
        return self.bottom_left[1] - self.top_left[1]


FULL_FRAME = Quad.upright(foot=(SIZE_PX / 2, SIZE_PX), width=SIZE_PX, height=SIZE_PX)
CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))


class Canvas:
    """A picture and its mask, drawn by the same calls in coordinates of a quad.

    Only calls with the name of a class change the mask. Both are drawn at three times the final size. A pixel of the
    picture is the mean of a block of 3 x 3, and one of the mask its centre.
    """

    SCALE = 3

    def __init__(self) -> None:
        side = self.SCALE * SIZE_PX
        self._picture = Image.new("RGB", (side, side))
        self._mask = Image.new("L", (side, side))

    def polygon(
        self, quad: Quad, colour: Colour, name: str = "", points: Sequence[Point] = CORNERS
    ) -> None:
        """Fill a polygon."""
        corners = self._place(quad, points)
        self._draw("polygon", corners, colour=colour, name=name)

    def oval(self, quad: Quad, colour: Colour, name: str = "") -> None:
        """Fill the upright ellipse between the quad's top left and bottom right corner."""
        corners = self._place(quad, CORNERS[::2])
        # as Pillow requires, which takes left, top, right and bottom
        sorted_corners = np.sort(corners, axis=0)
        self._draw("ellipse", sorted_corners.flatten().tolist(), colour=colour, name=name)

    def line(
        self, quad: Quad, colour: Colour, points: Sequence[Point], width: int = 2, name: str = ""
    ) -> None:
        """Draw a line through the points. The width is in thirds of a pixel."""
        points = self._place(quad, points)
        self._draw("line", points, colour=colour, name=name, width=width)

    def image(self) -> np.ndarray:
        """Return the picture as `float32[H, W, 3]` in 0..1."""
        means = self._picture.reduce(self.SCALE)
        return np.asarray(means, np.float32) / 255

    def mask(self) -> np.ndarray:
        """Return the classes as `uint8[H, W]`."""
        centres = slice(self.SCALE // 2, None, self.SCALE)
        return np.asarray(self._mask)[centres, centres].copy()

    def _draw(self, tool: str, points: list, colour: Colour, name: str, **options: int) -> None:
        draw = getattr(ImageDraw.Draw(self._picture), tool)
        draw(points, fill=colour, **options)
        if name:
            label = CLASSES.index(name)
            draw = getattr(ImageDraw.Draw(self._mask), tool)
            draw(points, fill=label, **options)

    def _place(self, quad: Quad, points: Sequence[Point]) -> list[Point]:
        """Return points as Pillow wants them: counted from the centre of a pixel, without a fraction."""
        placed = []
        for u, v in points:
            x, y = quad.point_at(u, v)
            column = round(self.SCALE * x - 0.5)
            row = round(self.SCALE * y - 0.5)
            placed.append((column, row))
        return placed


def shade(colour: Colour, factor: float) -> Colour:
    """Scale the brightness of a colour."""
    return tuple(min(255, round(channel * factor)) for channel in colour)


@dataclass(frozen=True)
class Camera:
    """One-point perspective with its vanishing point `eye` and the far end (back wall or end of the street)."""

    eye: Point
    far_end: Quad

    def scale_depth(self, point: Point, scale: float) -> Point:
        """Move a point on its line through the vanishing point: nearer to the viewer for scale > 1, else farther."""
        x, y = point
        eye_x, eye_y = self.eye
        scaled_x = eye_x + scale * (x - eye_x)
        scaled_y = eye_y + scale * (y - eye_y)
        return scaled_x, scaled_y

    def ground(self) -> Quad:
        """Return the ground from the far end to below the picture."""
        left = self.far_end.bottom_left
        right = self.far_end.bottom_right
        return Quad(
            top_left=left,
            top_right=right,
            bottom_right=self.scale_depth(right, 7),
            bottom_left=self.scale_depth(left, 7),
        )

    def walls(self) -> tuple[Quad, Quad, Quad]:
        """Return the visible parts of the left wall, the far end and the right wall."""
        far = self.far_end
        x = self.eye[0]
        to_left = x / (x - far.top_left[0])
        to_right = (SIZE_PX - x) / (far.top_right[0] - x)
        left = Quad(
            top_left=self.scale_depth(far.top_left, to_left),
            top_right=far.top_left,
            bottom_right=far.bottom_left,
            bottom_left=self.scale_depth(far.bottom_left, to_left),
        )
        right = Quad(
            top_left=far.top_right,
            top_right=self.scale_depth(far.top_right, to_right),
            bottom_right=self.scale_depth(far.bottom_right, to_right),
            bottom_left=far.bottom_right,
        )
        return left, far, right

    def ground_point(self, across: float, height_px: float, margin_px: float) -> Point:
        """Return a point on the ground.

        Args:
            across: Position from left to right, 0..1.
            height_px: Height of the eye above the point, which is the height of an adult there.
            margin_px: Distance to keep from the walls and from the edge of the picture.
        """
        far_adult_px = self.far_end.bottom_left[1] - self.eye[1]  # the eye's height there
        scale = height_px / far_adult_px
        left_wall, _ = self.scale_depth(self.far_end.bottom_left, scale)
        right_wall, _ = self.scale_depth(self.far_end.bottom_right, scale)
        left = max(0, left_wall) + margin_px
        right = min(SIZE_PX, right_wall) - margin_px
        x = left + across * (right - left)
        y = self.eye[1] + height_px
        return x, y


def sample_camera(rng: Generator) -> Camera:
    """Sample a camera. Rooms and streets share one distribution."""
    eye_x = SIZE_PX * rng.uniform(0.35, 0.65)
    eye_y = SIZE_PX * rng.uniform(0.42, 0.54)
    half_width = SIZE_PX * rng.uniform(0.18, 0.27)
    half_height = SIZE_PX * rng.uniform(0.15, 0.22)
    up = half_height * rng.uniform(0.9, 1.3)
    down = half_height * rng.uniform(0.8, 1.1)
    foot = (eye_x, eye_y + down)
    far_end = Quad.upright(foot, width=2 * half_width, height=up + down)
    return Camera((eye_x, eye_y), far_end)
