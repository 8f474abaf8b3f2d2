"""Geometry of an image, its token grid and its segmentation mask.

A model sees a square of `image_px` pixels. `image_resize` says how an image becomes that square:

    squash        the image resized to the square; the aspect ratio is lost
    pad           the image centred on a square of its mean colour, then resized (LLaVA-1.5 stage 2 and evaluation)
    center_crop   the shorter side resized to `image_px`, then the centre square (CLIP's processor; LLaVA-1.5 stage 1)

The tokens divide the square into an h x w grid. A border remains at the right and the bottom if the patch size does
not divide `image_px` (SigLIP: 27 x 14 = 378 of 384 px). A `GridPlacement` is the position of that grid on a mask of
H x W pixels, the size of the image. Logits are upsampled to the mask; masks are never resized. Pixels outside the grid
(the border, and what `center_crop` cuts off) take the logits of the nearest token.

    H x W = 4 x 8, grid 2 x 2
    squash        rows AxisExtent(0, 4), columns AxisExtent(0, 8)
    pad           rows AxisExtent(-2, 8), columns AxisExtent(0, 8)    two rows of padding above
    center_crop   rows AxisExtent(0, 4), columns AxisExtent(2, 4)     two columns cut off on each side
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import to_rgb, trim_strip

RESIZES = ("squash", "pad", "center_crop")
IGNORE_INDEX = 255  # label of a pixel that counts nowhere


class AxisExtent(NamedTuple):
    """The pixels that a grid covers on one axis: `length_px` pixels from `start_px`, where pixel 0 begins at 0.0."""

    start_px: float
    length_px: float

    def grid_coordinate(self, nodes: int, size: int) -> Tensor:
        """Return the position of each pixel centre in units of nodes, f64[size]; the centre of node i is at i."""
        return (torch.arange(size, dtype=torch.float64) + 0.5 - self.start_px) * (
            nodes / self.length_px
        ) - 0.5

    def token_of_pixel(self, nodes: int, size: int) -> Tensor:
        """Return the node whose cell contains each pixel centre, i64[size]; -1 outside the grid."""
        centres = torch.arange(size, dtype=torch.float64) + 0.5
        token = ((centres - self.start_px) * nodes / self.length_px).floor().long()
        return torch.where((token >= 0) & (token < nodes), token, -1)


class GridPlacement(NamedTuple):
    """Position of a grid on a mask."""

    rows: AxisExtent
    cols: AxisExtent

    @classmethod
    def full(cls, size: tuple[int, int]) -> "GridPlacement":
        """Return the placement of a grid that covers the mask [H, W] exactly."""
        return cls(*(AxisExtent(0.0, float(length)) for length in size))

    def token_of_pixel(self, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the grid row of each pixel row, i64[H], and the grid column of each column, i64[W]; -1 outside."""
        return self.rows.token_of_pixel(grid[0], size[0]), self.cols.token_of_pixel(
            grid[1], size[1]
        )


