"""Random crops of training photos, as published protocols of dense linear probes draw them.

A crop depends on seed, epoch and photo alone: a run that is resumed, or has other processes, sees the same ones.

Source: facebookresearch/dinov3 at 6876159, eval/segmentation/transforms.py, in its order of steps; mmsegmentation 0.x,
which DINOv2 uses, has the same but for the colours, see `distort`.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch.nn import functional as F

from probes.config import DataOptions
from probes.ops.geometry import ignored_label

from .image_dataset import ImageDataset
from .windows import PieceSamples

if TYPE_CHECKING:
    from probes.models.frozen_mllm import FrozenMLLM

TRIES = 10  # crops that are tested against the largest share of a class
BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)


class RandomCrops(PieceSamples):
    """Random crops of photos: sample e N + i is that of photo i in epoch e.

    Args:
        photos: The data set, of classes.
        mllm: The model.
        options: Says how crops are drawn.
        seed: Of the crops.
    """

    def __init__(self, photos: ImageDataset, mllm: "FrozenMLLM", options: DataOptions, seed: int):
        super().__init__(photos, mllm)
        self.px = self.geometry.window_px
        self.geometry = self.geometry.of_window
        self.options = options
        self.seed = seed

    def __getitem__(self, index: int) -> dict:
        epoch, photo = divmod(max(index, 0), len(self.photos))  # -1 only fills a batch
        sample = self.photos[photo]
        random = np.random.default_rng([self.seed, epoch, photo])
        picture = sample["image"], sample["target"]
        image, target = draw_crop(*picture, self.px, self.options, random)
        return sample | {"image": image, "target": target}


def draw_crop(
    image: Image.Image, target: ndarray, px: int, options: DataOptions, random: np.random.Generator
) -> tuple[Image.Image, ndarray]:
    """Return a crop of a photo, of at most [px, px], and its target [px, px], ignored where the crop ends earlier."""
    low, high = options.random_scale
    shorter = min(image.size)
    side = int(px * random.uniform(low, high))
    width, height = (int(side * length / shorter + 0.5) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    target = resize_labels(target, (height, width))
    top, left = draw_place(target, px=px, most=options.max_class_share, random=random)
    target = target[top : top + px, left : left + px]
    image = image.crop((left, top, left + target.shape[1], top + target.shape[0]))
    if random.uniform() < (options.flip_probability or 0.0):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        target = target[:, ::-1]
    if options.photometric_hue is not None:
        image = Image.fromarray(distort(np.asarray(image), options.photometric_hue, random))
    missing = [(0, px - length) for length in target.shape]
    return image, np.pad(target, missing, constant_values=ignored_label(target))


def resize_labels(target: ndarray, size: tuple[int, int]) -> ndarray:
    """Return labels [H, W] resized to `size`; each is that of the pixel at or before it, as torch has it."""
    labels = torch.from_numpy(target.astype(np.float32))[None, None]
    return F.interpolate(labels, size, mode="nearest")[0, 0].numpy().astype(target.dtype)


def draw_place(
    target: ndarray, px: int, most: float | None, random: np.random.Generator
) -> tuple[int, int]:
    """Return top and left of a crop, in which no class has `most` of the labelled pixels, if ten tries find one."""
    places = [max(length - px, 0) + 1 for length in target.shape]
    for _ in range(TRIES):
        top, left = random.integers(places).tolist()
        labels, counts = np.unique(target[top : top + px, left : left + px], return_counts=True)
        counts = counts[labels != ignored_label(target)]
        if most is None or (len(counts) > 1 and counts.max() / counts.sum() < most):
            return top, left
    return tuple(random.integers(places).tolist())


def distort(pixels: ndarray, hue: float, random: np.random.Generator) -> ndarray:
    """Return uint8[H, W, 3] with another brightness, contrast, saturation and hue, each in half of all cases.

    Deviates: mmsegmentation multiplies the saturation of HSV instead of mixing with grey.
    """

    def happens() -> bool:
        return bool(random.integers(2))

    def contrast(pixels: ndarray) -> ndarray:
        return to_bytes(pixels * np.float32(random.uniform(*CONTRAST))) if happens() else pixels

    if happens():
        pixels = to_bytes(pixels + np.float32(random.uniform(-BRIGHTNESS, BRIGHTNESS)))
    is_early = happens()
    if is_early:
        pixels = contrast(pixels)
    if happens():
        share = np.float32(random.uniform(*SATURATION))
        grey = to_bytes(pixels @ LUMA)[..., None]
        pixels = to_bytes(share * pixels + (1 - share) * grey)
    if happens():
        pixels = shift_hue(pixels, random.uniform(-hue, hue))
    if not is_early:
        pixels = contrast(pixels)
    return pixels


def to_bytes(pixels: ndarray) -> ndarray:
    """Return numbers as uint8, cut off at 0 and 255 and rounded down."""
    return pixels.clip(0, 255).astype(np.uint8)


def shift_hue(pixels: ndarray, shift: float) -> ndarray:
    """Return uint8[H, W, 3] whose hue is shifted by a share of the circle. Source: torchvision's adjust_hue."""
    rgb = pixels.astype(np.float64) / 255
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    divisor = np.where(chroma == 0, 1, chroma)
    sixth = np.select(
        [value == red, value == green],
        [(green - blue) / divisor, 2 + (blue - red) / divisor],
        4 + (red - green) / divisor,
    )
    sixth = (sixth + 6 * shift) % 6
    # how much of the chroma each channel has: all within a sixth of its own hue, none opposite
    shares = [np.clip(2 - np.abs((sixth - own + 3) % 6 - 3), 0, 1) for own in (0, 2, 4)]
    shifted = value[..., None] - chroma[..., None] * (1 - np.stack(shares, -1))
    return (shifted * (256 - 1e-3)).clip(0, 255).astype(np.uint8)
