"""Cells of a grid, and functions that the kernels share.

Legend: K classes, h w grid, H W pixels, X pixels of a row per step of a program.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from probes.ops.geometry import AxisExtent, GridPlacement, axis_nodes

PIXELS = 4  # X


class Axis(NamedTuple):
    """Cells of one axis; cell c contains the pixels start[c] .. start[c + 1] - 1.

    Args:
        start: i32[cells + 1].
        fraction: f32[pixels], position between the node of the cell (0) and the next node (1).
    """

    start: Tensor
    fraction: Tensor


def cells(
    grid: tuple[int, int],
    size: tuple[int, int],
    view: GridPlacement,
    device: torch.device,
    half: bool = False,
) -> list[Axis]:
    """Return rows and columns of cells; cell (i, j) has the pixels between grid rows i, i + 1 and columns j, j + 1.

    Pixels of half cells are also covered by the same token. An axis of n nodes has 2n + 2 of them. Half cell g is
    between nodes (g - 2) // 2 and g // 2 and covered by token (g - 1) // 2. The first and the last contain the pixels
    outside the grid.
    """
    return [
        _axis(n, pixels, extent, device, half)
        for n, pixels, extent in zip(grid, size, view, strict=True)
    ]


@lru_cache(maxsize=256)
def _axis(n_nodes: int, pixels: int, extent: AxisExtent, device: torch.device, half: bool) -> Axis:
    cell, fraction = axis_nodes(n_nodes, pixels, extent)
    count = n_nodes
    if half:
        token = extent.token_of_pixel(n_nodes, pixels)
        covered = 1 + 2 * token + (cell == token)
        outside = torch.where(extent.grid_coordinate(n_nodes, pixels) < 0, 0, 2 * n_nodes + 1)
        cell = torch.where(token >= 0, covered, outside)
        count = 2 * n_nodes + 2
    start = torch.searchsorted(cell.contiguous(), torch.arange(count + 1))
    return Axis(start.to(device, torch.int32), fraction.to(device, torch.float32))


def block_of(classes: int) -> int:
    """Return the number of lanes for the classes of one pixel, a power of two."""
    return triton.next_power_of_2(classes)


@triton.jit
def load_corners(logits, i, j, h, w, stride_h, stride_w, stride_k, classes, K: tl.constexpr):
    """Return the logits f32[K] of the four nodes around cell (i, j); the last row and column neighbour themselves."""
    k = tl.arange(0, K)
    below = tl.minimum(i + 1, h - 1)
    right = tl.minimum(j + 1, w - 1)
    lane = logits + k * stride_k
    real = k < classes
    z00 = tl.load(lane + i * stride_h + j * stride_w, mask=real, other=0.0).to(tl.float32)
    z01 = tl.load(lane + i * stride_h + right * stride_w, mask=real, other=0.0).to(tl.float32)
    z10 = tl.load(lane + below * stride_h + j * stride_w, mask=real, other=0.0).to(tl.float32)
    z11 = tl.load(lane + below * stride_h + right * stride_w, mask=real, other=0.0).to(tl.float32)
    return z00, z01, z10, z11


@triton.jit
def pixel_row(z00, z01, z10, z11, down, classes, K: tl.constexpr):
    """Return the logits f32[K] at the left end of pixel row `down`, and their change to the right end of the cell."""
    left = z00 + down * (z10 - z00)
    change = z01 + down * (z11 - z01) - left
    # -inf: classes that only fill the block
    return tl.where(tl.arange(0, K) < classes, left, float("-inf")), change
