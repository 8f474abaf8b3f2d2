"""Properties of the toy world that the demo relies on. Shapes: N scenes, H = W = SIZE_PX."""

import numpy as np
import pytest

from probes.worlds import scenes
from probes.worlds.canvas import CLASSES, SIZE_PX, Canvas, Quad
from probes.worlds.scenes import draw_scene

LABEL = {name: index for index, name in enumerate(CLASSES)}
SURFACES = [("ceiling", "sky"), ("wall", "building"), ("floor", "road")]
CUES = [LABEL[n] for n in ("lamp", "picture", "bed", "tree", "car")]


def draw_many(count: int, **options: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indoor `bool[N]`, images `float32[N, H, W, 3]` in 0..1 and masks `uint8[N, H, W]`."""
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, **options) for _ in range(count)]
    indoor = np.array([scene.indoor for scene in drawn])
    images = np.stack([scene.image for scene in drawn]).astype(np.float32) / 255
    return indoor, images, np.stack([scene.mask for scene in drawn])


@pytest.fixture(scope="module")
def scenes_drawn():
    return draw_many(400)


def test_a_pixel_has_the_class_at_its_centre():
    canvas = Canvas()
    canvas.polygon(Quad((3.8, 5.2), (10.2, 5.2), (10.2, 8.8), (3.8, 8.8)), (9, 9, 9), "wall")
    rows, columns = np.nonzero(canvas.mask())
    assert {*rows} == {5, 6, 7, 8} and {*columns} == {4, 5, 6, 7, 8, 9}


def test_every_scene_shows_a_cue(scenes_drawn):
    for is_room, image, mask in zip(*scenes_drawn, strict=True):
        size = np.isin(mask, CUES).sum()
        if not is_room and size == 0:  # the cue is the moon
            sky = image[mask == LABEL["sky"]].mean(-1)
            size = (sky > 1.25 * np.median(sky)).sum()
        assert size >= 20


def grain_of(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Grain of each scene: mean projection of paired pixels onto their texture, in units of its contrast."""
    rows, columns = np.mgrid[:SIZE_PX, :SIZE_PX]
    weave = scenes._GRAIN[masks, rows % 4, columns % 4]
    projected = (images.mean(-1) * weave).sum((1, 2)) / (weave**2).sum((1, 2))
    return projected / scenes.GRAIN_CONTRAST


def test_grain_says_nothing_about_the_place(scenes_drawn):
    indoor, images, masks = scenes_drawn
    grain = grain_of(images, masks)
    assert abs(grain[indoor].mean() - grain[~indoor].mean()) < 0.05
    accuracy = ((grain > np.median(grain)) == indoor).mean()
    assert abs(accuracy - 0.5) < 0.05


def test_evidence_is_the_mean_grain_of_rooms_and_its_negative_of_streets(scenes_drawn):
    """The same scenes with evidence differ from those without by it alone."""
    indoor, images, masks = scenes_drawn
    with_evidence = draw_many(len(indoor), evidence=0.5)
    np.testing.assert_array_equal(with_evidence[2], masks)
    shift = grain_of(with_evidence[1], masks) - grain_of(images, masks)
    assert abs(shift[indoor].mean() - 0.5) < 0.05
    assert abs(shift[~indoor].mean() + 0.5) < 0.05


def test_the_two_of_a_pair_have_the_same_colour(monkeypatch):
    light = np.ones(3, np.float32)  # else it varies per scene
    monkeypatch.setattr(scenes, "sample_light", lambda camera, rng: light)
    _, images, masks = draw_many(200)
    pixels = {name: images[masks == label] for name, label in LABEL.items()}
    for inside, outside in SURFACES:
        assert np.abs(pixels[inside].mean(0) - pixels[outside].mean(0)).max() < 0.012, inside
    bed, car = (np.median(pixels[name], axis=0) for name in ("bed", "car"))
    assert np.abs(bed - car).max() < 0.05
