"""Draw the moon, lamps, and what stands on the ground: people, beds, cars and trees.

Outlines are points (u, v) of a quad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .canvas import CORNERS, Camera, Canvas, Point, Quad, shade
from .colours import (
    BARK,
    BODY,
    BULB,
    CREAM,
    GROUND,
    HAIRS,
    HEADLIGHT,
    INK,
    LAMP_SHADE,
    LEAF,
    LINEN,
    LIT_LAMP_SHADE,
    MOON,
    MOON_SPOT,
    PANE,
    SHIRTS,
    SKINS,
    STEEL,
    TAIL_LIGHT,
    WALNUT,
)

PERSON_CHANCES = (0.55, 0.35)  # of a first and of a second person
SHADE_WIDTH = (0.65, 0.75)  # of a standing lamp, in units of an adult's height
# The right half of a person; the left one is its mirror image.
LEG = ((0.5, 0.54), (0.63, 0.54), (0.62, 0.98), (0.53, 0.98))
SHOE = ((0.53, 0.97), (0.62, 0.97), (0.65, 1), (0.53, 1))
SLEEVE = ((0.6, 0.23), (0.67, 0.27), (0.7, 0.54), (0.63, 0.54))
CHEST = ((0.5, 0.22), (0.6, 0.22), (0.64, 0.28), (0.63, 0.57), (0.5, 0.57))
PILLOW = ((0.1, 0), (0.9, 0), (1, 0.2), (1, 0.8), (0.9, 1), (0.1, 1), (0, 0.8), (0, 0.2))
# a car that heads right
CABIN = ((0.1, 0.7), (0.16, 0.49), (0.24, 0.44), (0.54, 0.44), (0.62, 0.47), (0.8, 0.7))
HULL = (
    *((0.02, 0.9), (0, 0.79), (0.04, 0.68), (0.76, 0.67), (0.94, 0.71)),
    *((1, 0.79), (0.99, 0.91), (0.9, 0.93), (0.1, 0.93)),
)
REAR_PANE = ((0.18, 0.67), (0.22, 0.51), (0.39, 0.5), (0.39, 0.67))
FRONT_PANE = ((0.44, 0.67), (0.44, 0.5), (0.57, 0.51), (0.71, 0.67))
TRUNK = ((0.45, 0.4), (0.55, 0.4), (0.58, 1), (0.42, 1))
# discs of a tree's crown, back to front: middle, radius, brightness
CROWN = (
    (0.25, 0.68, 0.3, 0.75),
    (0.75, 0.68, 0.3, 0.7),
    (0.5, 0.55, 0.38, 0.85),
    (0.24, 0.45, 0.26, 1.0),
    (0.74, 0.42, 0.26, 0.9),
    (0.48, 0.28, 0.3, 1.1),
    (0.4, 0.26, 0.15, 1.3),
)
LAMP_CORD = ((0, 0), (0, 0.6))
LAMP_STAND = ((0.5, 0.98), (0.5, 0.1))
SHADE = ((0.3, 0), (0.7, 0), (1, 1), (0, 1))
LIT_SIDE_OF_SHADE = ((0.3, 0), (0.5, 0), (0.5, 1), (0, 1))
CRATERS = ((0.22, 0.28, 0.24), (0.5, 0.55, 0.28), (0.6, 0.22, 0.16))  # left, top, width


class GroundObject(NamedTuple):
    """An object on the ground.

    half_width is in units of an adult's height; at_wall places it next to a side wall.
    """

    draw: Callable[[Canvas, Quad, np.random.Generator], None]
    half_width: float
    at_wall: bool = False


def draw_on_ground(
    canvas: Canvas,
    camera: Camera,
    standing: list[GroundObject],
    rng: np.random.Generator,
) -> None:
    """Draw objects and up to two people from far to near, each with its shadow.

    Objects at a wall go to the left or right one. The others have a lane of their own in the middle.
    """
    comes = rng.random(2) < PERSON_CHANCES
    standing = standing + [GroundObject(draw_person, 0.2)] * int(comes.sum())
    count = len(standing)
    lane_numbers = rng.permutation(count)
    places_in_lanes = rng.random(count)
    lanes = 0.12 + 0.76 * (lane_numbers + places_in_lanes) / max(1, count)
    sizes = rng.uniform(27, 41, count)
    for i in np.argsort(sizes):
        thing = standing[i]
        size = sizes[i]
        half_width = thing.half_width * size
        across = rng.integers(2) if thing.at_wall else lanes[i]
        foot = camera.ground_point(across, size, half_width)
        draw_shadow(canvas, foot, 2 * half_width)
        facing = rng.choice((-1, 1))
        thing.draw(canvas, Quad.upright(foot, size * facing, size), rng)


def draw_shadow(canvas: Canvas, foot: Point, width: float) -> None:
    """Draw the shadow of an object below its `foot`, the middle of its lower edge."""
    x, y = foot
    shadow = Quad.upright((x, y + 0.1 * width), width, 0.2 * width)
    canvas.oval(shadow, shade(GROUND, 0.66))


def draw_person(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a person seen from the front."""
    order = rng.permutation(len(SHIRTS))
    shirt = SHIRTS[order[0]]
    trousers = SHIRTS[order[1]]
    skin = SKINS[rng.integers(3)]
    hair = HAIRS[rng.integers(3)]
    body = place.part(top=rng.uniform(-0.12, 0.05))
    mirrored = body.part(left=1, right=0)
    for half in (body, mirrored):
        hand = half.part(left=0.63, right=0.7, top=0.52, bottom=0.59)
        canvas.polygon(half, shade(trousers, 0.62), "person", LEG)
        canvas.polygon(half, INK, "person", SHOE)
        canvas.polygon(half, shade(shirt, 0.85), "person", SLEEVE)
        canvas.oval(hand, skin, "person")
        canvas.polygon(half, shirt, "person", CHEST)
    canvas.oval(body.part(left=0.38, right=0.62, bottom=0.23), hair, "person")
    canvas.oval(body.part(left=0.41, right=0.59, top=0.05, bottom=0.23), skin, "person")


