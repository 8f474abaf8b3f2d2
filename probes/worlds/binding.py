"""Draw pictures of several scenes at once, in which only cues of the same scene tell look-alikes apart.

Each of the 8 x 8 patches shows its part of one of S scenes. The scenes are dealt to the patches at random, each to
equally many, and a border of one pixel marks a patch with the hue of its scene, one of 12. Whether a patch shows
a ceiling or a sky follows from what other patches with the same border show, and from no others:

    scenes   who can tell
    1        whoever mixes all patches; random layers do so, too, but a probe reads less of that than trained ones write
    2, 4     whoever binds: attends to patches of the same hue

The mask ignores borders. Each scene shows at least `CUES` patches with a lamp, a picture or a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image

from .canvas import CLASSES, SIZE_PX
from .scenes import Scene, draw_scene

GRID = 8
PATCH_COUNT = GRID**2
HUES = 12
IGNORED = 255
PATCH_PX = SIZE_PX // GRID
CUE_CLASSES = tuple(CLASSES.index(name) for name in ("lamp", "picture", "tree"))
# patches with a cue per scene, and the share of such a patch that the cue covers
CUES = 2
CUE_SHARE = 0.25
POOL = 100  # scenes that pictures of training share


@dataclass(frozen=True)
class Mosaic:
    """A picture `uint8[H, W, 3]` of S scenes and its mask `uint8[H, W]`, IGNORED at borders.

    Attributes:
        scene: The scene of each patch, i64[64] in raster order.
        indoor: Whether each scene is a room, bool[S].
        cue: Patches that show a cue, bool[64].
    """

    image: ndarray
    mask: ndarray
    scene: ndarray
    indoor: ndarray
    cue: ndarray

    @property
    def kind(self) -> str:
        """What a caption calls it."""
        rooms = int(self.indoor.sum())
        streets = len(self.indoor) - rooms
        return f"{rooms} indoor and {streets} outdoor scenes"


def draw_mosaic(rng: Generator, scenes: int) -> Mosaic:
    """Draw a picture of `scenes` scenes, each a room or a street with equal probability; 64 is a multiple of them."""
    kinds = rng.random(scenes) < 0.5
    while True:
        drawn = [draw_scene(rng, indoor=bool(indoor)) for indoor in kinds]
        mosaic = _compose(rng, drawn, [_cue_patches(scene) for scene in drawn])
        if mosaic is not None:
            return mosaic


def mix_mosaics(rng: Generator, scenes: Sequence[int]) -> list[Mosaic]:
    """Draw pictures of 1 or more `scenes` each, dealt from a pool of scenes, at a tenth of the cost.

    They share scenes, so that they suit training, but no interval over images.
    """
    pool: list[Scene] = []
    cues: list[ndarray] = []
    while len(pool) < POOL:
        scene = draw_scene(rng, indoor=len(pool) % 2 == 0)
        cue = _cue_patches(scene)
        if cue.sum() >= CUES:
            pool.append(scene)
            cues.append(cue)
    mosaics: list[Mosaic] = []
    while len(mosaics) < len(scenes):
        count = scenes[len(mosaics)]
        chosen = rng.choice(POOL, count, replace=False)
        mosaic = _compose(rng, [pool[i] for i in chosen], [cues[i] for i in chosen])
        if mosaic is not None:
            mosaics.append(mosaic)
    return mosaics


def _cue_patches(scene: Scene) -> ndarray:
    """Return the patches bool[64] of which a cue covers `CUE_SHARE` within the border."""
    inside = split_patches(scene.mask)[:, 1:-1, 1:-1]
    is_cue = np.isin(inside, CUE_CLASSES)
    return is_cue.mean((1, 2)) >= CUE_SHARE


def _compose(rng: Generator, drawn: list[Scene], cues: list[ndarray]) -> Mosaic | None:
    """Deal scenes with their cues bool[64]; None if that cannot be done."""
    scene = _deal(rng, np.stack(cues))
    if scene is None:
        return None

    def take(patches: list[ndarray]) -> ndarray:
        """Return each patch of the scene that it shows."""
        return np.stack(patches)[scene, np.arange(PATCH_COUNT)]

    image = take([split_patches(one.image) for one in drawn])
    mask = take([split_patches(one.mask) for one in drawn])
    hues = rng.permutation(HUES)
    colours = hue_colours()[hues[scene]]
    border = np.ones((PATCH_PX, PATCH_PX), bool)
    border[1:-1, 1:-1] = False
    image[:, border] = colours[:, None]
    mask[:, border] = IGNORED
    return Mosaic(
        image=_join(image),
        mask=_join(mask),
        scene=scene,
        indoor=np.array([one.indoor for one in drawn]),
        cue=take(cues),
    )


def _deal(rng: Generator, cues: ndarray) -> ndarray | None:
    """Return the scene of each patch, i64[64]: `CUES` patches with a cue for each, then at random, equally many.

    None if some scene has too few of its cues bool[S, 64] where no other scene has taken the patch.
    """
    scenes = len(cues)
    scene_of = np.full(PATCH_COUNT, -1)
    for scene in rng.permutation(scenes):
        free = np.flatnonzero(cues[scene] & (scene_of < 0))
        if len(free) < CUES:
            return None
        chosen = rng.choice(free, CUES, replace=False)
        scene_of[chosen] = scene
    others = np.repeat(np.arange(scenes), PATCH_COUNT // scenes - CUES)
    scene_of[scene_of < 0] = rng.permutation(others)
    return scene_of


def hue_colours() -> ndarray:
    """Return the colours of the borders, uint8[HUES, 3], evenly spaced on the colour circle."""
    row = [(hue * 256 // HUES, 255, 230) for hue in range(HUES)]
    picture = Image.fromarray(np.array([row], np.uint8), "HSV")
    return np.asarray(picture.convert("RGB"))[0]


def split_patches(pixels: ndarray) -> ndarray:
    """Return [64, 12, 12, ...] of pixels [96, 96, ...], in raster order."""
    rest = pixels.shape[2:]
    rows = pixels.reshape(GRID, PATCH_PX, GRID, PATCH_PX, *rest)
    return rows.swapaxes(1, 2).reshape(PATCH_COUNT, PATCH_PX, PATCH_PX, *rest)


def _join(patches: ndarray) -> ndarray:
    """Return [96, 96, ...] of patches [64, 12, 12, ...]."""
    rest = patches.shape[3:]
    rows = patches.reshape(GRID, GRID, PATCH_PX, PATCH_PX, *rest)
    return rows.swapaxes(1, 2).reshape(SIZE_PX, SIZE_PX, *rest)
