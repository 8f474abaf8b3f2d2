"""Draw walls and houses, and the windows, doors and pictures on them."""

from __future__ import annotations

import numpy as np

from .canvas import CORNERS, Canvas, Quad, shade
from .colours import BRASS, CREAM, DARK, DUSK, HILLS, LIT, SIDE, SUN, WALNUT

# as points (u, v) of a quad
GABLE = ((0, 0), (0.5, -0.18), (1, 0))
WINDOW_BARS = (((0.5, 0), (0.5, 1)), ((0, 0.45), (1, 0.45)))
RIDGE = ((0, 0.6), (0.3, 0.42), (0.55, 0.68), (0.8, 0.5), (1, 0.65), (1, 1), (0, 1))


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
    has_gable = rng.random() < 0.5
    if has_gable:
        canvas.polygon(front, shade(SIDE, tint), "building", GABLE)
        canvas.line(front, shade(SIDE, tint * 0.7), GABLE)
    draw_wall(canvas, front, "building", tint)
    columns = max(1, round(front.width / 17))
    door_column = None
    has_door = rng.random() < 0.45
    if has_door:
        door_column = rng.integers(columns)
    for column in range(columns):
        bay = front.part(left=column / columns, right=(column + 1) / columns)
        has_upper_window = rng.random() < 0.45
        if has_upper_window:
            draw_window(canvas, bay.part(left=0.2, right=0.8, top=0.14, bottom=0.42), rng)
        if column == door_column:
            draw_door(canvas, bay.part(left=0.26, right=0.74, top=0.54), rng)
            continue
        has_lower_window = rng.random() < 0.45
        if has_lower_window:
            draw_window(canvas, bay.part(left=0.2, right=0.8, top=0.54, bottom=0.82), rng)


def draw_window(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a window, lit or dark."""
    is_lit = rng.random() < 0.5
    glass = LIT if is_lit else DARK
    canvas.polygon(frame, CREAM, "window")
    canvas.polygon(frame.inset(0.12, 0.1), glass)
    upper_pane = frame.part(left=0.12, right=0.88, top=0.1, bottom=0.45)
    canvas.polygon(upper_pane, shade(glass, 1.1))
    for bar in WINDOW_BARS:
        canvas.line(frame, CREAM, bar, width=3)


def draw_door(canvas: Canvas, frame: Quad, rng: np.random.Generator) -> None:
    """Draw a door with its handle on either side."""
    canvas.polygon(frame, CREAM, "door")
    canvas.polygon(frame.part(left=0.1, right=0.9, top=0.06), WALNUT)
    for top, bottom in ((0.14, 0.48), (0.58, 0.92)):
        panel = frame.part(left=0.24, right=0.76, top=top, bottom=bottom)
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
    sun = scenery.part(left=sun_u, right=sun_u + 0.24, top=0.12, bottom=0.46)
    canvas.oval(sun, SUN)
    hills = HILLS[rng.integers(3)]
    canvas.polygon(scenery, hills, points=RIDGE)
