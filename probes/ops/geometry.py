"""Geometry of an image, its token grid and its segmentation mask.

A model sees a square of `image_px` pixels. `image_resize` says how an image becomes that square:

    squash        the image resized to the square; the aspect ratio is lost
    pad           the image centred on a square of its mean colour, then resized (LLaVA-1.5 stage 2 and evaluation)
    center_crop   the shorter side resized to `image_px`, then the centre square (CLIP's processor; LLaVA-1.5 stage 1)
    letterbox     the longer side resized to `image_px`, then padded to the square (DeepSeek-VL, Janus)
    slide         the shorter side resized to `window_px`, then windows of that side at a stride: several squares

A checkpoint may resize to more than `image_px` and keep the centre: DINOv2 resizes the shorter side to 256 px and keeps
224. That is its `ResizeRule`, with the filter, which a user's choice of `image_resize` leaves as it is.

The tokens divide the square into an h x w grid. A border remains at the right and the bottom if the patch size does
not divide `image_px` (SigLIP: 27 x 14 = 378 of 384 px). A `GridPlacement` is the position of that grid on a mask of
H x W pixels, the size of the image. Logits are upsampled to the mask; masks are never resized. Pixels outside the grid
(the border, and what `center_crop` cuts off) take the logits of the nearest token.

    H x W = 4 x 8, grid 2 x 2
    squash        rows AxisExtent(0, 4), columns AxisExtent(0, 8)
    pad           rows AxisExtent(-2, 8), columns AxisExtent(0, 8)    two rows of padding above
    center_crop   rows AxisExtent(0, 4), columns AxisExtent(2, 4)     two columns cut off on each side

The windows of a photo overlap. Their logits are averaged where they do, and the result is resized to the mask. All of
that is linear, and windows form a raster, so that each axis has one matrix from the tokens of all windows to pixels,
`AxisWindows.weights`: the grids of the windows side by side are one grid, whose position is two of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import as_stored

RESIZES = ("squash", "pad", "center_crop", "letterbox")
SLIDE = "slide"  # several squares of an image
# Label of a pixel that counts nowhere: in targets of up to 255 classes, uint8, and in those of more, int16
IGNORE_INDEX = 255
IGNORE_INDEX_OF_MANY = -1


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


class AxisWindows(NamedTuple):
    """The windows of a side of a photo that was resized to `side_px`; the last one is shifted to its end.

    A side of 1024 px has windows of 512 px at 0, 341 and 512.

    Args:
        side_px: Length of the side.
        window_px: Length of a window.
        stride_px: From the start of a window to that of the next one.
        covered_px: Part of a window that its tokens cover, from its start.
    """

    side_px: int
    window_px: int
    stride_px: int
    covered_px: float

    @property
    def starts(self) -> list[int]:
        """Where each window begins. Source: slide_inference of DINOv3 (eval/segmentation/inference.py)."""
        last = self.side_px - self.window_px
        return [min(start, last) for start in range(0, last + self.stride_px, self.stride_px)]

    def pixels(self, window: int, size: int) -> slice:
        """Return the pixels of the mask, `size` of them on this side, that a window is nearest to."""
        start = self.starts[window]
        scale = size / self.side_px
        return slice(round(start * scale), round((start + self.window_px) * scale))

    def weights(self, nodes: int, size: int) -> Tensor:
        """Return the matrix f64[size, nodes] from the tokens of all windows to the pixels of the mask."""
        extent = AxisExtent(0.0, self.covered_px)
        of_window = linear_weights(nodes // len(self.starts), self.window_px, extent)
        shares = torch.zeros(
            self.side_px, len(self.starts), of_window.shape[1], dtype=torch.float64
        )
        windows = torch.zeros(self.side_px, 1, 1, dtype=torch.float64)
        for number, start in enumerate(self.starts):
            shares[start : start + self.window_px, number] = of_window
            windows[start : start + self.window_px] += 1
        averaged = (shares / windows).flatten(1)
        return linear_weights(self.side_px, size, None) @ averaged


class GridPlacement(NamedTuple):
    """Position of a grid on a mask, or of the grids of all windows side by side."""

    rows: AxisExtent | AxisWindows
    cols: AxisExtent | AxisWindows

    @property
    def has_windows(self) -> bool:
        """Whether the grid is that of windows."""
        return isinstance(self.rows, AxisWindows)

    @classmethod
    def full(cls, size: tuple[int, int]) -> "GridPlacement":
        """Return the placement of a grid that covers the mask [H, W] exactly."""
        return cls(*(AxisExtent(0.0, float(length)) for length in size))

    def token_of_pixel(self, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the token of each pixel, in raster order, i64[H, W]; h * w outside the grid."""
        rows = self.rows.token_of_pixel(grid[0], size[0])[:, None]
        cols = self.cols.token_of_pixel(grid[1], size[1])
        return torch.where((rows >= 0) & (cols >= 0), rows * grid[1] + cols, grid[0] * grid[1])


