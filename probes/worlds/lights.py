"""Draw the moon and lamps."""

from __future__ import annotations

import numpy as np

from . import outlines
from .canvas import Camera, Canvas, Point, Quad
from .colours import BULB, INK, LAMP_SHADE, LIT_LAMP_SHADE, MOON, MOON_SPOT
from .surfaces import Plane

SHADE_WIDTH = (0.65, 0.75)  # of a lamp, in units of an adult's height


def draw_moon(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw the moon above the roofs. Its class is sky."""
    canvas.begin_object()
    x, roofs = camera.far_end.point_at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    middle = max(4, roofs * rng.uniform(0.2, 0.5))
    foot = (x, middle + size / 2)
    disc = Quad.upright(foot, size, size)
    canvas.oval(disc, MOON)
    for crater in outlines.CRATERS:
        spot = disc.part(
            left=crater.left,
            right=crater.left + crater.width,
            top=crater.top,
            bottom=crater.top + crater.width,
        )
        canvas.oval(spot, MOON_SPOT)


def draw_hanging_lamp(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a lamp that hangs from the ceiling, where its shade would be as wide as that of a standing lamp."""
    canvas.begin_object()
    x, ceiling_end = camera.far_end.point_at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    size = rng.uniform(24, 31)
    plane = Plane.facing(size / np.mean(SHADE_WIDTH))
    # without width
    below_ceiling = Quad(
        top_left=(x, 0),
        top_right=(x, 0),
        bottom_right=(x, y),
        bottom_left=(x, y),
        plane=plane,
    )
    canvas.line(
        below_ceiling,
        INK,
        outlines.LAMP_CORD,
        width=3,
        name="lamp",
    )
    draw_lamp_shade(
        canvas,
        (x, y),
        size,
        plane,
    )


def draw_standing_lamp(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a lamp on a stand."""
    base = place.part(
        left=0.37,
        right=0.63,
        top=0.95,
        bottom=1.03,
    )
    canvas.oval(base, INK, "lamp")
    canvas.line(
        place,
        INK,
        outlines.LAMP_STAND,
        width=4,
        name="lamp",
    )
    draw_lamp_shade(
        canvas,
        place.point_at(0.5, 0.2),
        place.height * rng.uniform(*SHADE_WIDTH),
        place.plane,
    )


def draw_lamp_shade(
    canvas: Canvas,
    rim: Point,
    size: float,
    plane: Plane,
) -> None:
    """Draw a lamp shade and its bulb. `rim` is the middle of the lower edge."""
    place = Quad.upright(
        rim,
        size,
        0.56 * size,
        plane,
    )
    bulb = place.part(
        left=0.31,
        right=0.69,
        top=0.66,
        bottom=1.3,
    )
    canvas.oval(bulb, BULB, "lamp")
    canvas.polygon(
        place,
        LAMP_SHADE,
        "lamp",
        outlines.LAMP_SHADE,
    )
    canvas.polygon(place, LIT_LAMP_SHADE, points=outlines.LIT_SIDE_OF_SHADE)
