"""Random crops are those of the published recipe, redone here step by step with the same numbers."""

import colorsys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from probes.config import DataOptions
from probes.data.random_crops import distort, draw_crop, draw_place, shift_hue
from probes.data.samplers import TrainingBatches

PX = 24
RECIPE = DataOptions(
    root="",
    random_scale=(0.5, 2.0),
    max_class_share=0.75,
    flip_probability=0.5,
    photometric_hue=0.5,
)


def photo(size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    rng = np.random.default_rng(1)
    target = rng.integers(0, 3, size).astype(np.uint8)
    target[:, : size[1] // 2] = 0
    target[:2] = 255
    return Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)), target


def by_hand(image: Image.Image, target: np.ndarray, rng: np.random.Generator):
    """Return crop and target. Source: dinov3/eval/segmentation/transforms.py, without its colours."""
    side = int(PX * rng.uniform(0.5, 2.0))
    width, height = image.size
    if height > width:
        size = side, int(side * height / width + 0.5)
    else:
        size = int(side * width / height + 0.5), side
    pixels = np.asarray(image.resize(size, Resampling.BILINEAR))
    rows = [int(np.float32(i) * np.float32(height / size[1])) for i in range(size[1])]
    columns = [int(np.float32(i) * np.float32(width / size[0])) for i in range(size[0])]
    labels = target[rows][:, columns]

    def draw():
        top = int(rng.integers(max(size[1] - PX, 0) + 1))
        left = int(rng.integers(max(size[0] - PX, 0) + 1))
        return slice(top, top + PX), slice(left, left + PX)

    box = draw()
    for _ in range(10):
        values = labels[box][labels[box] != 255]
        counts = [np.sum(values == value) for value in set(values.tolist())]
        if len(counts) > 1 and max(counts) / sum(counts) < 0.75:
            break
        box = draw()
    pixels, labels = pixels[box], labels[box]
    if rng.uniform() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    padded = np.full((PX, PX), 255, np.uint8)
    padded[: labels.shape[0], : labels.shape[1]] = labels
    return pixels, padded


@pytest.mark.parametrize("size", [(20, 40), (31, 17), (60, 60)])
def test_crops_are_those_of_the_recipe(size):
    image, target = photo(size)
    plain = replace(RECIPE, photometric_hue=None)
    shapes = set()
    for seed in range(30):
        pixels, labels = draw_crop(image, target, PX, plain, np.random.default_rng(seed))
        expected = by_hand(image, target, np.random.default_rng(seed))
        assert np.array_equal(np.asarray(pixels), expected[0])
        assert np.array_equal(labels, expected[1])
        shapes.add(pixels.size)
    assert any(min(shape) < PX for shape in shapes), "some crops are padded"


def colours_by_hand(pixels: np.ndarray, hue: float, rng: np.random.Generator) -> np.ndarray:
    """Return the distorted pixels; hue as colorsys has it. Source: PhotoMetricDistortion of the same file."""

    def cut(x):
        return np.clip(x, 0, 255).astype(np.uint8)

    def contrast():
        return cut(pixels.astype(np.float32) * rng.uniform(0.5, 1.5)) if rng.integers(2) else pixels

    if rng.integers(2):
        pixels = cut(pixels.astype(np.float32) + rng.uniform(-32, 32))
    mode = rng.integers(2)
    if mode == 1:
        pixels = contrast()
    if rng.integers(2):
        factor = rng.uniform(0.5, 1.5)
        weights = np.array([0.2989, 0.587, 0.114], np.float32)
        grey = (pixels.astype(np.float32) * weights).sum(-1).astype(np.uint8)
        pixels = cut(factor * pixels + (1 - factor) * grey[..., None].astype(float))
    if rng.integers(2):
        shift = rng.uniform(-hue, hue)
        turned = [turn_hue(*pixel, shift) for pixel in pixels.reshape(-1, 3).tolist()]
        pixels = np.array(turned, np.uint8).reshape(pixels.shape)
    return contrast() if mode == 0 else pixels


def turn_hue(red: int, green: int, blue: int, shift: float) -> list[int]:
    h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    return [int(x * (256 - 1e-3)) for x in colorsys.hsv_to_rgb((h + shift) % 1, s, v)]


@pytest.mark.parametrize("hue", [0.5, 0.1])
def test_colours_are_distorted_as_the_recipe_says(hue):
    """Rounding down can differ by a level where a product is a whole number but for the last bit."""
    pixels = np.random.default_rng(2).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    changed = set()
    for seed in range(40):
        found = distort(pixels, hue, np.random.default_rng(seed))
        expected = colours_by_hand(pixels, hue, np.random.default_rng(seed))
        apart = np.abs(found.astype(int) - expected)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.02
        changed.add(found.tobytes())
    assert len(changed) > 20


def test_hue_turns_every_colour_as_colorsys_does():
    levels = (0, 1, 80, 128, 254, 255)
    colours = np.array([*product(levels, repeat=3)], np.uint8)[None]
    for shift in (-0.5, -0.21, 0.0, 0.17, 0.5):
        expected = [turn_hue(*colour, shift) for colour in colours[0].tolist()]
        assert np.abs(shift_hue(colours, shift)[0].astype(int) - expected).max() <= 1


def test_a_crop_of_one_class_is_kept_after_ten_tries():
    """And one without labels, too: the recipe does not go on for ever."""
    rng = np.random.default_rng(0)
    for label in (1, 255):
        top, left = draw_place(np.full((40, 50), label, np.uint8), px=8, most=0.75, random=rng)
        assert 0 <= top <= 32 and 0 <= left <= 42


def test_photos_are_numbered_by_epoch_where_they_are_drawn_anew():
    plain = TrainingBatches(images=5, batch_size=2)
    random = TrainingBatches(images=5, batch_size=2, are_random=True)
    for epoch in (0, 3):
        plain.set_epoch(epoch)
        random.set_epoch(epoch)
        expected = [[5 * epoch + i for i in batch] for batch in plain]
        assert [*random] == expected