@dataclass(frozen=True)
class ResizeRule:
    """How a checkpoint's images become squares.

    Args:
        way: One of RESIZES, or SLIDE.
        resample: The filter, one of PIL's.
        before_crop: Side to which images are resized, in units of the side of its centre that is kept; at least 1.
        before_thumbnail: Longer side to which photos are resized before their thumbnail is made of them, in units of
            the thumbnail's side (SmolVLM, Idefics3). None: it is made of the photo.
        splits: Whether the sides of that larger photo are rounded up to multiples of the thumbnail's.
        padding: RGB colour of the padding; None: the mean colour of the model's normalisation.
        replaces: The checkpoint's rule, if a user asked for another way.
        window_px: Side of a window, of the way "slide"; None: that of the model's square. Of a square that is larger,
            because its side is a multiple of the patch, it is the middle; the rest is black after normalisation.
        stride_px: From one window to the next; None: two thirds of a window.
    """

    way: str = "squash"
    resample: int = Image.Resampling.BICUBIC
    before_crop: Fraction = Fraction(1)
    before_thumbnail: Fraction | None = None
    splits: bool = False
    padding: tuple[int, int, int] | None = None
    replaces: "ResizeRule | None" = None
    window_px: int | None = None
    stride_px: int | None = None

    def __post_init__(self):
        if self.way not in (*RESIZES, SLIDE):
            raise UserError(
                f"unknown image_resize {self.way!r}; expected one of {', '.join(RESIZES)} or {SLIDE}"
            )

    def replaced_by(
        self, way: str | None, window_px: int | None = None, stride_px: int | None = None
    ) -> "ResizeRule":
        """Return the rule of a user who asks for a way, which replaces the checkpoint's, but not its filter.

        Windows are resized bilinearly, as in published protocols.

        Raises:
            UserError: A stride is given that no window has, or is longer than these.
        """
        if stride_px is not None and (way != SLIDE or stride_px > (window_px or stride_px)):
            raise UserError(
                f"stride_px {stride_px}: expected at most the side of a window (image_px), with image_resize {SLIDE}"
            )
        if way == SLIDE:
            windows = {"window_px": window_px, "stride_px": stride_px}
            return ResizeRule(way, Image.Resampling.BILINEAR, replaces=self, **windows)
        if way in (None, self.way):
            return self
        return ResizeRule(way, self.resample, replaces=self)

    def describe(self, px: int) -> str:
        """Return the rule in words, for a square of `px` pixels."""
        text = f"{self.way}, {Image.Resampling(self.resample).name.lower()}"
        if self.before_crop > 1:
            text += f", the middle {px} of {round(px * self.before_crop)} px"
        if self.replaces:
            text += f"; it replaces {self.replaces.describe(px)}"
        return text


SQUASH = ResizeRule()


