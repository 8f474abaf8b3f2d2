"""Draw the objects of the scenes: walls and their windows, doors and pictures, lamps, people, furniture."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .canvas import CORNERS, ROUNDED, Camera, Canvas, Point, Quad, shade
from .surfaces import Plane

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
SHIRTS = ((206, 104, 58), (52, 128, 138), (172, 156, 68), (120, 92, 158))
SKINS = ((226, 178, 146), (168, 116, 84), (122, 80, 58))
HAIRS = ((58, 40, 34), (126, 82, 46), (34, 32, 38))
SHADE_WIDTH = 0.65, 0.75  # of a lamp, in units of an adult's height
HILLS = ((92, 132, 92), (70, 104, 132), (150, 96, 92))
# Discs of a tree's crown, back to front: u, v, radius, brightness.
LEAVES = (
    (0.25, 0.68, 0.3, 0.75), (0.75, 0.68, 0.3, 0.7), (0.5, 0.55, 0.38, 0.85), (0.24, 0.45, 0.26, 1.0),
    (0.74, 0.42, 0.26, 0.9), (0.48, 0.28, 0.3, 1.1), (0.4, 0.26, 0.15, 1.3),
)  # fmt: skip


class GroundObject(NamedTuple):
    """An object on the ground, by default a cue.

    half_width is in units of an adult's height; at_wall places it next to a side wall.
    """

    draw: Callable[[Canvas, Quad, np.random.Generator], None]
    half_width: float
    at_wall: bool = False
    cue: bool = True


def draw_wall(
    canvas: Canvas,
    front: Quad,
    name: str,
    tint: float,
) -> None:
    """Draw a wall of a room or a house, both with the same plaster, dark base and outline."""
    canvas.polygon(front, shade(SIDE, tint), name)
    canvas.polygon(front.part(0, 1, 0.95, 1), shade(SIDE, tint * 0.84))
    canvas.line(front, shade(SIDE, tint * 0.7), [*CORNERS, CORNERS[0]])


def draw_house(
    canvas: Canvas,
    front: Quad,
    tint: float,
    rng: np.random.Generator,
) -> None:
    """Draw a house of two storeys with windows and at random a gable and a door."""
    canvas.begin_object()
    tint *= rng.uniform(0.96, 1.04)
    if rng.random() < 0.5:
        gable = [(0, 0), (0.5, -0.18), (1, 0)]
        canvas.polygon(front, shade(SIDE, tint), "building", gable)
        canvas.line(front, shade(SIDE, tint * 0.7), gable)
    draw_wall(canvas, front, "building", tint)
    columns = max(1, round(front.width / 17))
    door_column = rng.integers(columns) if rng.random() < 0.45 else None
    for column in range(columns):
        bay = front.part(column / columns, (column + 1) / columns, 0, 1)
        if rng.random() < 0.45:
            draw_window(canvas, bay.part(0.2, 0.8, 0.14, 0.42), rng)
        if column == door_column:
            draw_door(canvas, bay.part(0.26, 0.74, 0.54, 1), rng)
        elif rng.random() < 0.45:
            draw_window(canvas, bay.part(0.2, 0.8, 0.54, 0.82), rng)


def draw_window(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a window, lit or dark."""
    canvas.begin_object()
    glass = LIT if rng.random() < 0.5 else DARK
    canvas.polygon(frame, CREAM, "window")
    canvas.polygon(frame.part(0.12, 0.88, 0.1, 0.9), glass)
    canvas.polygon(frame.part(0.12, 0.88, 0.1, 0.45), shade(glass, 1.1))
    canvas.line(frame, CREAM, [(0.5, 0), (0.5, 1)], 3)
    canvas.line(frame, CREAM, [(0, 0.45), (1, 0.45)], 3)


