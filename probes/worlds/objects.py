"""Draw what is in a scene: people, beds, cars, trees, the moon, lamps, walls, and what is on these.

Outlines are points (u, v) of a quad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .canvas import CORNERS, Camera, Canvas, Point, Quad, shade

# Paired surfaces: both classes of a pair share a colour.
TOP = (136, 148, 184)
SIDE = (184, 148, 124)
GROUND = (116, 104, 108)
BODY = (190, 78, 74)
PANE = (148, 176, 196)
STEEL = (176, 176, 182)
HEADLIGHT = (252, 236, 160)
TAIL_LIGHT = (236, 120, 60)
CREAM = (226, 214, 194)
LINEN = (246, 240, 228)
BRASS = (206, 164, 78)
WALNUT = (104, 62, 40)
INK = (44, 40, 48)
# window panes, with the same probability in rooms and streets
LIT = (246, 204, 112)
DARK = (92, 128, 178)
DUSK = (232, 190, 150)
SUN = (252, 240, 206)
MOON = (250, 244, 220)
MOON_SPOT = (232, 222, 192)
BULB = (255, 246, 214)
LAMP_SHADE = (236, 178, 72)
LIT_LAMP_SHADE = (248, 208, 110)
BARK = (88, 60, 44)
LEAF = (72, 128, 84)
SHIRTS = (
    (206, 104, 58),
    (52, 128, 138),
    (172, 156, 68),
    (120, 92, 158),
)
SKINS = (
    (226, 178, 146),
    (168, 116, 84),
    (122, 80, 58),
)
HAIRS = (
    (58, 40, 34),
    (126, 82, 46),
    (34, 32, 38),
)
HILLS = (
    (92, 132, 92),
    (70, 104, 132),
    (150, 96, 92),
)

PERSON_CHANCES = (0.55, 0.35)  # of a first and of a second person
SHADE_WIDTH = (0.65, 0.75)  # of a standing lamp, in units of an adult's height
# The right half of a person; the left one is its mirror image.
LEG = (
    (0.5, 0.54),
    (0.63, 0.54),
    (0.62, 0.98),
    (0.53, 0.98),
)
SHOE = (
    (0.53, 0.97),
    (0.62, 0.97),
    (0.65, 1),
    (0.53, 1),
)
SLEEVE = (
    (0.6, 0.23),
    (0.67, 0.27),
    (0.7, 0.54),
    (0.63, 0.54),
)
CHEST = (
    (0.5, 0.22),
    (0.6, 0.22),
    (0.64, 0.28),
    (0.63, 0.57),
    (0.5, 0.57),
)
PILLOW = (
    (0.1, 0),
    (0.9, 0),
    (1, 0.2),
    (1, 0.8),
    (0.9, 1),
    (0.1, 1),
    (0, 0.8),
    (0, 0.2),
)
# a car that heads right
CABIN = (
    (0.1, 0.7),
    (0.16, 0.49),
    (0.24, 0.44),
    (0.54, 0.44),
    (0.62, 0.47),
    (0.8, 0.7),
)
HULL = (
    *(
        (0.02, 0.9),
        (0, 0.79),
        (0.04, 0.68),
        (0.76, 0.67),
        (0.94, 0.71),
    ),
    *(
        (1, 0.79),
        (0.99, 0.91),
        (0.9, 0.93),
        (0.1, 0.93),
    ),
)
REAR_PANE = (
    (0.18, 0.67),
    (0.22, 0.51),
    (0.39, 0.5),
    (0.39, 0.67),
)
FRONT_PANE = (
    (0.44, 0.67),
    (0.44, 0.5),
    (0.57, 0.51),
    (0.71, 0.67),
)
TRUNK = (
    (0.45, 0.4),
    (0.55, 0.4),
    (0.58, 1),
    (0.42, 1),
)
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
LAMP_CORD = (
    (0, 0),
    (0, 0.6),
)
LAMP_STAND = (
    (0.5, 0.98),
    (0.5, 0.1),
)
SHADE = (
    (0.3, 0),
    (0.7, 0),
    (1, 1),
    (0, 1),
)
LIT_SIDE_OF_SHADE = (
    (0.3, 0),
    (0.5, 0),
    (0.5, 1),
    (0, 1),
)
CRATERS = (
    (0.22, 0.28, 0.24),
    (0.5, 0.55, 0.28),
    (0.6, 0.22, 0.16),
)  # left, top, width
GABLE = (
    (0, 0),
    (0.5, -0.18),
    (1, 0),
)
WINDOW_BARS = (
    (
        (0.5, 0),
        (0.5, 1),
    ),
    (
        (0, 0.45),
        (1, 0.45),
    ),
)
RIDGE = (
    (0, 0.6),
    (0.3, 0.42),
    (0.55, 0.68),
    (0.8, 0.5),
    (1, 0.65),
    (1, 1),
    (0, 1),
)


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
    shirt, trousers, *_ = (SHIRTS[i] for i in rng.permutation(len(SHIRTS)))
    skin = SKINS[rng.integers(3)]
    hair = HAIRS[rng.integers(3)]
    body = place.part(top=rng.uniform(-0.12, 0.05))
    mirrored = body.part(left=1, right=0)
    for half in (body, mirrored):
        hand = half.part(
            0.63,
            0.7,
            0.52,
            0.59,
        )
        canvas.polygon(
            half,
            shade(trousers, 0.62),
            "person",
            LEG,
        )
        canvas.polygon(
            half,
            INK,
            "person",
            SHOE,
        )
        canvas.polygon(
            half,
            shade(shirt, 0.85),
            "person",
            SLEEVE,
        )
        canvas.oval(hand, skin, "person")
        canvas.polygon(
            half,
            shirt,
            "person",
            CHEST,
        )
    canvas.oval(body.part(left=0.38, right=0.62, bottom=0.23), hair, "person")
    canvas.oval(
        body.part(0.41, 0.59, 0.05, 0.23),
        skin,
        "person",
    )


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
    top = Quad(
        head.top_left,
        head.top_right,
        front.top_right,
        front.top_left,
    )
    canvas.polygon(head.part(left=-0.04, right=1.04, top=-1.1), WALNUT, "bed")
    panel = head.part(
        0.06,
        0.94,
        -0.85,
        0,
    )
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
        pillow = head.part(
            u,
            u + 0.41,
            -0.4,
            0.16,
        )
        canvas.polygon(
            pillow,
            LINEN,
            "bed",
            PILLOW,
        )
    canvas.polygon(top.part(top=0.4), shade(BODY, 1.08))
    canvas.polygon(front, WALNUT, "bed")
    canvas.polygon(front.part(bottom=0.84), shade(BODY, 0.88))


def draw_car(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a small car from the side, heading right, or left in a mirrored quad."""
    extra = rng.uniform(0.02, 0.08)
    side = place.part(left=-extra, right=1 + extra)
    canvas.polygon(
        side,
        shade(BODY, 1.08),
        "car",
        CABIN,
    )
    canvas.polygon(
        side,
        shade(BODY, 0.88),
        "car",
        HULL,
    )
    canvas.polygon(side, PANE, points=REAR_PANE)
    canvas.polygon(side, PANE, points=FRONT_PANE)
    for u in (0.22, 0.79):
        tyre = side.part(
            u - 0.12,
            u + 0.12,
            0.77,
            1.02,
        )
        hub = side.part(
            u - 0.055,
            u + 0.055,
            0.84,
            0.95,
        )
        canvas.oval(tyre, INK, "car")
        canvas.oval(hub, STEEL)
    canvas.polygon(side.part(left=0.94, top=0.73, bottom=0.82), HEADLIGHT, "car")
    canvas.polygon(
        side.part(
            0.01,
            0.06,
            0.73,
            0.81,
        ),
        TAIL_LIGHT,
    )


