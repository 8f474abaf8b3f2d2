"""Draw the scenes of the toy world: rooms and streets, each with an exact class mask.

Eight classes form pairs with the same colour and texture: ceiling and sky, wall and building, floor and road, bed and
car. Only the context tells them apart. A lamp, picture or bed marks a room; a tree, moon or car marks a street. Every
scene has at least one of these cues.

Paired classes have a grain. Its contrast is a smooth random field, whose mean may tell rooms from streets as weak
local evidence.

Shapes: H = W = 96 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from PIL import Image

from .canvas import CLASSES, FULL_FRAME, SIZE_PX, Camera, Canvas, Quad, sample_camera
from .objects import (
    COLOURS,
    GroundObject,
    draw_bed,
    draw_car,
    draw_door,
    draw_hanging_lamp,
    draw_house,
    draw_moon,
    draw_object,
    draw_on_ground,
    draw_picture,
    draw_standing_lamp,
    draw_tree,
    draw_window,
)

# One 4 x 4 texture per pair. Rows and columns sum to zero, so that edges and shading do not correlate with it.
WEAVES = (
    "++-- --++ ++-- --++",
    "+-+- +-+- -+-+ -+-+",
    "+-+- -+-+ +-+- -+-+",
    "+-+- -+-+ -+-+ +-+-",
)
GRAIN_CONTRAST = 0.03
PIXEL_NOISE = 0.018
ROOM_CUES = ("lamp", "picture", "bed")
STREET_CUES = ("tree", "moon", "car")
# of red, green and blue
WARM_GLOW = (0.18, 0.12, 0.03)
CAST_RANGE = (0.12, 0.06, 0.12)
LIT_FROM_LEFT = (0.84, 1.0, 0.93)  # brightness of the left, far and right wall
LIT_FROM_RIGHT = (0.93, 1.0, 0.84)
_ROWS, _COLUMNS = np.mgrid[:SIZE_PX, :SIZE_PX]


def _build_textures() -> np.ndarray:
    """Return the texture of each class as `float32[K, 4, 4]` of -1 and 1, and of 0 for classes without a pair."""
    textures = np.zeros((len(CLASSES), 4, 4), np.float32)
    for pair, weave in enumerate(WEAVES):
        signs = np.array([list(row) for row in weave.split()])
        textures[2 * pair : 2 * pair + 2] = np.where(signs == "+", 1, -1)
    return textures


_GRAIN = _build_textures()


@dataclass(frozen=True)
class Scene:
    """A picture `uint8[H, W, 3]` and its mask `uint8[H, W]` of indices into CLASSES; `indoor` if it is a room."""

    indoor: bool
    image: np.ndarray
    mask: np.ndarray


def draw_scene(rng: Generator, indoor: bool | None = None, evidence: float = 0.0) -> Scene:
    """Draw a room or a street with equal probability.

    Args:
        rng: Random generator. The same state gives the same bytes.
        indoor: Whether it is a room; None for either.
        evidence: Mean of the grain's contrast in rooms, its negative in streets, in units of its standard deviation.
    """
    if indoor is None:
        indoor = bool(rng.random() < 0.5)
    camera = sample_camera(rng)
    canvas = Canvas()
    if indoor:
        draw_room(canvas, camera, rng)
    else:
        draw_street(canvas, camera, rng)
    mask = canvas.mask()
    mean_contrast = -evidence
    if indoor:
        mean_contrast = evidence
    image = canvas.image() + sample_grain(mask, mean=mean_contrast, rng=rng)
    light = sample_light(camera, rng)
    noise = PIXEL_NOISE * rng.standard_normal(image.shape, np.float32)
    lit = (image * light + noise).clip(0, 1)
    pixels = lit * 255 + 0.5
    return Scene(indoor, pixels.astype(np.uint8), mask)


def draw_room(canvas: Canvas, camera: Camera, rng: Generator) -> None:
    """Draw a room: ceiling, three walls, a board floor, and its objects."""
    names = sample_objects(rng, ROOM_CUES, lamp=0.65, picture=0.75, bed=0.6, window=0.7, door=0.5)
    canvas.polygon(FULL_FRAME, COLOURS["top"], "ceiling")
    draw_object(canvas, camera.ground(), "floor")
    for front, tint in zip(camera.walls(), sample_wall_tints(rng), strict=True):
        draw_object(canvas, place=front, name="wall", brightness=tint)
    sections = sample_wall_sections(camera, rng)
    if "window" in names:
        frame = sections.pop().part(top=0.16, bottom=0.58)
        draw_window(canvas, frame, rng)
    if "picture" in names:
        frame = sections.pop().part(top=0.15, bottom=0.59)
        draw_picture(canvas, frame, rng)
    if "door" in names:
        frame = sections.pop().part(left=0.05, right=0.95, top=0.28)
        draw_door(canvas, frame, rng)
    standing = []
    if "bed" in names:
        standing.append(GroundObject(partial(draw_bed, camera), 0.55))
    if "lamp" in names:
        if rng.random() < 0.6:
            draw_hanging_lamp(canvas, camera, rng)
        else:
            standing.append(GroundObject(draw_standing_lamp, 0.3, at_wall=True))
    draw_on_ground(canvas, camera=camera, standing=standing, rng=rng)


def draw_street(canvas: Canvas, camera: Camera, rng: Generator) -> None:
    """Draw a street: sky, houses on three sides, a road with kerbs and lane marks, and its objects."""
    names = sample_objects(rng, STREET_CUES, tree=0.6, moon=0.3, car=0.6)
    canvas.polygon(FULL_FRAME, COLOURS["top"], "sky")
    if "moon" in names:
        draw_moon(canvas, camera, rng)
    draw_object(canvas, camera.ground(), "road")
    left, far, right = zip(camera.walls(), sample_wall_tints(rng), strict=True)
    houses_far = rng.integers(2, 4)
    houses_left = rng.integers(1, 3)
    houses_right = rng.integers(1, 3)
    for (side, tint), count in ((far, houses_far), (left, houses_left), (right, houses_right)):
        for i in range(count):
            top = rng.uniform(-0.18, 0.16)
            front = side.part(left=i / count, right=(i + 1) / count, top=top)
            draw_house(canvas, front=front, tint=tint, rng=rng)
    standing = []
    if "car" in names:
        standing.append(GroundObject(draw_car, 0.58))
    if "tree" in names:
        standing.append(GroundObject(draw_tree, 0.3, at_wall=True))
    draw_on_ground(canvas, camera=camera, standing=standing, rng=rng)


def sample_objects(rng: Generator, cues: Sequence[str], **chances: float) -> set[str]:
    """Sample objects independently, each with its own probability, plus one cue that is always present."""
    names = {rng.choice(cues)}
    for name, chance in chances.items():
        if rng.random() < chance:
            names.add(name)
    return names


def sample_wall_tints(rng: Generator) -> tuple[float, float, float]:
    """Return the brightness of the left, far and right wall, lit from one side."""
    if rng.random() < 0.5:
        return LIT_FROM_LEFT
    return LIT_FROM_RIGHT


def sample_wall_sections(camera: Camera, rng: Generator) -> list[Quad]:
    """Return sections of the walls from floor to ceiling in random order: two of a wide wall, one of a narrow one."""
    sections = []
    for front in camera.walls():
        count = min(2, int(front.width / 13))
        for i in range(count):
            section = front.part(left=(i + 0.1) / count, right=(i + 0.9) / count)
            sections.append(section)
    return [sections[i] for i in rng.permutation(len(sections))]


def sample_grain(mask: np.ndarray, mean: float, rng: Generator) -> np.ndarray:
    """Return the grain on the paired classes as `float32[H, W, 1]`, to be added to the picture.

    Args:
        mask: Classes `uint8[H, W]`.
        mean: Mean contrast in units of the standard deviation of its random field.
        rng: Random generator.
    """
    values = rng.standard_normal((9, 9), np.float32)
    knots = Image.fromarray(values)
    smooth = knots.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    # to unit standard deviation
    field = np.asarray(smooth) / 0.67
    textures = _GRAIN[mask, _ROWS % 4, _COLUMNS % 4]
    contrast = GRAIN_CONTRAST * (field + mean)
    return (contrast * textures)[..., None]


def sample_light(camera: Camera, rng: Generator) -> np.ndarray:
    """Return the light as a factor `float32[H, W, 3]`, independent of what the scene looks like.

    It combines a warm glow at the far end with random brightness, colour cast, gradient and vignette.
    """
    sideways = abs(_COLUMNS - camera.eye[0])
    upwards = abs(_ROWS - camera.eye[1])
    from_eye = 1.5 * np.maximum(sideways, upwards) / SIZE_PX
    depth = 1 - from_eye.clip(0, 1)
    glow = 1 + (depth**2)[..., None] * WARM_GLOW
    across = _COLUMNS / SIZE_PX - 0.5
    down = _ROWS / SIZE_PX - 0.5
    slope_across = rng.uniform(-0.2, 0.2)
    slope_down = rng.uniform(-0.2, 0.2)
    slope = 1 + slope_across * across + slope_down * down
    darkening = rng.uniform(0.4, 0.8)
    vignette = 1 - darkening * (across**2 + down**2)
    brightness = rng.uniform(0.78, 1.2)
    tint = 1 + rng.uniform(-1, 1, 3) * CAST_RANGE
    shading = slope * vignette
    light = glow * shading[..., None] * (brightness * tint)
    return light.astype(np.float32)
