"""Draw the scenes of the toy world: rooms and streets, each with an exact class mask.

Eight classes form pairs with the same colour and texture: ceiling and sky, wall and building, floor and road, bed and
car. Only the context tells them apart. A lamp, picture or bed marks a room; a tree, moon or car marks a street. Every
scene has at least one of these cues.

The only local evidence is deliberately weak: a grain on the paired classes. Its contrast is a smooth random field with
mean `+evidence` in rooms and `-evidence` in streets.

Shapes: H = W = 96 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from . import objects
from .canvas import CLASSES, FULL_FRAME, SIZE_PX, Camera, Canvas, Quad, sample_camera, shade
from .objects import GROUND, TOP, GroundObject
from .surfaces import Surfaces

# One 4 x 4 texture per pair. Rows and columns sum to zero, so that edges and shading do not correlate with it.
WEAVES = (
    "++-- --++ ++-- --++",
    "+-+- +-+- -+-+ -+-+",
    "+-+- -+-+ +-+- -+-+",
    "+-+- -+-+ -+-+ +-+-",
)
GRAIN_CONTRAST = 0.03
PIXEL_NOISE = 0.018
_GRAIN = np.zeros((len(CLASSES), 4, 4), np.float32)
_GRAIN[:8] = np.repeat(
    [[[1 if sign == "+" else -1 for sign in row] for row in w.split()] for w in WEAVES], 2, axis=0
)
_ROWS, _COLUMNS = np.mgrid[:SIZE_PX, :SIZE_PX]


@dataclass(frozen=True)
class Scene:
    """A picture `uint8[H, W, 3]` and its mask `uint8[H, W]` of indices into CLASSES; `indoor` if it is a room.

    `cues` is the number of objects that tell rooms from streets.
    """

    indoor: bool
    image: np.ndarray
    mask: np.ndarray
    surfaces: Surfaces
    cues: int

    @property
    def kind(self) -> str:
        """What a caption calls it."""
        return f"an {'indoor' if self.indoor else 'outdoor'} scene"


def draw_scene(
    rng: np.random.Generator,
    evidence: float = 0.1,
    hides_cues: bool = False,
    indoor: bool | None = None,
) -> Scene:
    """Draw a room or a street with equal probability.

    Args:
        rng: Random generator. The same state gives the same bytes.
        evidence: Mean of the grain in units of its standard deviation. At 0 there is no local evidence.
        hides_cues: Leave out the objects that are cues. All else is drawn as with them.
        indoor: Whether it is a room; None for either.
    """
    indoor = bool(rng.random() < 0.5) if indoor is None else indoor
    camera = sample_camera(rng)
    canvas = Canvas(hides_cues)
    (draw_room if indoor else draw_street)(canvas, camera, rng)
    mask = canvas.mask()
    image = canvas.image() + sample_grain(mask, evidence if indoor else -evidence, rng)
    image = image * sample_light(camera, rng) + PIXEL_NOISE * rng.standard_normal(
        image.shape, np.float32
    )
    pixels = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(
        indoor,
        pixels,
        mask,
        canvas.surfaces(camera),
        canvas.cues,
    )


def draw_pair(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Draw a scene with exactly one cue that can be seen, and the same scene without it."""
    while True:
        start = rng.bit_generator.state
        cued = draw_scene(rng)
        if cued.cues != 1:
            continue
        end = rng.bit_generator.state
        rng.bit_generator.state = start
        without = draw_scene(rng, hides_cues=True)
        rng.bit_generator.state = end
        if (cued.image != without.image).any():
            return cued, without


