"""Upsampled argmax on a GPU: as a map, or as counts per class and token.

Legend: S probes, B images, K classes, h w grid, H W pixels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid_cells import PIXELS, Axis, block_of, load_corners, pixel_row


class PredictionCounts(NamedTuple):
    """Pixel counts: intersection, predicted i32[S, B, K] and patch_right i32[S, B, h, w]."""

    intersection: Tensor
    predicted: Tensor
    patch_right: Tensor


def argmax_map(logits: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Return the predicted class per pixel, uint8[B, H, W], of logits f[B, K, h, w] on rows and columns of cells."""
    n_images, classes, h, w = logits.shape
    out = logits.new_empty(n_images, len(rows.fraction), len(columns.fraction), dtype=torch.uint8)
    argmax_cell[(n_images * h * w,)](
        logits, *rows, *columns, out, *logits.stride(), classes, h, w, *out.shape[1:],
        K=block_of(classes), X=PIXELS, num_warps=1,
    )  # fmt: skip
    return out


def count_cells(
    logits: Tensor, target: Tensor, rows: Axis, columns: Axis, ignore_index: int
) -> PredictionCounts:
    """Count predictions against labels, per token and per class.

    Args:
        logits: f[S, B, K, h, w], any strides.
        target: uint8[B, H, W], classes or `ignore_index`.
        rows, columns: Half cells.
        ignore_index: Label of the pixels that are excluded.
    """
    n_probes, n_images, classes, h, w = logits.shape

    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.int32, device=logits.device)

    counts = PredictionCounts(
        zeros(n_probes, n_images, classes),
        zeros(n_probes, n_images, classes),
        zeros(n_probes, n_images, h, w),
    )
    count_cell[(n_probes * n_images * 4 * (h + 1) * (w + 1),)](
        logits, target.contiguous(), *rows, *columns, *counts,
        *logits.stride(), n_images, classes, h, w, *target.shape[1:], ignore_index,
        K=block_of(classes), X=PIXELS, num_warps=1,
    )  # fmt: skip
    return counts


@triton.jit
def best_class(left, change, along):
    """Return the first class with the highest logit per pixel, i32[X]."""
    return tl.argmax(left[None, :] + along[:, None] * change[None, :], 1, tie_break_left=True)


@triton.jit
def argmax_cell(
    logits, row_start, row_fraction, column_start, column_fraction, out,
    stride_b, stride_k, stride_h, stride_w, classes, h, w, height, width, K: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Write the classes of one cell of one grid to out uint8[B, H, W]."""
    program = tl.program_id(0)
    b = (program // (h * w)).to(tl.int64)
    cell = program % (h * w)
    i = cell // w
    j = cell % w
    z00, z01, z10, z11 = load_corners(
        logits + b * stride_b, i, j, h, w, stride_h, stride_w, stride_k, classes, K
    )
    first = tl.load(column_start + j)
    last = tl.load(column_start + j + 1)
    for y in range(tl.load(row_start + i), tl.load(row_start + i + 1)):
        left, change = pixel_row(z00, z01, z10, z11, tl.load(row_fraction + y), classes, K)
        for start in range(first, last, X):
            x = start + tl.arange(0, X)
            along = tl.load(column_fraction + x, mask=x < last, other=0.0)
            predicted = best_class(left, change, along).to(tl.uint8)
            tl.store(out + (b * height + y) * width + x, predicted, mask=x < last)


@triton.jit
def count_cell(
    logits, target, row_start, row_fraction, column_start, column_fraction,
    intersection, predicted, patch_right,
    stride_p, stride_b, stride_k, stride_h, stride_w, n_images, classes, h, w, height, width, ignore_index,
    K: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Add the counts of one half cell of one grid to `PredictionCounts`."""
    program = tl.program_id(0)
    half_cells = 4 * (h + 1) * (w + 1)
    grid = program // half_cells
    cell = program % half_cells
    p = (grid // n_images).to(tl.int64)
    b = (grid % n_images).to(tl.int64)
    i = cell // (2 * w + 2)
    j = cell % (2 * w + 2)
    upper = tl.minimum(tl.maximum(i - 2, 0) // 2, h - 1)
    leftmost = tl.minimum(tl.maximum(j - 2, 0) // 2, w - 1)
    k = tl.arange(0, K)
    z00, z01, z10, z11 = load_corners(
        logits + p * stride_p + b * stride_b,
        upper,
        leftmost,
        h,
        w,
        stride_h,
        stride_w,
        stride_k,
        classes,
        K,
    )
    n_predicted = tl.zeros([K], tl.int32)
    n_right = tl.zeros([K], tl.int32)
    first = tl.load(column_start + j)
    last = tl.load(column_start + j + 1)
    for y in range(tl.load(row_start + i), tl.load(row_start + i + 1)):
        left, change = pixel_row(z00, z01, z10, z11, tl.load(row_fraction + y), classes, K)
        for start in range(first, last, X):
            x = start + tl.arange(0, X)
            inside = x < last
            along = tl.load(column_fraction + x, mask=inside, other=0.0)
            label = tl.load(target + (b * height + y) * width + x, mask=inside, other=0).to(
                tl.int32
            )
            valid = inside & (label != ignore_index)
            best = best_class(left, change, along)
            right = valid & (best == label)
            is_best = k[None, :] == best[:, None]
            n_predicted += tl.sum((is_best & valid[:, None]).to(tl.int32), 0)
            n_right += tl.sum((is_best & right[:, None]).to(tl.int32), 0)
    counts = grid.to(tl.int64) * classes + k
    tl.atomic_add(predicted + counts, n_predicted, mask=n_predicted > 0, sem="relaxed")
    tl.atomic_add(intersection + counts, n_right, mask=n_right > 0, sem="relaxed")
    seen = (i > 0) & (i <= 2 * h) & (j > 0) & (j <= 2 * w)
    token = grid.to(tl.int64) * h * w + (i - 1) // 2 * w + (j - 1) // 2
    total = tl.sum(n_right, 0)
    tl.atomic_add(patch_right + token, total, mask=seen & (total > 0), sem="relaxed")