def draw_tree(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a trunk and a crown of discs, lit from above."""
    place = place.part(top=rng.uniform(-0.75, -0.45))
    green = rng.uniform(0.9, 1.15)
    canvas.polygon(
        place,
        BARK,
        "tree",
        TRUNK,
    )
    crown = place.part(left=0.1, right=0.9, bottom=0.48)
    for u, v, r, brightness in CROWN:
        u += rng.uniform(-0.05, 0.05)
        v += rng.uniform(-0.05, 0.05)
        disc = crown.part(
            u - r,
            u + r,
            v - r,
            v + r,
        )
        canvas.oval(disc, shade(LEAF, brightness * green), "tree")


def draw_moon(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw the moon above the roofs. Its class is sky."""
    x, roofs = camera.far_end.point_at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    middle = max(4, roofs * rng.uniform(0.2, 0.5))
    disc = Quad.upright((x, middle + size / 2), size, size)
    canvas.oval(disc, MOON)
    for left, top, width in CRATERS:
        spot = disc.part(
            left,
            left + width,
            top,
            top + width,
        )
        canvas.oval(spot, MOON_SPOT)


def draw_hanging_lamp(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a lamp that hangs from the ceiling."""
    x, ceiling_end = camera.far_end.point_at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    size = rng.uniform(24, 31)
    below_ceiling = Quad.upright((x, y), 0, y)
    canvas.line(
        below_ceiling,
        INK,
        LAMP_CORD,
        width=3,
        name="lamp",
    )
    draw_lamp_shade(canvas, (x, y), size)


def draw_standing_lamp(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a lamp on a stand."""
    base = place.part(
        0.37,
        0.63,
        0.95,
        1.03,
    )
    canvas.oval(base, INK, "lamp")
    canvas.line(
        place,
        INK,
        LAMP_STAND,
        width=4,
        name="lamp",
    )
    draw_lamp_shade(canvas, place.point_at(0.5, 0.2), place.height * rng.uniform(*SHADE_WIDTH))


def draw_lamp_shade(canvas: Canvas, rim: Point, size: float) -> None:
    """Draw a lamp shade and its bulb. `rim` is the middle of the lower edge."""
    place = Quad.upright(rim, size, 0.56 * size)
    bulb = place.part(
        0.31,
        0.69,
        0.66,
        1.3,
    )
    canvas.oval(bulb, BULB, "lamp")
    canvas.polygon(
        place,
        LAMP_SHADE,
        "lamp",
        SHADE,
    )
    canvas.polygon(place, LIT_LAMP_SHADE, points=LIT_SIDE_OF_SHADE)


def draw_wall(
    canvas: Canvas,
    front: Quad,
    name: str,
    tint: float,
) -> None:
    """Draw a wall of a room or a house, both with the same plaster, dark base and outline."""
    canvas.polygon(front, shade(SIDE, tint), name)
    canvas.polygon(front.part(top=0.95), shade(SIDE, tint * 0.84))
    canvas.line(front, shade(SIDE, tint * 0.7), [*CORNERS, CORNERS[0]])


def draw_house(
    canvas: Canvas,
    front: Quad,
    tint: float,
    rng: np.random.Generator,
) -> None:
    """Draw a house of two storeys with windows and at random a gable and a door."""
    tint *= rng.uniform(0.96, 1.04)
    if rng.random() < 0.5:
        canvas.polygon(
            front,
            shade(SIDE, tint),
            "building",
            GABLE,
        )
        canvas.line(front, shade(SIDE, tint * 0.7), GABLE)
    draw_wall(canvas, front, "building", tint)
    columns = max(1, round(front.width / 17))
    door_column = rng.integers(columns) if rng.random() < 0.45 else None
    for column in range(columns):
        bay = front.part(left=column / columns, right=(column + 1) / columns)
        if rng.random() < 0.45:
            draw_window(
                canvas,
                bay.part(
                    0.2,
                    0.8,
                    0.14,
                    0.42,
                ),
                rng,
            )
        if column == door_column:
            draw_door(canvas, bay.part(left=0.26, right=0.74, top=0.54), rng)
            continue
        if rng.random() < 0.45:
            draw_window(
                canvas,
                bay.part(
                    0.2,
                    0.8,
                    0.54,
                    0.82,
                ),
                rng,
            )


def draw_window(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a window, lit or dark."""
    glass = LIT if rng.random() < 0.5 else DARK
    canvas.polygon(frame, CREAM, "window")
    canvas.polygon(frame.inset(0.12, 0.1), glass)
    upper_pane = frame.part(
        0.12,
        0.88,
        0.1,
        0.45,
    )
    canvas.polygon(upper_pane, shade(glass, 1.1))
    for bar in WINDOW_BARS:
        canvas.line(
            frame,
            CREAM,
            bar,
            width=3,
        )


def draw_door(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a door with its handle on either side."""
    canvas.polygon(frame, CREAM, "door")
    canvas.polygon(frame.part(left=0.1, right=0.9, top=0.06), WALNUT)
    for top, bottom in (
        (0.14, 0.48),
        (0.58, 0.92),
    ):
        panel = frame.part(
            0.24,
            0.76,
            top,
            bottom,
        )
        canvas.polygon(panel, shade(WALNUT, 1.25))
    handle_u = 0.8 if rng.random() < 0.5 else 0.2
    canvas.oval(Quad.upright(frame.point_at(handle_u, 0.58), 1.8, 1.8), BRASS)


def draw_picture(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a framed landscape: hills under a low sun."""
    scenery = frame.inset(0.2, 0.2)
    canvas.polygon(frame, BRASS, "picture")
    canvas.polygon(frame.inset(0.1, 0.1), CREAM)
    canvas.polygon(scenery, DUSK)
    sun_u = rng.uniform(0.2, 0.6)
    sun = scenery.part(
        sun_u,
        sun_u + 0.24,
        0.12,
        0.46,
    )
    canvas.oval(sun, SUN)
    hills = HILLS[rng.integers(3)]
    canvas.polygon(scenery, hills, points=RIDGE)
