"""Draw the objects that stand on the ground: people, beds, cars and trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import outlines
from .canvas import CORNERS, Camera, Canvas, Point, Quad, shade
from .colours import (
    BARK,
    BODY,
    CREAM,
    GROUND,
    HAIRS,
    HEADLIGHT,
    INK,
    LEAF,
    LINEN,
    PANE,
    SHIRTS,
    SKINS,
    STEEL,
    TAIL_LIGHT,
    WALNUT,
)
from .surfaces import Plane

PERSON_CHANCES = (0.55, 0.35)  # of a first and of a second person


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
    person = GroundObject(draw_person, 0.2)
    comes = rng.random(2) < PERSON_CHANCES
    people = int(comes.sum())
    standing = standing + [person] * people
    count = len(standing)
    lane_numbers = rng.permutation(count)
    places_in_lanes = rng.random(count)
    lanes = 0.12 + 0.76 * (lane_numbers + places_in_lanes) / max(1, count)
    sizes = rng.uniform(27, 41, count)
    far_to_near = np.argsort(sizes)
    for i in far_to_near:
        thing = standing[i]
        size = sizes[i]
        half_width = thing.half_width * size
        across = rng.integers(2) if thing.at_wall else lanes[i]
        foot = camera.ground_point(across, size, half_width)
        canvas.begin_object()
        draw_shadow(canvas, foot, 2 * half_width)
        facing = rng.choice((-1, 1))
        place = Quad.upright(
            foot,
            size * facing,
            size,
            Plane.facing(size),
        )
        thing.draw(canvas, place, rng)


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
        hand = half.part(
            left=0.63,
            right=0.7,
            top=0.52,
            bottom=0.59,
        )
        canvas.polygon(
            half,
            shade(trousers, 0.62),
            "person",
            outlines.LEG,
        )
        canvas.polygon(
            half,
            INK,
            "person",
            outlines.SHOE,
        )
        canvas.polygon(
            half,
            shade(shirt, 0.85),
            "person",
            outlines.SLEEVE,
        )
        canvas.oval(hand, skin, "person")
        canvas.polygon(
            half,
            shirt,
            "person",
            outlines.CHEST,
        )
    head = body.part(left=0.38, right=0.62, bottom=0.23)
    face = body.part(
        left=0.41,
        right=0.59,
        top=0.05,
        bottom=0.23,
    )
    canvas.oval(head, hair, "person")
    canvas.oval(face, skin, "person")


def draw_bed(
    camera: Camera,
    canvas: Canvas,
    place: Quad,
    rng: np.random.Generator,
) -> None:
    """Draw a bed seen from its foot: headboard, mattress, two pillows and a blanket."""
    depth = rng.uniform(0.62, 0.72)
    front = place.part(top=0.62)
    far_corners = []
    for u, v in CORNERS:
        near_corner = front.point_at(u, v)
        far_corners.append(camera.scale_depth(near_corner, depth))
    head = Quad(*far_corners, plane=Plane.facing(depth * place.height))
    top = Quad(
        top_left=head.top_left,
        top_right=head.top_right,
        bottom_right=front.top_right,
        bottom_left=front.top_left,
        plane=camera.level_plane(front.top_left[1], place.height),
    )
    board = head.part(
        left=-0.04,
        right=1.04,
        top=-1.1,
    )
    panel = head.part(
        left=0.06,
        right=0.94,
        top=-0.85,
        bottom=0,
    )
    canvas.polygon(board, WALNUT, "bed")
    canvas.polygon(panel, shade(WALNUT, 1.3))
    for u in (0, 1):
        upper_corner = front.point_at(u, 0)
        side = Quad(
            head.point_at(u, 0),
            upper_corner,
            front.point_at(u, 1),
            head.point_at(u, 1),
            plane=camera.side_plane(upper_corner[0], place.height),
        )
        canvas.polygon(side, shade(BODY, 0.72), "bed")
    canvas.polygon(top, CREAM, "bed")
    for u in (0.06, 0.53):
        pillow = head.part(
            left=u,
            right=u + 0.41,
            top=-0.4,
            bottom=0.16,
        )
        canvas.polygon(
            pillow,
            LINEN,
            "bed",
            outlines.PILLOW,
        )
    blanket = top.part(top=0.4)
    blanket_front = front.part(bottom=0.84)
    canvas.polygon(blanket, shade(BODY, 1.08))
    canvas.polygon(front, WALNUT, "bed")
    canvas.polygon(blanket_front, shade(BODY, 0.88))


def draw_car(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a small car from the side, heading right, or left in a mirrored quad."""
    extra = rng.uniform(0.02, 0.08)
    side = place.part(left=-extra, right=1 + extra)
    canvas.polygon(
        side,
        shade(BODY, 1.08),
        "car",
        outlines.CABIN,
    )
    canvas.polygon(
        side,
        shade(BODY, 0.88),
        "car",
        outlines.HULL,
    )
    canvas.polygon(side, PANE, points=outlines.REAR_PANE)
    canvas.polygon(side, PANE, points=outlines.FRONT_PANE)
    for u in (0.22, 0.79):
        tyre = side.part(
            left=u - 0.12,
            right=u + 0.12,
            top=0.77,
            bottom=1.02,
        )
        hub = side.part(
            left=u - 0.055,
            right=u + 0.055,
            top=0.84,
            bottom=0.95,
        )
        canvas.oval(tyre, INK, "car")
        canvas.oval(hub, STEEL)
    headlight = side.part(left=0.94, top=0.73, bottom=0.82)
    tail_light = side.part(
        left=0.01,
        right=0.06,
        top=0.73,
        bottom=0.81,
    )
    canvas.polygon(headlight, HEADLIGHT, "car")
    canvas.polygon(tail_light, TAIL_LIGHT)


def draw_tree(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a trunk and a crown of discs, lit from above."""
    place = place.part(top=rng.uniform(-0.75, -0.45))
    green = rng.uniform(0.9, 1.15)
    canvas.polygon(
        place,
        BARK,
        "tree",
        outlines.TRUNK,
    )
    crown = place.part(left=0.1, right=0.9, bottom=0.48)
    for leaves in outlines.CROWN:
        u = leaves.u + rng.uniform(-0.05, 0.05)
        v = leaves.v + rng.uniform(-0.05, 0.05)
        disc = crown.part(
            left=u - leaves.radius,
            right=u + leaves.radius,
            top=v - leaves.radius,
            bottom=v + leaves.radius,
        )
        canvas.oval(disc, shade(LEAF, leaves.brightness * green), "tree")
