"""The toy world of the demo: drawn rooms and streets at dusk, each with an exact class mask.

Classes come in pairs that look alike locally (ceiling and sky, wall and building, floor and road, bed and car): the two
of a pair share colour and texture, and the rest of the picture tells which one it is. A lamp, a picture or a bed means
a room; a tree, the moon or a car means a street; at least one of them is in every scene.

The one local hint is deliberately weak: a canvas grain on the paired classes. Its contrast wanders smoothly over the
picture and takes either sign, but its mean is `+evidence` in rooms and `-evidence` in streets.

Shapes: H = W = 96 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from .canvas import CLASSES, SIZE_PX, WHOLE, Canvas, Quad, View, look, shade
from .objects import (  # fmt: skip
    GROUND,
    TOP,
    Standing,
    bed,
    car,
    door,
    hanging_lamp,
    house,
    moon,
    picture,
    stand_on_ground,
    standing_lamp,
    tree,
    wall,
    window,
)

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


def wall_tints(rng: np.random.Generator) -> tuple[float, float, float]:
    """Brightness of the left, far and right wall: light falls in from one side."""
    return (0.84, 1.0, 0.93) if rng.random() < 0.5 else (0.93, 1.0, 0.84)


def wall_stretches(view: View, rng: np.random.Generator) -> list[Quad]:
    """Stretches of wall from floor to ceiling, in random order: two on a wide wall, one on a narrow one."""
    stretches = []
    for front in view.walls():
        count = min(2, int(front.width / 13))
        stretches += [front.part((i + 0.1) / count, (i + 0.9) / count, 0, 1) for i in range(count)]
    return [stretches[i] for i in rng.permutation(len(stretches))]


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