@dataclass(frozen=True)
class Geometry:
    """How a model sees images.

    Args:
        grid: Rows and columns of image tokens.
        image_px: Side of the encoder's input square.
        covered_px: Side of the part of the square that the tokens cover, from the left and from the top.
        resize: "squash", "pad" or "center_crop".
        padding: RGB colour of the padding.

    Raises:
        UserError: `resize` is unknown.
    """

    grid: tuple[int, int]
    image_px: int
    covered_px: int
    resize: str = "squash"
    padding: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise UserError(
                f"unknown image_resize {self.resize!r}; expected one of {', '.join(RESIZES)}"
            )

    def place(self, image: Image.Image) -> Image.Image:
        """Return the image as the model's square, [image_px, image_px]."""
        image = to_rgb(image)
        px = self.image_px
        if self.resize == "pad":
            side = max(image.size)
            left, top = _padding(image.size)
            square = Image.new("RGB", (side, side), self.padding)
            square.paste(image, (left, top))
            image = square
        if self.resize == "center_crop":
            image = trim_strip(image)
            width, height = (self._resized(length, min(image.size)) for length in image.size)
            left = (width - px) // 2
            top = (height - px) // 2
            return image.resize((width, height), Image.Resampling.BICUBIC).crop(
                (left, top, left + px, top + px)
            )
        return image.resize((px, px), Image.Resampling.BICUBIC)

    def view(self, size: tuple[int, int]) -> GridPlacement:
        """Return the position of the grid on a mask of `size` [H, W], the size of its image."""
        covered = self.covered_px / self.image_px
        if self.resize == "squash":
            return GridPlacement(*(AxisExtent(0.0, length * covered) for length in size))
        if self.resize == "pad":
            return GridPlacement(
                *(AxisExtent(float(-start), max(size) * covered) for start in _padding(size))
            )
        resized = [self._resized(length, min(size)) for length in size]
        scales = [length / new for length, new in zip(size, resized, strict=True)]
        starts = [
            (new - self.image_px) // 2 * scale for new, scale in zip(resized, scales, strict=True)
        ]
        return GridPlacement(
            *(
                AxisExtent(s, self.covered_px * scale)
                for s, scale in zip(starts, scales, strict=True)
            )
        )

    def patches(self, mask: Tensor) -> Tensor:
        """Return what a mask of an image's pixels says of each token.

        `patches(mask) > 0.5` are the patches of an object, to block or to paint.

        Args:
            mask: bool[H, W], the pixels of an object; or class indices, integers [H, W], 255 and negative ones
                ignored. H and W are the height and width of the image. Of a black and white picture, give `mask > 0`.

        Returns:
            The share of the token's pixels that are in the object, f64[h, w], 0 for a token of padding. Or the class
            of most of its labelled pixels, i64[h, w], the first of several, -1 if no pixel is labelled.

        Raises:
            UserError: The mask has other than two axes, or numbers that are no integers.
        """
        mask = torch.as_tensor(mask)
        if mask.ndim != 2 or mask.is_floating_point():
            kind = str(mask.dtype).removeprefix("torch.")
            raise UserError(
                f"a mask must be bool[height, width] of its image, or integers, got {kind}{list(mask.shape)}"
            )
        size = tuple(mask.shape)
        rows, columns = self.view(size).token_of_pixel(self.grid, size)
        is_inside = (rows[:, None] >= 0) & (columns >= 0)
        token = rows[:, None] * self.grid[1] + columns
        tokens = self.grid[0] * self.grid[1]
        if mask.dtype == torch.bool:
            pixels = token[is_inside].bincount(minlength=tokens)
            inside = token[is_inside & mask].bincount(minlength=tokens)
            return (inside / pixels.clamp(min=1).double()).view(self.grid)
        labels = mask.long()
        is_labelled = is_inside & (labels >= 0) & (labels != IGNORE_INDEX)
        classes, number = labels[is_labelled].unique(return_inverse=True)
        if not len(classes):
            return torch.full(self.grid, -1)
        bins = token[is_labelled] * len(classes) + number
        count = bins.bincount(minlength=tokens * len(classes)).view(*self.grid, len(classes))
        return torch.where(count.amax(-1) > 0, classes[count.argmax(-1)], -1)

    def _resized(self, length: int, shorter: int) -> int:
        """Return the length of a side after `center_crop` resized the shorter side. Source: CLIPImageProcessor."""
        return int(self.image_px * length / shorter)


def _padding(size: tuple[int, int]) -> tuple[int, int]:
    """Return the padding before the image on each axis of `size`. Source: LLaVA mm_utils.py expand2square."""
    return (max(size) - size[0]) // 2, (max(size) - size[1]) // 2


def axis_nodes(n_in: int, n_out: int, extent: AxisExtent | None) -> tuple[Tensor, Tensor]:
    """Return the node at or below each output, i64[n_out], and the fraction of the way to the next node, f64[n_out].

    Outputs beyond the outermost nodes take the outermost node.
    """
    centres = (
        (extent or AxisExtent(0.0, float(n_out))).grid_coordinate(n_in, n_out).clamp(0, n_in - 1)
    )
    nodes = centres.long()
    return nodes, centres - nodes
