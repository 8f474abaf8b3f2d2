"""Blank pictures: of a photo's size and mean colour, so that tiles and padding are the photo's.

The mean colour stays, and can tell by itself: of red objects on grey, which pictures have one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

Preprocess = Callable[[Sequence[Image.Image]], Tensor]


def blank_picture(image: Image.Image) -> Image.Image:
    """Return a picture of the size and the mean colour of a photo."""
    colour = np.asarray(image.convert("RGB")).mean((0, 1)).round().astype(int).tolist()
    return Image.new("RGB", image.size, tuple(colour))


def blanked(preprocess: Preprocess) -> Preprocess:
    """Return what makes the pixels of blank pictures in place of photos."""

    def preprocess_blank(images: Sequence[Image.Image]) -> Tensor:
        return preprocess([blank_picture(image) for image in images])

    return preprocess_blank
