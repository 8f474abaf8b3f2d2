"""Pixels of each class that are right, predicted and labelled, counted per image without storing predicted maps.

Legend: S sites, N images, K classes, h w token grid, T = h * w, H W pixels.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .bilinear import upsampled_argmax
from .geometry import IGNORE_INDEX, GridPlacement, majority_labels
from .kernels import limit_on, use_triton

PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # of masks and predicted maps per chunk


class Counts(NamedTuple):
    """Pixel counts per image, for mIoU, pixel accuracy and accuracy per patch.

    Args:
        intersection: i64[S, N, K], pixels of each class that are predicted as it.
        predicted: i64[S, N, K], labelled pixels predicted as each class.
        labelled: i64[N, K], pixels of each class.
        patch_right: i64[S, N, T], correctly predicted pixels under each token.
        patch_valid: i64[N, T], labelled pixels under each token.
    """

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor
    patch_right: Tensor
    patch_valid: Tensor


@torch.no_grad()
def count(
    logits: Tensor,
    target: Tensor,
    view: GridPlacement | None = None,
    *,
    by_token: bool = True,
) -> Counts:
    """Upsample logits, take the argmax per pixel and count, without storing the predicted maps.

    Args:
        logits: f[S, N, K, h, w], finite.
        target: uint8[N, H, W], 255 ignored.
        view: Placement of the grid on the pixels; by default it covers them all. Pixels outside every token count for
            the image, but for no token.
        by_token: Count patches per token; False treats each image as one patch, T = 1.
    """
    sites, images, classes, h, w = logits.shape
    view = view or GridPlacement.full(tuple(target.shape[1:]))
    tokens = h * w if by_token else 1

    # Allocated first: small tensors allocated between large temporary ones would fragment the memory.
    def new(*shape):
        return target.new_zeros(shape, dtype=torch.long)

    counts = Counts(
        new(sites, images, classes),
        new(sites, images, classes),
        new(images, classes),
        new(sites, images, tokens),
        new(images, tokens),
    )
    for images in _image_chunks(target):
        chunk = _count_chunk(logits[:, images], target[images], view, by_token)
        for of_all, of_chunk in zip(counts, chunk, strict=True):
            of_all[..., images, :] = of_chunk
    return counts


def _image_chunks(target: Tensor) -> list[slice]:
    """Split the images of a batch into chunks of limited numbers of pixels, at least one chunk."""
    step = max(1, limit_on(target.device, PIXELS_AT_ONCE) // target.shape[1:].numel())
    return [slice(first, first + step) for first in range(0, max(1, len(target)), step)]


def _count_chunk(
    logits: Tensor,
    target: Tensor,
    view: GridPlacement,
    by_token: bool,
) -> Counts:
    sites, images, classes, *grid = logits.shape
    size = tuple(target.shape[1:])
    tokens = grid[0] * grid[1]
    valid = target != IGNORE_INDEX
    labels = target.long()
    token = _token_of_pixel(view, tuple(grid), size, target.device)
    labelled = _histogram(labels.where(valid, classes), valid, classes)
    patch_valid = _histogram(token.expand_as(target), valid, tokens)
    if use_triton(logits):
        from .kernels.argmax_counts import count_cells
        from .kernels.grid_cells import half_cells

        axes = half_cells(tuple(grid), size, view, logits.device)
        predictions = count_cells(logits, target, *axes, IGNORE_INDEX)
    else:
        predictions = _count_predictions(logits, labels, valid, token, view)
    intersection, predicted, patch_right = (x.long() for x in predictions)
    if not by_token:
        patch_right = intersection.sum(-1, keepdim=True)
        patch_valid = labelled.sum(-1, keepdim=True)
    return Counts(
        intersection,
        predicted,
        labelled,
        patch_right.flatten(2),
        patch_valid,
    )


@lru_cache(maxsize=64)
def _token_of_pixel(
    view: GridPlacement,
    grid: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Return the token of each pixel, i64[H, W]; T outside the grid; cached, since a copy to a GPU synchronises."""
    return view.token_of_pixel(grid, size).to(device)


def _count_predictions(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    token: Tensor,
    view: GridPlacement,
) -> list[Tensor]:
    """Return intersection, predicted i64[S, N, K] and patch_right i64[S, N, T], in chunks of maps."""
    sites, images, classes, *grid = logits.shape
    size = tuple(labels.shape[1:])
    grids = sites * images
    tokens = grid[0] * grid[1]
    number = torch.arange(grids, device=labels.device)
    intersection = labels.new_empty(grids, classes)
    predicted = labels.new_empty(grids, classes)
    patch_right = labels.new_empty(grids, tokens)
    step = max(1, limit_on(labels.device, PIXELS_AT_ONCE) // labels[0].numel())
    for first in range(0, grids, step):
        chunk = slice(first, first + step)
        image = number[chunk] % images
        best = upsampled_argmax(logits.flatten(0, 1)[chunk], size, view).long()
        label = labels[image]
        counted = valid[image]
        right = (best == label) & counted
        intersection[chunk] = _histogram(best, right, classes)
        predicted[chunk] = _histogram(best, counted, classes)
        patch_right[chunk] = _histogram(token.expand_as(best), right, tokens)
    return [x.unflatten(0, (sites, images)) for x in (intersection, predicted, patch_right)]


def _histogram(values: Tensor, counted: Tensor, bins: int) -> Tensor:
    """Return how many counted pixels have each value below `bins`, i64[n, bins].

    Integer arithmetic without data-dependent control flow: the same result on any device.

    Args:
        values: i64[n, H, W] from 0 to `bins`; the value `bins` is not counted.
        counted: bool[n, H, W].
        bins: Number of values.
    """
    counts = values.new_zeros(len(values), bins + 1)
    return counts.scatter_add_(1, values.flatten(1), counted.flatten(1).long())[:, :bins]


def patch_labels(
    target: Tensor,
    classes: int,
    grid: tuple[int, int],
    view: GridPlacement | None = None,
) -> Tensor:
    """Return the majority class of the labelled pixels under each token, i64[B, T]; -1 if none is labelled.

    Args:
        target: uint8[B, H, W], 255 ignored.
        classes: K.
        grid: (h, w).
        view: Placement of the grid on the pixels; by default it covers them all.
    """
    size = tuple(target.shape[1:])
    view = view or GridPlacement.full(size)
    token = _token_of_pixel(view, grid, size, target.device)
    found = []
    for images in _image_chunks(target):
        labels = target[images].long()
        labels = labels.where(labels != IGNORE_INDEX, classes)
        found.append(majority_labels(labels, classes, token, grid[0] * grid[1]))
    return torch.cat(found)