def draw_room(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a room: ceiling, three walls, a board floor, and its objects."""
    names = sample_objects(
        rng,
        ("lamp", "picture", "bed"),
        lamp=0.65,
        picture=0.75,
        bed=0.6,
        window=0.7,
        door=0.5,
    )
    canvas.polygon(camera.ceiling(), TOP, "ceiling")
    canvas.begin_object()
    canvas.polygon(camera.ground(), GROUND, "floor")
    for u in np.arange(0.1, 1, 0.2):
        canvas.line(camera.ground(), shade(GROUND, 0.85), [(u, 0), (u, 1)])
    for front, tint in zip(camera.walls(), sample_wall_tints(rng), strict=True):
        canvas.begin_object()
        objects.draw_wall(canvas, front, "wall", tint)
    sections = sample_wall_sections(camera, rng)
    if "window" in names:
        objects.draw_window(canvas, sections.pop().part(0, 1, 0.16, 0.58), rng)
    if "picture" in names:
        objects.draw_picture(canvas, sections.pop().part(0, 1, 0.15, 0.59), rng)
    if "door" in names:
        objects.draw_door(canvas, sections.pop().part(0.05, 0.95, 0.28, 1), rng)
    standing = [GroundObject(partial(objects.draw_bed, camera), 0.55)] if "bed" in names else []
    if "lamp" in names and rng.random() < 0.6:
        objects.draw_hanging_lamp(canvas, camera, rng)
    elif "lamp" in names:
        standing.append(GroundObject(objects.draw_standing_lamp, 0.3, at_wall=True))
    objects.draw_on_ground(canvas, camera, standing, rng)


def draw_street(canvas: Canvas, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a street: sky, houses on three sides, a road with kerbs and lane marks, and its objects."""
    names = sample_objects(
        rng,
        ("tree", "moon", "car"),
        tree=0.6,
        moon=0.3,
        car=0.6,
    )
    canvas.polygon(FULL_FRAME, TOP, "sky")
    if "moon" in names:
        objects.draw_moon(canvas, camera, rng)
    canvas.begin_object()
    canvas.polygon(camera.ground(), GROUND, "road")
    for u in (0.16, 0.84):
        canvas.line(camera.ground(), shade(GROUND, 0.85), [(u, 0), (u, 1)])
    for v in (0.03, 0.1, 0.22, 0.38):
        canvas.polygon(camera.ground().part(0.48, 0.52, v, 1.5 * v + 0.01), shade(GROUND, 1.5))
    left, far, right = zip(camera.walls(), sample_wall_tints(rng), strict=True)
    for (front, tint), count in (
        (far, rng.integers(2, 4)),
        (left, rng.integers(1, 3)),
        (right, rng.integers(1, 3)),
    ):
        for i in range(count):
            objects.draw_house(
                canvas,
                front.part(i / count, (i + 1) / count, rng.uniform(-0.18, 0.16), 1),
                tint,
                rng,
            )
    standing = [GroundObject(objects.draw_car, 0.58)] if "car" in names else []
    if "tree" in names:
        standing.append(GroundObject(objects.draw_tree, 0.3, at_wall=True))
    objects.draw_on_ground(canvas, camera, standing, rng)


def sample_objects(rng: np.random.Generator, cues: Sequence[str], **chances: float) -> set[str]:
    """Sample objects independently, each with its own probability, plus one cue that is always present."""
    cue = cues[rng.integers(len(cues))]
    return {name for name, chance in chances.items() if rng.random() < chance or name == cue}


def sample_wall_tints(rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the brightness of the left, far and right wall, lit from one side."""
    return (0.84, 1.0, 0.93) if rng.random() < 0.5 else (0.93, 1.0, 0.84)


def sample_wall_sections(camera: Camera, rng: np.random.Generator) -> list[Quad]:
    """Return sections of the walls from floor to ceiling in random order: two of a wide wall, one of a narrow one."""
    sections = []
    for front in camera.walls():
        count = min(2, int(front.width / 13))
        sections += [front.part((i + 0.1) / count, (i + 0.9) / count, 0, 1) for i in range(count)]
    return [sections[i] for i in rng.permutation(len(sections))]


def sample_grain(mask: np.ndarray, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Return the grain on the paired classes as `float32[H, W, 1]`, to be added to the picture.

    Args:
        mask: Classes `uint8[H, W]`.
        mean: Mean contrast in units of the standard deviation of its random field.
        rng: Random generator.
    """
    knots = Image.fromarray(rng.standard_normal((9, 9), np.float32))
    # to unit standard deviation
    field = np.asarray(knots.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)) / 0.67
    return (GRAIN_CONTRAST * (field + mean) * _GRAIN[mask, _ROWS % 4, _COLUMNS % 4])[..., None]


def sample_light(camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Return the light as a factor `float32[H, W, 3]`, independent of what the scene looks like.

    It combines a warm glow at the far end with random brightness, colour cast, gradient and vignette.
    """
    sideways = abs(_COLUMNS - camera.eye[0])
    upwards = abs(_ROWS - camera.eye[1])
    depth = 1 - (1.5 * np.maximum(sideways, upwards) / SIZE_PX).clip(0, 1)
    glow = 1 + (depth**2)[..., None] * (0.18, 0.12, 0.03)
    across = _COLUMNS / SIZE_PX - 0.5
    down = _ROWS / SIZE_PX - 0.5
    slope = 1 + rng.uniform(-0.2, 0.2) * across + rng.uniform(-0.2, 0.2) * down
    vignette = 1 - rng.uniform(0.4, 0.8) * (across**2 + down**2)
    cast = rng.uniform(0.78, 1.2) * (1 + rng.uniform(-1, 1, 3) * (0.12, 0.06, 0.12))
    return (glow * (slope * vignette)[..., None] * cast).astype(np.float32)