def draw_bed(
    camera: Camera,
    canvas: Canvas,
    place: Quad,
    rng: np.random.Generator,
) -> None:
    """Draw a bed seen from its foot: headboard, mattress, two pillows and a blanket."""
    depth = rng.uniform(0.62, 0.72)
    front = place.part(top=0.62)
    head = Quad(*(camera.scale_depth(front.point_at(u, v), depth) for u, v in CORNERS))
    top = Quad(head.top_left, head.top_right, front.top_right, front.top_left)
    canvas.polygon(head.part(left=-0.04, right=1.04, top=-1.1), WALNUT, "bed")
    panel = head.part(left=0.06, right=0.94, top=-0.85, bottom=0)
    canvas.polygon(panel, shade(WALNUT, 1.3))
    for u in (0, 1):
        side = Quad(
            head.point_at(u, 0),
            front.point_at(u, 0),
            front.point_at(u, 1),
            head.point_at(u, 1),
        )
        canvas.polygon(side, shade(BODY, 0.72), "bed")
    canvas.polygon(top, CREAM, "bed")
    for u in (0.06, 0.53):
        pillow = head.part(left=u, right=u + 0.41, top=-0.4, bottom=0.16)
        canvas.polygon(pillow, LINEN, "bed", PILLOW)
    canvas.polygon(top.part(top=0.4), shade(BODY, 1.08))
    canvas.polygon(front, WALNUT, "bed")
    canvas.polygon(front.part(bottom=0.84), shade(BODY, 0.88))


def draw_car(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a small car from the side, heading right, or left in a mirrored quad."""
    extra = rng.uniform(0.02, 0.08)
    side = place.part(left=-extra, right=1 + extra)
    canvas.polygon(side, shade(BODY, 1.08), "car", CABIN)
    canvas.polygon(side, shade(BODY, 0.88), "car", HULL)
    canvas.polygon(side, PANE, points=REAR_PANE)
    canvas.polygon(side, PANE, points=FRONT_PANE)
    for u in (0.22, 0.79):
        tyre = side.part(left=u - 0.12, right=u + 0.12, top=0.77, bottom=1.02)
        hub = side.part(left=u - 0.055, right=u + 0.055, top=0.84, bottom=0.95)
        canvas.oval(tyre, INK, "car")
        canvas.oval(hub, STEEL)
    canvas.polygon(side.part(left=0.94, top=0.73, bottom=0.82), HEADLIGHT, "car")
    canvas.polygon(side.part(left=0.01, right=0.06, top=0.73, bottom=0.81), TAIL_LIGHT)


def draw_tree(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a trunk and a crown of discs, lit from above."""
    place = place.part(top=rng.uniform(-0.75, -0.45))
    green = rng.uniform(0.9, 1.15)
    canvas.polygon(place, BARK, "tree", TRUNK)
    crown = place.part(left=0.1, right=0.9, bottom=0.48)
    for u, v, r, brightness in CROWN:
        u += rng.uniform(-0.05, 0.05)
        v += rng.uniform(-0.05, 0.05)
        disc = crown.part(left=u - r, right=u + r, top=v - r, bottom=v + r)
        canvas.oval(disc, shade(LEAF, brightness * green), "tree")


def draw_moon(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw the moon above the roofs. Its class is sky."""
    x, roofs = camera.far_end.point_at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    middle = max(4, roofs * rng.uniform(0.2, 0.5))
    disc = Quad.upright((x, middle + size / 2), size, size)
    canvas.oval(disc, MOON)
    for left, top, width in CRATERS:
        spot = disc.part(left=left, right=left + width, top=top, bottom=top + width)
        canvas.oval(spot, MOON_SPOT)


def draw_hanging_lamp(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a lamp that hangs from the ceiling."""
    x, ceiling_end = camera.far_end.point_at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    size = rng.uniform(24, 31)
    below_ceiling = Quad.upright((x, y), 0, y)
    canvas.line(below_ceiling, INK, LAMP_CORD, width=3, name="lamp")
    draw_lamp_shade(canvas, (x, y), size)


def draw_standing_lamp(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a lamp on a stand."""
    base = place.part(left=0.37, right=0.63, top=0.95, bottom=1.03)
    canvas.oval(base, INK, "lamp")
    canvas.line(place, INK, LAMP_STAND, width=4, name="lamp")
    draw_lamp_shade(canvas, place.point_at(0.5, 0.2), place.height * rng.uniform(*SHADE_WIDTH))


def draw_lamp_shade(canvas: Canvas, rim: Point, size: float) -> None:
    """Draw a lamp shade and its bulb. `rim` is the middle of the lower edge."""
    place = Quad.upright(rim, size, 0.56 * size)
    bulb = place.part(left=0.31, right=0.69, top=0.66, bottom=1.3)
    canvas.oval(bulb, BULB, "lamp")
    canvas.polygon(place, LAMP_SHADE, "lamp", SHADE)
    canvas.polygon(place, LIT_LAMP_SHADE, points=LIT_SIDE_OF_SHADE)