def draw_door(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a door with its handle on either side."""
    canvas.begin_object()
    canvas.polygon(frame, CREAM, "door")
    canvas.polygon(frame.part(0.1, 0.9, 0.06, 1), WALNUT)
    for top, bottom in ((0.14, 0.48), (0.58, 0.92)):
        canvas.polygon(frame.part(0.24, 0.76, top, bottom), shade(WALNUT, 1.25))
    handle = frame.point_at(0.8 if rng.random() < 0.5 else 0.2, 0.58)
    canvas.oval(Quad.upright(handle, 1.8, 1.8), BRASS)


def draw_picture(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a framed landscape: hills under a low sun."""
    canvas.begin_object(cue=True)
    canvas.polygon(frame, BRASS, "picture")
    canvas.polygon(frame.part(0.1, 0.9, 0.1, 0.9), CREAM)
    scenery = frame.part(0.2, 0.8, 0.2, 0.8)
    sun = rng.uniform(0.2, 0.6)
    canvas.polygon(scenery, (232, 190, 150))
    canvas.oval(scenery.part(sun, sun + 0.24, 0.12, 0.46), (252, 240, 206))
    ridge = [(0, 0.6), (0.3, 0.42), (0.55, 0.68), (0.8, 0.5), (1, 0.65), (1, 1), (0, 1)]
    canvas.polygon(scenery, HILLS[rng.integers(3)], points=ridge)


def draw_moon(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw the moon above the roofs. Its class is sky."""
    canvas.begin_object(cue=True)
    x, roofs = camera.far_end.point_at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    disc = Quad.upright((x, max(4, roofs * rng.uniform(0.2, 0.5)) + size / 2), size, size)
    canvas.oval(disc, (250, 244, 220))
    for left, top, width in ((0.22, 0.28, 0.24), (0.5, 0.55, 0.28), (0.6, 0.22, 0.16)):
        canvas.oval(disc.part(left, left + width, top, top + width), (232, 222, 192))


def draw_hanging_lamp(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a lamp that hangs from the ceiling, where its shade would be as wide as that of a standing lamp."""
    canvas.begin_object(cue=True)
    x, ceiling_end = camera.far_end.point_at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    size = rng.uniform(24, 31)
    plane = Plane.facing(size / np.mean(SHADE_WIDTH))
    canvas.line(
        Quad((x, 0), (x, 0), (x, y), (x, y), plane),
        INK,
        [(0, 0), (0, 0.6)],
        3,
        "lamp",
    )
    draw_lamp_shade(canvas, (x, y), size, plane)


def draw_standing_lamp(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a lamp on a stand."""
    canvas.oval(place.part(0.37, 0.63, 0.95, 1.03), INK, "lamp")
    canvas.line(place, INK, [(0.5, 0.98), (0.5, 0.1)], 4, "lamp")
    draw_lamp_shade(
        canvas, place.point_at(0.5, 0.2), place.height * rng.uniform(*SHADE_WIDTH), place.plane
    )


def draw_lamp_shade(
    canvas: Canvas,
    rim: Point,
    size: float,
    plane: Plane,
) -> None:
    """Draw a lamp shade and its bulb. `rim` is the middle of the lower edge."""
    place = Quad.upright(rim, size, 0.56 * size, plane)
    canvas.oval(place.part(0.31, 0.69, 0.66, 1.3), (255, 246, 214), "lamp")
    canvas.polygon(place, (236, 178, 72), "lamp", [(0.3, 0), (0.7, 0), (1, 1), (0, 1)])
    canvas.polygon(place, (248, 208, 110), points=[(0.3, 0), (0.5, 0), (0.5, 1), (0, 1)])


def draw_on_ground(
    canvas: Canvas,
    camera: Camera,
    standing: list[GroundObject],
    rng: np.random.Generator,
) -> None:
    """Draw objects and up to two people from far to near, each with its shadow.

    Objects at a wall go to the left or right one. The others have a lane of their own in the middle.
    """
    standing = standing + [GroundObject(draw_person, 0.2, cue=False)] * int(
        (rng.random(2) < (0.55, 0.35)).sum()
    )
    lanes = 0.12 + 0.76 * (rng.permutation(len(standing)) + rng.random(len(standing))) / max(
        1, len(standing)
    )
    sizes = rng.uniform(27, 41, len(standing))
    for i in np.argsort(sizes):
        thing = standing[i]
        size = sizes[i]
        x, y = camera.ground_point(
            rng.integers(2) if thing.at_wall else lanes[i], size, thing.half_width * size
        )
        width = 2 * thing.half_width * size
        canvas.begin_object(thing.cue)
        canvas.oval(Quad.upright((x, y + 0.1 * width), width, 0.2 * width), shade(GROUND, 0.66))
        thing.draw(
            canvas, Quad.upright((x, y), size * rng.choice((-1, 1)), size, Plane.facing(size)), rng
        )


def draw_person(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a person seen from the front."""
    shirt, trousers = (SHIRTS[i] for i in rng.permutation(len(SHIRTS))[:2])
    skin = SKINS[rng.integers(3)]
    hair = HAIRS[rng.integers(3)]
    body = place.part(0, 1, rng.uniform(-0.12, 0.05), 1)
    for half in (body, body.part(1, 0, 0, 1)):  # left and right half
        canvas.polygon(
            half,
            shade(trousers, 0.62),
            "person",
            [(0.5, 0.54), (0.63, 0.54), (0.62, 0.98), (0.53, 0.98)],
        )
        canvas.polygon(half, INK, "person", [(0.53, 0.97), (0.62, 0.97), (0.65, 1), (0.53, 1)])
        canvas.polygon(
            half,
            shade(shirt, 0.85),
            "person",
            [(0.6, 0.23), (0.67, 0.27), (0.7, 0.54), (0.63, 0.54)],
        )
        canvas.oval(half.part(0.63, 0.7, 0.52, 0.59), skin, "person")
        canvas.polygon(
            half,
            shirt,
            "person",
            [(0.5, 0.22), (0.6, 0.22), (0.64, 0.28), (0.63, 0.57), (0.5, 0.57)],
        )
    canvas.oval(body.part(0.38, 0.62, 0, 0.23), hair, "person")
    canvas.oval(body.part(0.41, 0.59, 0.05, 0.23), skin, "person")


def draw_bed(
    camera: Camera,
    canvas: Canvas,
    place: Quad,
    rng: np.random.Generator,
) -> None:
    """Draw a bed seen from its foot: headboard, mattress, two pillows and a blanket."""
    depth = rng.uniform(0.62, 0.72)
    front = place.part(0, 1, 0.62, 1)
    corners = (camera.scale_depth(front.point_at(u, v), depth) for u, v in CORNERS)
    head = Quad(*corners, Plane.facing(depth * place.height))
    top_plane = camera.level_plane(front.top_left[1], place.height)
    top = Quad(head.top_left, head.top_right, front.top_right, front.top_left, top_plane)
    canvas.polygon(head.part(-0.04, 1.04, -1.1, 1), WALNUT, "bed")
    canvas.polygon(head.part(0.06, 0.94, -0.85, 0), shade(WALNUT, 1.3))
    for u in (0, 1):
        plane = camera.side_plane(front.point_at(u, 0)[0], place.height)
        side = Quad(
            head.point_at(u, 0),
            front.point_at(u, 0),
            front.point_at(u, 1),
            head.point_at(u, 1),
            plane,
        )
        canvas.polygon(side, shade(BODY, 0.72), "bed")
    canvas.polygon(top, CREAM, "bed")
    for u in (0.06, 0.53):
        canvas.polygon(head.part(u, u + 0.41, -0.4, 0.16), LINEN, "bed", ROUNDED)
    canvas.polygon(top.part(0, 1, 0.4, 1), shade(BODY, 1.08))
    canvas.polygon(front, WALNUT, "bed")
    canvas.polygon(front.part(0, 1, 0, 0.84), shade(BODY, 0.88))


def draw_car(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a small car from the side, heading right, or left in a mirrored quad."""
    extra = rng.uniform(0.02, 0.08)
    side = place.part(-extra, 1 + extra, 0, 1)
    cabin = [(0.1, 0.7), (0.16, 0.49), (0.24, 0.44), (0.54, 0.44), (0.62, 0.47), (0.8, 0.7)]
    hull = [
        (0.02, 0.9),
        (0, 0.79),
        (0.04, 0.68),
        (0.76, 0.67),
        (0.94, 0.71),
        (1, 0.79),
        (0.99, 0.91),
        (0.9, 0.93),
    ]
    canvas.polygon(side, shade(BODY, 1.08), "car", cabin)
    canvas.polygon(side, shade(BODY, 0.88), "car", [*hull, (0.1, 0.93)])
    canvas.polygon(side, PANE, points=[(0.18, 0.67), (0.22, 0.51), (0.39, 0.5), (0.39, 0.67)])
    canvas.polygon(side, PANE, points=[(0.44, 0.67), (0.44, 0.5), (0.57, 0.51), (0.71, 0.67)])
    for u in (0.22, 0.79):
        canvas.oval(side.part(u - 0.12, u + 0.12, 0.77, 1.02), INK, "car")
        canvas.oval(side.part(u - 0.055, u + 0.055, 0.84, 0.95), STEEL)
    canvas.polygon(side.part(0.94, 1, 0.73, 0.82), HEADLIGHT, "car")
    canvas.polygon(side.part(0.01, 0.06, 0.73, 0.81), TAIL_LIGHT)


def draw_tree(canvas: Canvas, place: Quad, rng: np.random.Generator) -> None:
    """Draw a trunk and a crown of discs, lit from above."""
    place = place.part(0, 1, rng.uniform(-0.75, -0.45), 1)
    green = rng.uniform(0.9, 1.15)
    canvas.polygon(place, (88, 60, 44), "tree", [(0.45, 0.4), (0.55, 0.4), (0.58, 1), (0.42, 1)])
    crown = place.part(0.1, 0.9, 0, 0.48)
    for u, v, radius, brightness in LEAVES:
        u = u + rng.uniform(-0.05, 0.05)
        v = v + rng.uniform(-0.05, 0.05)
        disc = crown.part(u - radius, u + radius, v - radius, v + radius)
        canvas.oval(disc, shade((72, 128, 84), brightness * green), "tree")
