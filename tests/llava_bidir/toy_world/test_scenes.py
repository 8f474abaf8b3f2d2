"""Properties of the toy world that the demo relies on. Shapes: N scenes, H = W = SIZE_PX."""

import numpy as np
import pytest

from llava_bidir.toy_world import scenes
from llava_bidir.toy_world.canvas import CLASSES, SIZE_PX
from llava_bidir.toy_world.scenes import Scene, draw_pair, draw_scene

CEILING, SKY, WALL, BUILDING, FLOOR, ROAD, BED, CAR, LAMP, TREE, PICTURE, WINDOW, DOOR, PERSON = (
    range(14)
)
SURFACES = [(CEILING, SKY), (WALL, BUILDING), (FLOOR, ROAD)]
ROOM_ONLY, STREET_ONLY = (
    (CEILING, WALL, FLOOR, BED, LAMP, PICTURE),
    (SKY, BUILDING, ROAD, CAR, TREE),
)


def draw_many(
    count: int, evidence: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indoor `bool[N]`, images `float32[N, H, W, 3]` in 0..1 and masks `uint8[N, H, W]`."""
    rng = np.random.default_rng(seed)
    return stack([draw_scene(rng, evidence) for _ in range(count)])


def stack(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    return (
        np.array([scene.indoor for scene in scenes]),
        images,
        np.stack([scene.mask for scene in scenes]),
    )


def grain_per_scene(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return f[N], the mean projection of paired pixels onto their texture, in units of the grain's contrast."""
    rows, columns = np.mgrid[:SIZE_PX, :SIZE_PX]
    weave = scenes._GRAIN[masks, rows % 4, columns % 4]
    return (images.mean(-1) * weave).sum((1, 2)) / (weave**2).sum((1, 2)) / scenes.GRAIN_CONTRAST


@pytest.fixture(scope="module")
def without_evidence():
    return draw_many(400, evidence=0)


def test_same_generator_state_gives_the_same_bytes():
    first, second, other = (draw_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.indoor == second.indoor
    assert (
        first.image.tobytes() == second.image.tobytes()
        and first.mask.tobytes() == second.mask.tobytes()
    )
    assert first.image.tobytes() != other.image.tobytes()


def test_every_class_is_large_enough_to_be_seen(without_evidence):
    _, _, masks = without_evidence
    share = np.bincount(masks.ravel(), minlength=14) / masks.size
    assert masks.max() < 14 and share.min() > 0.012, dict(zip(CLASSES, share.round(4), strict=True))


def test_classes_keep_to_their_kind_of_scene(without_evidence):
    indoor, _, masks = without_evidence
    assert not np.isin(masks[indoor], STREET_ONLY).any()
    assert not np.isin(masks[~indoor], ROOM_ONLY).any()


def test_every_scene_shows_a_cue(without_evidence):
    indoor, images, masks = without_evidence
    for is_room, image, mask in zip(indoor, images, masks, strict=True):
        size = np.isin(mask, (LAMP, PICTURE, BED) if is_room else (TREE, CAR)).sum()
        if not is_room and size == 0:  # the cue is the moon
            sky = image[mask == SKY].mean(-1)
            size = (sky > 1.25 * np.median(sky)).sum()
        assert size >= 20


def test_canvas_decides_the_mask_by_pixel_centres():
    rng, offsets = np.random.default_rng(2), []
    triangle, (rows, columns) = [(0.5, 0), (1, 1), (0, 0.8)], np.mgrid[:SIZE_PX, :SIZE_PX]
    for _ in range(100):
        canvas, place = (
            scenes.Canvas(),
            scenes.Quad.upright(rng.uniform(30, 66, 2), *rng.uniform(8, 50, 2)),
        )
        canvas.polygon(place, (255, 255, 255), "tree", triangle)
        covered, chosen = canvas.image()[..., 0], canvas.mask() == TREE
        assert chosen[covered == 1].all() and not chosen[covered == 0].any()
        offsets.append(
            [np.average(axis, weights=covered) - axis[chosen].mean() for axis in (rows, columns)]
        )
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.02


def test_the_two_of_a_pair_have_the_same_colour(monkeypatch):
    # Varies per scene
    monkeypatch.setattr(scenes, "sample_light", lambda camera, rng: np.ones(3, np.float32))
    _, images, masks = draw_many(200, evidence=0)
    for pair in SURFACES:
        inside, outside = (images[masks == member].mean(0) for member in pair)
        assert np.abs(inside - outside).max() < 0.012, pair
    inside, outside = (np.median(images[masks == member], axis=0) for member in (BED, CAR))
    assert np.abs(inside - outside).max() < 0.05


def test_grain_says_nothing_without_evidence(without_evidence):
    indoor, images, masks = without_evidence
    grain = grain_per_scene(images, masks)
    assert abs(grain[indoor].mean() - grain[~indoor].mean()) < 0.05
    accuracy = ((grain > np.median(grain)) == indoor).mean()
    assert abs(accuracy - 0.5) < 0.05


def test_pairs_differ_in_one_cue_only():
    """Where pixels differ, the mask of the scene shows a cue or its surroundings; all else is equal to the bit."""
    rng, cues = (
        np.random.default_rng(3),
        {CLASSES.index(name) for name in ("lamp", "picture", "bed", "tree", "car")},
    )
    seen = set()
    for _ in range(40):
        cued, without = draw_pair(rng)
        differs = (cued.image != without.image).any(-1)
        assert (
            0 < differs.mean() < 0.5
            and cued.cues == without.cues == 1
            and cued.indoor == without.indoor
        )
        assert (cued.mask == without.mask)[~differs].all() and not cues & set(
            np.unique(without.mask)
        )
        shown = cues & set(np.unique(cued.mask[differs]))
        assert len(shown) <= 1, "one cue; the moon has the class of the sky"
        assert np.isin(cued.mask[~differs], list(cues)).sum() == 0
        seen |= shown
    assert len(seen) >= 4
