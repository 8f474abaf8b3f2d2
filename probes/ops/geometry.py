"""How an image, its token grid and its segmentation mask lie on each other.

A model sees a square of `image_px` pixels, made of the whole image, and never a crop of it:

    squash   the image resized to the square, aspect given up
    pad      the image in the middle of a square of its mean colour, as LLaVA-1.5 ("pad"), then resized

The tokens divide the square into an h x w grid, save for a border at the right and the bottom where the patch size does
not divide `image_px` (SigLIP: 27 x 14 = 378 of 384 px). A `GridPlacement` says where that grid lies on a mask of H x W
pixels, which has the image's own size: probes' logits are upsampled there, and masks stay as they are.

    squash, H x W = 4 x 8, grid 2 x 2:   rows AxisExtent(0, 4), columns AxisExtent(0, 8)
    pad, the same:                       rows AxisExtent(-2, 8), columns AxisExtent(0, 8)    two rows of padding above
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError

RESIZES = ("squash", "pad")


class AxisExtent(NamedTuple):
    """The pixels that one axis of a grid covers: from `start_px`, where pixel 0 begins at 0.0, for `length_px`."""

    start_px: float
    length_px: float

    def nodes(self, nodes: int, size: int) -> Tensor:
        """Where the centre of each of `size` pixels lies among the nodes, f64[size]; node i's own centre is at i."""
        return (torch.arange(size, dtype=torch.float64) + 0.5 - self.start_px) * (nodes / self.length_px) - 0.5

    def cells(self, nodes: int, size: int) -> Tensor:
        """The node in whose cell the centre of each of `size` pixels lies, i64[size]; -1 beyond them all."""
        centres = torch.arange(size, dtype=torch.float64) + 0.5
        cell = ((centres - self.start_px) * nodes / self.length_px).floor().long()
        return torch.where((cell >= 0) & (cell < nodes), cell, -1)


class GridPlacement(NamedTuple):
    """Where a grid lies on a mask."""

    rows: AxisExtent
    cols: AxisExtent

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "GridPlacement":
        """The grid divides the mask [H, W]."""
        return cls(*(AxisExtent(0.0, float(length)) for length in size))

    def cells(self, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The grid row of each pixel row and the grid column of each pixel column, i64[H] and i64[W]; -1 where the grid
        does not reach. A pixel belongs to the cell in which its centre lies."""
        rows, cols = (span.cells(n, pixels) for span, n, pixels in zip(self, grid, size, strict=True))
        return rows, cols


@dataclass(frozen=True)
class Geometry:
    """How a model sees images.

    Args:
        grid: Image tokens down and across.
        image_px: Side of the square that the encoder is given.
        covered_px: Of it, what the tokens cover, from the left and from the top.
        resize: "squash" or "pad".
        padding: The colour of what is not image.

    Raises:
        UserError: An unknown way to resize.
    """

    grid: tuple[int, int]
    image_px: int
    covered_px: int
    resize: str = "squash"
    padding: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise UserError(f"unknown image_resize {self.resize!r}; there is {', '.join(RESIZES)}")

    def place(self, image: Image.Image) -> Image.Image:
        """The square of `image_px` that is made of an image."""
        image = to_rgb(image)
        if self.resize == "pad":
            side, left, top = _padded(image.height, image.width)
            square = Image.new("RGB", (side, side), self.padding)
            square.paste(image, (left, top))
            image = square
        return image.resize((self.image_px, self.image_px), Image.Resampling.BICUBIC)

    def view(self, size: tuple[int, int]) -> GridPlacement:
        """Where the grid lies on a mask of this size [H, W], which is its image's."""
        seen = self.covered_px / self.image_px
        if self.resize == "squash":
            return GridPlacement(*(AxisExtent(0.0, length * seen) for length in size))
        side, left, top = _padded(*size)
        return GridPlacement(AxisExtent(float(-top), side * seen), AxisExtent(float(-left), side * seen))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel, transparency dropped.

    Raises:
        UserError: It has more than 8 bits, and does not say which value is white; PIL would cut off at 255.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(f"mode {image.mode!r}, more than 8 bits, does not say which value is white; save it with 8")
    return image.convert("RGB")


def _padded(height: int, width: int) -> tuple[int, int, int]:
    """Side of the square around an image, and where the image lies in it: (side, left, top). Source: LLaVA mm_utils.py
    expand2square."""
    side = max(height, width)
    return side, (side - width) // 2, (side - height) // 2


def axis_nodes(n_in: int, n_out: int, span: AxisExtent | None) -> tuple[Tensor, Tensor]:
    """Returns for each output the node at or below it, i64[n_out], and the fraction of the way to the next, f64. Beyond
    the outermost nodes it is those that count."""
    centres = (span or AxisExtent(0.0, float(n_out))).nodes(n_in, n_out).clamp(0, n_in - 1)
    nodes = centres.long()
    return nodes, centres - nodes