@dataclass(frozen=True)
class Geometry:
    """How a model sees images.

    Args:
        grid: Rows and columns of image tokens.
        image_px: Side of the encoder's input square.
        covered_px: Side of the part of the square that the tokens cover, from the left and from the top.
        rule: How images become the square.
        padding: RGB colour of the padding.
    """

    grid: tuple[int, int]
    image_px: int
    covered_px: int
    rule: ResizeRule = SQUASH
    padding: tuple[int, int, int] = (0, 0, 0)

    @property
    def resize(self) -> str:
        """How images become squares, one of RESIZES or SLIDE."""
        return self.rule.way

    @property
    def window_px(self) -> int:
        """Side of a window, of the way "slide"."""
        return self.rule.window_px or self.image_px

    @property
    def of_window(self) -> "Geometry":
        """How a model sees a window by itself, and the position of its grid on the mask of the window."""
        return replace(self, rule=ResizeRule())

    def squares(self, image: Image.Image) -> list[Image.Image]:
        """Return what a model sees of an image: the square, or the windows row by row, [window_px, window_px]."""
        if self.resize != SLIDE:
            return [self.place(image)]
        view = self.view((image.height, image.width))
        size = (view.cols.side_px, view.rows.side_px)
        resized = as_stored(image).resize(size, self.rule.resample)
        px = self.window_px
        return [
            resized.crop((left, top, left + px, top + px))
            for top in view.rows.starts
            for left in view.cols.starts
        ]

    def join(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what probes output of an image as one grid, f[P, K, h, w], at the position `view(size)`.

        Args:
            outputs: Of the model's squares of the image, f[P, squares, K, h, w].
            size: [H, W] of the image.
        """
        if self.resize != SLIDE:
            return outputs[:, 0]
        rows = len(self.view(size).rows.starts)
        by_row = outputs.unflatten(1, (rows, -1))  # [P, rows, columns, K, h, w]
        return by_row.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def square_count(self, size: tuple[int, int]) -> int:
        """Return how many squares a model sees of an image of `size` [H, W]."""
        if self.resize != SLIDE:
            return 1
        view = self.view(size)
        return len(view.rows.starts) * len(view.cols.starts)

    def place(self, image: Image.Image) -> Image.Image:
        """Return the image as the model's square, [image_px, image_px].

        Raises:
            UserError: The model sees windows of it.
        """
        self.check_one_square()
        image = as_stored(image)
        if self.resize == "pad":
            side = max(image.size)
            image = self._on_canvas(image, (side, side), _padding(image.size))
        if self.rule.before_thumbnail is not None:
            image = self._enlarged(image)
        resized = [self._resized(length, image.size) for length in image.size]
        image = image.resize(resized, self.rule.resample)
        corner = tuple(-self._start(length) for length in resized)
        return self._on_canvas(image, (self.image_px, self.image_px), corner)

    def view(self, size: tuple[int, int]) -> GridPlacement:
        """Return the position of the grid on a mask of `size` [H, W], the size of its image."""
        if self.resize == SLIDE:
            return self._view_of_windows(size)
        padding = (0, 0)
        if self.resize == "pad":
            padding = _padding(size)
            size = (max(size), max(size))
        extents = []
        for length, before in zip(size, padding, strict=True):
            resized = self._resized(length, size)
            start = self._start(resized) * length / resized - before
            extents.append(AxisExtent(start, self.covered_px * length / resized))
        return GridPlacement(*extents)

    def patches(self, mask: Tensor) -> Tensor:
        """Return what a mask of an image's pixels says of each token.

        `patches(mask) > 0.5` are the patches of an object.

        Args:
            mask: bool[H, W], the pixels of an object; or class indices, integers [H, W], negative ones and, but of
                int16, 255 ignored. H and W are the height and width of the image. Of a black and white picture, give
                `mask > 0`.

        Returns:
            The share of the token's pixels that are in the object, f64[h, w], 0 for a token of padding. Or the class
            of most of its labelled pixels, i64[h, w], the first of several, -1 if no pixel is labelled.

        Raises:
            UserError: The mask has other than two axes, or numbers that are no integers, or the model sees windows.
        """
        self.check_one_square()
        is_object = str(mask.dtype).endswith("bool")
        labels = label_tensor(mask).long()
        if labels.ndim != 2:
            raise UserError(f"a mask must have height and width, got {list(labels.shape)}")
        size = labels.shape
        token = self.view(size).token_of_pixel(self.grid, size)
        tokens = self.grid[0] * self.grid[1]
        if is_object:
            pixels, inside = (
                token.flatten().bincount(weights, tokens + 1)[:tokens]
                for weights in (None, labels.flatten().double())
            )
            return (inside / pixels.clamp(min=1)).view(self.grid)
        is_labelled = (labels >= 0) & (labels != ignored_label(mask))
        classes, number = labels[is_labelled].unique(return_inverse=True)
        numbers = torch.full(size, len(classes)).masked_scatter(is_labelled, number)
        majority = majority_labels(numbers[None], classes=len(classes), token=token, tokens=tokens)[
            0
        ]
        return torch.cat([classes, classes.new_tensor([-1])])[majority].view(self.grid)

    def check_one_square(self) -> None:
        """Raise a UserError if a model sees several windows of an image."""
        if self.resize == SLIDE:
            raise UserError(
                "photos are read in windows (image_resize: slide), and this needs one square of each; load the model, "
                f"or make the probes, with another image_resize: {', '.join(RESIZES)}"
            )

    def _view_of_windows(self, size: tuple[int, int]) -> GridPlacement:
        px = self.window_px
        stride = self.rule.stride_px or max(1, px * 2 // 3)
        covered = px * self.covered_px / self.image_px
        sides = [int(px * length / min(size) + 0.5) for length in size]
        return GridPlacement(*(AxisWindows(side, px, stride, covered) for side in sides))

    def _resized(self, length: int, size: Sequence[int]) -> int:
        """Return the length of a side of an image of `size` after it was resized.

        Source: CLIPImageProcessor, which rounds down; JanusImageProcessor, which rounds.
        """
        px = round(self.image_px * self.rule.before_crop)
        if self.resize == "center_crop":
            return int(px * length / min(size))
        if self.resize == "letterbox":
            return max(round(length * (px / max(size))), 1)
        return px

    def _start(self, resized: int) -> int:
        """Return where the square begins on a resized side; below 0 if the square is longer."""
        return int((resized - self.image_px) / 2)

    def _on_canvas(
        self, image: Image.Image, size: tuple[int, int], corner: tuple[int, int]
    ) -> Image.Image:
        """Return a canvas of the padding's colour with the image's left top at `corner`."""
        if image.size == size:
            return image
        canvas = Image.new("RGB", size, self.padding)
        canvas.paste(image, corner)
        return canvas

    def _enlarged(self, image: Image.Image) -> Image.Image:
        """Return the larger photo of which a thumbnail is made. Source: Idefics3ImageProcessor."""
        tile = self.image_px
        longest = round(tile * self.rule.before_thumbnail)
        aspect = image.width / image.height
        if image.width >= image.height:
            size = (longest, _even(int(longest / aspect)))
        else:
            size = (_even(int(longest * aspect)), longest)
        image = image.resize(size, self.rule.resample)
        if self.rule.splits:
            tiles = [ceil(length / tile) * tile for length in size]
            image = image.resize(tiles, self.rule.resample)
        return image


def majority_labels(labels: Tensor, classes: int, token: Tensor, tokens: int) -> Tensor:
    """Return the class of most labelled pixels of each token, i64[B, T], the first of several; -1 if there are none.

    Args:
        labels: i64[B, H, W], from 0 to `classes`, which is no label.
        classes: K.
        token: i64[H, W], token of each pixel, from 0 to `tokens`, which is none.
        tokens: T.
    """
    images = len(labels)
    image = torch.arange(images, device=labels.device).view(-1, 1, 1)
    bins = (image * (tokens + 1) + token) * (classes + 1) + labels
    votes = bins.flatten().bincount(minlength=images * (tokens + 1) * (classes + 1))
    votes = votes.view(images, tokens + 1, classes + 1)[:, :tokens]
    votes[..., classes] = 0
    most, label = votes.max(-1)
    return torch.where(most > 0, label, -1)


def ignore_index_of(classes: int) -> int:
    """Return the label of pixels that count nowhere in targets of so many classes."""
    return IGNORE_INDEX_OF_MANY if classes > IGNORE_INDEX else IGNORE_INDEX


def ignored_label(mask: Tensor | np.ndarray) -> int:
    """Return the label of pixels that count nowhere in the target of a data set, by its dtype."""
    if str(mask.dtype).removeprefix("torch.") == "int16":
        return IGNORE_INDEX_OF_MANY
    return IGNORE_INDEX


def label_tensor(mask: Tensor | np.ndarray) -> Tensor:
    """Return a user's labels as a tensor: uint8 as it is, a boolean mask as 0 and 1, other integers as int64.

    Comparisons and indexing by a class mean something else for bool, and wrap in small integers. An array is copied, as
    that of a picture is read-only, which torch warns of.

    Raises:
        UserError: They are no integers.
    """
    labels = torch.tensor(mask) if isinstance(mask, np.ndarray) else torch.as_tensor(mask)
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels must be truth values or integers, got {labels.dtype}")
    small = (torch.bool, torch.uint8)
    return labels.to(torch.uint8 if labels.dtype in small else torch.int64)


def _even(length: int) -> int:
    """Return the even number at or above a length, which is at least 1."""
    return max(length + length % 2, 1)


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


def linear_weights(n_in: int, n_out: int, extent: AxisExtent | None) -> Tensor:
    """Return the matrix f64[n_out, n_in] that interpolates an axis linearly; its rows sum to 1."""
    nodes, fractions = axis_nodes(n_in, n_out, extent)
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    weights.scatter_(1, (nodes + 1).clamp(max=n_in - 1)[:, None], fractions[:, None])
    # second, since at the edge both are the same node
    weights.scatter_(1, nodes[:, None], 1 - fractions[:, None])
    return weights
