"""Upsampled cross-entropy and its gradient on a GPU; see `ops/cross_entropy.py` for the mathematics.

Legend: P probes, B images, N = P * B grids, K classes, h w grid, H W pixels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid_cells import PIXELS, Axis, block_of, load_corners, pixel_row

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


def cross_entropy_sum(
    logits: Tensor, target: Tensor, rows: Axis, columns: Axis, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss summed over valid pixels, f64[P], and its gradient f32[P, B, K, h, w].

    Args:
        logits: f[P, B, K, h, w], any strides.
        target: Integer [B, H, W]. A label that is neither a class nor `ignore_index` makes the loss NaN.
        rows, columns: Cells between the h rows and w columns of nodes; cell c begins at node c.
        ignore_index: Label of the pixels that are excluded.
        needs_grad: If False, the gradient is None.
    """
    n_probes, n_images, classes, h, w = logits.shape
    cells = h * w
    losses = logits.new_empty(n_probes, n_images * cells, dtype=torch.float32)
    corners = logits.new_empty(n_probes, n_images, h, w, 4, classes, dtype=torch.float32) if needs_grad else losses
    cross_entropy_cell[(n_probes * n_images * cells,)](
        logits, target.contiguous(), *rows, *columns, losses, corners,
        *logits.stride(), n_images, classes, h, w, *target.shape[1:], ignore_index,
        K=block_of(classes), X=PIXELS, GRADIENT=needs_grad, num_warps=1,
    )  # fmt: skip
    return losses.sum(1, dtype=torch.float64), _sum_corners(corners) if needs_grad else None


@triton.jit
def cross_entropy_cell(
    logits, target, row_start, row_fraction, column_start, column_fraction, losses, corners,
    stride_p, stride_b, stride_k, stride_h, stride_w, n_images, classes, h, w, height, width, ignore_index,
    K: tl.constexpr, X: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Write the loss of a cell to losses f32[N, h, w], the gradients of its nodes to corners f32[N, h, w, 4, K]."""
    program = tl.program_id(0)
    grid, cell = program // (h * w), program % (h * w)
    p, b = (grid // n_images).to(tl.int64), (grid % n_images).to(tl.int64)
    i, j = cell // w, cell % w
    k = tl.arange(0, K)
    z00, z01, z10, z11 = load_corners(
        logits + p * stride_p + b * stride_b, i, j, h, w, stride_h, stride_w, stride_k, classes, K
    )
    g00 = tl.zeros([K], tl.float32)
    g01 = tl.zeros([K], tl.float32)
    g10 = tl.zeros([K], tl.float32)
    g11 = tl.zeros([K], tl.float32)
    loss = tl.zeros([X], tl.float32)
    first, last = tl.load(column_start + j), tl.load(column_start + j + 1)
    for y in range(tl.load(row_start + i), tl.load(row_start + i + 1)):
        down = tl.load(row_fraction + y)
        left, change = pixel_row(z00, z01, z10, z11, down, classes, K)
        g_left = tl.zeros([K], tl.float32)
        g_right = tl.zeros([K], tl.float32)
        for start in range(first, last, X):
            x = start + tl.arange(0, X)
            inside = x < last
            along = tl.load(column_fraction + x, mask=inside, other=0.0)
            label = tl.load(target + (b * height + y) * width + x, mask=inside, other=0).to(tl.int64)
            valid = inside & (label != ignore_index)
            is_label = k[None, :] == label[:, None]
            z = left[None, :] + along[:, None] * change[None, :]  # [X, K]
            best = tl.max(z, 1)
            mass = tl.exp2((z - best[:, None]) * LOG2_E)
            total = tl.sum(mass, 1)
            at_label = tl.sum(tl.where(is_label, z, 0.0), 1)
            at_label = tl.where((label >= 0) & (label < classes), at_label, float("nan"))
            loss += tl.where(valid, tl.log2(total) * LN_2 + (best - at_label), 0.0)
            if GRADIENT:
                weight = valid.to(tl.float32)
                g = mass * (weight / total)[:, None]
                g = tl.where(is_label, g - weight[:, None], g)  # softmax - onehot
                g_left += tl.sum(g, 0)
                g_right += tl.sum(g * along[:, None], 0)
        if GRADIENT:
            g_left -= g_right
            g00 += (1 - down) * g_left
            g01 += (1 - down) * g_right
            g10 += down * g_left
            g11 += down * g_right
    tl.store(losses + program, tl.sum(loss, 0))
    if GRADIENT:
        out = corners + program.to(tl.int64) * 4 * classes + k
        tl.store(out, g00, mask=k < classes)
        tl.store(out + classes, g01, mask=k < classes)
        tl.store(out + 2 * classes, g10, mask=k < classes)
        tl.store(out + 3 * classes, g11, mask=k < classes)


def _sum_corners(corners: Tensor) -> Tensor:
    """Sum the gradients of the cells around each node, f[P, B, h, w, 4, K] -> f[P, B, K, h, w]."""
    top_left, top_right, bottom_left, bottom_right = corners.unbind(-2)
    nodes = top_left.clone()
    # The last row and column of cells contribute nothing beyond the grid: their fractions are 0.
    nodes[:, :, :, 1:] += top_right[:, :, :, :-1]
    nodes[:, :, 1:] += bottom_left[:, :, :-1]
    nodes[:, :, 1:, 1:] += bottom_right[:, :, :-1, :-1]
    return nodes.movedim(-1, 2)
