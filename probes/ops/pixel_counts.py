"""Pixels of each class that are right, predicted and labelled, counted per image without storing predicted maps.

Legend: S sites, N images, K classes, h w token grid, T = h * w, H W pixels.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .bilinear import upsampled_argmax
from .geometry import GridPlacement, ignored_label, majority_labels
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
        patch_class: i64[N, T], class of most labelled pixels under each token, the first of several; -1 if there are
            none.
    """

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor
    patch_right: Tensor
    patch_valid: Tensor
    patch_class: Tensor | None = None


@torch.no_grad()
def count(logits: Tensor, target: Tensor, view: GridPlacement | None = None) -> Counts:
    """Upsample logits, take the argmax per pixel and count, without storing the predicted maps.

    Args:
        logits: f[S, N, K, h, w], finite.
        target: uint8[N, H, W], 255 ignored; of more than 255 classes int16, -1 ignored.
        view: Placement of the grid on the pixels; by default it covers them all. Pixels outside every token count for
            the image, but for no token.
    """
    sites, images, classes, h, w = logits.shape
    size = target.shape[1:]
    view = view or GridPlacement.full(size)
    placement = view
    if view.has_windows:  # tokens are parts of the photo, as many as a window has
        h //= len(view.rows.starts)
        w //= len(view.cols.starts)
        placement = GridPlacement.full(size)
    token = _token_of_pixel(placement, grid=(h, w), size=size, device=target.device)
    new = partial(target.new_zeros, dtype=torch.long)
    counts = Counts(  # before the large tensors, which memory is then free for
        intersection=new(sites, images, classes),
        predicted=new(sites, images, classes),
        labelled=new(images, classes),
        patch_right=new(sites, images, h * w),
        patch_valid=new(images, h * w),
        patch_class=new(images, h * w),
    )
    step = max(1, limit_on(target.device, PIXELS_AT_ONCE) // size.numel())
    for first in range(0, images, step):
        part = slice(first, first + step)
        labels = target[part]
        valid = labels != ignored_label(labels)
        numbers = labels.long().where(valid, classes)
        intersection, predicted, patch_right = _count_predictions(
            logits[:, part], target=labels, token=token, tokens=h * w, view=view
        )
        found = Counts(
            intersection=intersection,
            predicted=predicted,
            labelled=_histogram(numbers, valid, classes),
            patch_right=patch_right,
            patch_valid=_histogram(token.expand_as(labels), valid, h * w),
            patch_class=majority_labels(numbers, classes=classes, token=token, tokens=h * w),
        )
        for of_all, of_part in zip(counts, found, strict=True):
            of_all[..., part, :] = of_part
    return counts


@lru_cache(maxsize=64)
def _token_of_pixel(
    view: GridPlacement, grid: tuple[int, int], size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the token of each pixel, i64[H, W]; T outside the grid; cached, since a copy to a GPU synchronises."""
    return view.token_of_pixel(grid, size).to(device)


def _count_predictions(
    logits: Tensor, target: Tensor, token: Tensor, tokens: int, view: GridPlacement
) -> list[Tensor]:
    """Return intersection, predicted i64[S, N, K] and patch_right i64[S, N, T]."""
    sites, images, classes, h, w = logits.shape
    size = target.shape[1:]
    if use_triton(logits) and not view.has_windows:
        from .kernels.argmax_counts import count_cells
        from .kernels.grid_cells import cells

        axes = cells((h, w), size, view, logits.device, half=True)
        *by_class, by_token = count_cells(logits, target, *axes, ignored_label(target))
        return [x.long() for x in (*by_class, by_token.flatten(2))]
    labelled = target != ignored_label(target)
    intersection, predicted, patch_right = (
        target.new_zeros((sites, images, bins), dtype=torch.long)
        for bins in (classes, classes, tokens)
    )
    for i, of_site in enumerate(logits):
        best = upsampled_argmax(of_site, size, view).long()
        right = (best == target) & labelled
        intersection[i] = _histogram(best, right, classes)
        predicted[i] = _histogram(best, labelled, classes)
        patch_right[i] = _histogram(token.expand_as(best), right, tokens)
    return [intersection, predicted, patch_right]


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
