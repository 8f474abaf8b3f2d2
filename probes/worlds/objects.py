"""Draw what is in a scene: people, beds, cars, trees, the moon, lamps, walls, and what is on these.

`objects.yaml` has the parts of each object; here is where they stand, and what is random about them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.random import Generator

from .canvas import CORNERS, Camera, Canvas, Colour, Point, Quad, shade

TABLES = yaml.safe_load(Path(__file__).with_name("objects.yaml").read_text())
COLOURS: dict[str, Colour] = {name: tuple(rgb) for name, rgb in TABLES["colours"].items()}
PERSON_CHANCES = (0.55, 0.35)  # of a first and of a second person


class GroundObject(NamedTuple):
    """An object on the ground.

    half_width is in units of an adult's height; at_wall places it next to a side wall.
    """

    draw: Callable[[Canvas, Quad, Generator], None]
    half_width: float
    at_wall: bool = False


def draw_on_ground(
    canvas: Canvas, camera: Camera, standing: list[GroundObject], rng: Generator
) -> None:
    """Draw objects and up to two people from far to near, each with its shadow.

    Objects at a wall go to the left or right one. The others have a lane of their own in the middle.
    """
    people = int(np.sum(rng.random(2) < PERSON_CHANCES))
    standing = standing + [GroundObject(draw_person, 0.2)] * people
    count = len(standing)
    lane_numbers = rng.permutation(count)
    places_in_lanes = rng.random(count)
    lanes = 0.12 + 0.76 * (lane_numbers + places_in_lanes) / max(1, count)
    sizes = rng.uniform(27, 41, count)
    for i in np.argsort(sizes):
        thing = standing[i]
        size = sizes[i]
        half_width = thing.half_width * size
        across = lanes[i]
        if thing.at_wall:
            across = rng.integers(2)
        foot = camera.ground_point(across, size, half_width)
        draw_shadow(canvas, foot, 2 * half_width)
        facing = rng.choice((-1, 1))
        place = Quad.upright(foot, width=size * facing, height=size)
        thing.draw(canvas, place, rng)


def draw_shadow(canvas: Canvas, foot: Point, width: float) -> None:
    """Draw the shadow of an object below its `foot`, the middle of its lower edge."""
    x, y = foot
    lower_edge = (x, y + 0.1 * width)
    shadow = Quad.upright(lower_edge, width, 0.2 * width)
    canvas.oval(shadow, shade(COLOURS["ground"], 0.66))


def draw_person(canvas: Canvas, place: Quad, rng: Generator) -> None:
    """Draw a person seen from the front."""
    shirt, trousers, *_ = rng.permutation(TABLES["shirts"]).tolist()
    skin = choose(rng, "skins")
    hair = choose(rng, "hairs")
    body = place.part(top=rng.uniform(-0.12, 0.05))
    mirrored = body.part(left=1, right=0)
    for half in (body, mirrored):
        draw_object(canvas, half, "half a person", shirt=shirt, trousers=trousers, skin=skin)
    draw_object(canvas, body, "head of a person", hair=hair, skin=skin)


def draw_bed(camera: Camera, canvas: Canvas, place: Quad, rng: Generator) -> None:
    """Draw a bed seen from its foot: headboard, mattress, two pillows and a blanket."""
    depth = rng.uniform(0.62, 0.72)
    front = place.part(top=0.62)
    head = Quad(*(camera.scale_depth(front.point_at(u, v), depth) for u, v in CORNERS))
    top = Quad(
        top_left=head.top_left,
        top_right=head.top_right,
        bottom_right=front.top_right,
        bottom_left=front.top_left,
    )
    draw_object(canvas, head, "headboard")
    for u in (0, 1):
        side = Quad(
            top_left=head.point_at(u, 0),
            top_right=front.point_at(u, 0),
            bottom_right=front.point_at(u, 1),
            bottom_left=head.point_at(u, 1),
        )
        draw_object(canvas, side, "side of a bed")
    draw_object(canvas, top, "mattress")
    draw_object(canvas, head, "pillows")
    draw_object(canvas, top, "blanket")
    draw_object(canvas, front, "front of a bed")


def draw_car(canvas: Canvas, place: Quad, rng: Generator) -> None:
    """Draw a small car from the side, heading right, or left in a mirrored quad."""
    extra = rng.uniform(0.02, 0.08)
    longer = place.part(left=-extra, right=1 + extra)
    draw_object(canvas, longer, "car")


def draw_tree(canvas: Canvas, place: Quad, rng: Generator) -> None:
    """Draw a trunk and a crown of discs, lit from above."""
    tree = place.part(top=rng.uniform(-0.75, -0.45))
    green = rng.uniform(0.9, 1.15)
    draw_object(canvas, tree, "trunk")
    crown = tree.part(left=0.1, right=0.9, bottom=0.48)
    for u, v, radius, brightness in TABLES["crown"]:
        u += rng.uniform(-0.05, 0.05)
        v += rng.uniform(-0.05, 0.05)
        disc = crown.part(left=u - radius, right=u + radius, top=v - radius, bottom=v + radius)
        colour = shade(COLOURS["leaf"], brightness * green)
        canvas.oval(disc, colour, "tree")


def draw_moon(canvas: Canvas, camera: Camera, rng: Generator) -> None:
    """Draw the moon above the roofs. Its class is sky."""
    x, roofs = camera.far_end.point_at(rng.uniform(0.1, 0.9), 0)
    size = rng.uniform(8, 11)
    middle = max(4, roofs * rng.uniform(0.2, 0.5))
    foot = (x, middle + size / 2)
    draw_object(canvas, Quad.upright(foot, size, size), "moon")


def draw_hanging_lamp(canvas: Canvas, camera: Camera, rng: Generator) -> None:
    """Draw a lamp that hangs from the ceiling."""
    x, ceiling_end = camera.far_end.point_at(rng.uniform(0, 1), 0)
    y = max(18, ceiling_end * rng.uniform(0.8, 1.15))
    size = rng.uniform(24, 31)
    cord = Quad.upright((x, y), width=0, height=y)
    draw_object(canvas, cord, "cord of a lamp")
    draw_lamp_shade(canvas, (x, y), size)


def draw_standing_lamp(canvas: Canvas, place: Quad, rng: Generator) -> None:
    """Draw a lamp on a stand."""
    draw_object(canvas, place, "stand of a lamp")
    width = place.height * rng.uniform(0.65, 0.75)
    rim = place.point_at(0.5, 0.2)
    draw_lamp_shade(canvas, rim, width)


def draw_lamp_shade(canvas: Canvas, rim: Point, size: float) -> None:
    """Draw a lamp shade and its bulb. `rim` is the middle of the lower edge."""
    place = Quad.upright(rim, width=size, height=0.56 * size)
    draw_object(canvas, place, "shade of a lamp")


def draw_house(canvas: Canvas, front: Quad, tint: float, rng: Generator) -> None:
    """Draw a house of two storeys with windows and at random a gable and a door."""
    tint *= rng.uniform(0.96, 1.04)
    if rng.random() < 0.5:
        draw_object(canvas, place=front, name="gable", brightness=tint)
    draw_object(canvas, place=front, name="wall of a house", brightness=tint)
    columns = max(1, round(front.width / 17))
    door_column = None
    if rng.random() < 0.45:
        door_column = rng.integers(columns)
    for column in range(columns):
        bay = front.part(left=column / columns, right=(column + 1) / columns)
        upper = bay.part(left=0.2, right=0.8, top=0.14, bottom=0.42)
        lower = bay.part(left=0.2, right=0.8, top=0.54, bottom=0.82)
        if rng.random() < 0.45:
            draw_window(canvas, upper, rng)
        if column == door_column:
            draw_door(canvas, bay.part(left=0.26, right=0.74, top=0.54), rng)
        elif rng.random() < 0.45:
            draw_window(canvas, lower, rng)


def draw_window(canvas: Canvas, frame: Quad, rng: Generator) -> None:
    """Draw a window, lit or dark."""
    glass = "dark"
    if rng.random() < 0.5:
        glass = "lit"
    draw_object(canvas, frame, "window", glass=COLOURS[glass])


def draw_door(canvas: Canvas, frame: Quad, rng: Generator) -> None:
    """Draw a door with its handle on either side."""
    draw_object(canvas, frame, "door")
    handle_u = 0.2
    if rng.random() < 0.5:
        handle_u = 0.8
    handle = Quad.upright(frame.point_at(handle_u, 0.58), width=1.8, height=1.8)
    canvas.oval(handle, COLOURS["brass"])


def draw_picture(canvas: Canvas, frame: Quad, rng: Generator) -> None:
    """Draw a framed landscape: hills under a low sun."""
    draw_object(canvas, frame, "picture")
    scenery = frame.part(left=0.2, right=0.8, top=0.2, bottom=0.8)
    sun_u = rng.uniform(0.2, 0.6)
    sun = scenery.part(left=sun_u, right=sun_u + 0.24, top=0.12, bottom=0.46)
    canvas.oval(sun, COLOURS["sun"])
    draw_object(canvas, scenery, "hills of a picture", hills=choose(rng, "hills"))


def choose(rng: Generator, table: str) -> Colour:
    """Return one of the colours of a table."""
    return rng.choice(TABLES[table]).tolist()


def draw_object(
    canvas: Canvas, place: Quad, name: str, brightness: float = 1.0, **colours: Colour
) -> None:
    """Draw the parts of an object of the table in order.

    Args:
        canvas: Where it is drawn.
        place: Its quad.
        name: Of the object.
        brightness: Factor of all its colours.
        **colours: Those that the scene gives, by name.
    """
    colours = COLOURS | colours
    for part in TABLES["objects"][name]:
        quad = place
        if "box" in part:
            quad = place.part(*part["box"])
        brightness_of_part = brightness * part.get("shade", 1)
        colour = shade(colours[part["colour"]], brightness_of_part)
        label = part.get("class", "")
        if "oval" in part:
            canvas.oval(quad, colour, label)
        elif "line" in part:
            canvas.line(quad, colour, points=part["line"], width=part.get("width", 2), name=label)
        else:
            canvas.polygon(quad, colour, points=part["polygon"] or CORNERS, name=label)
