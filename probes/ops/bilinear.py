"""Bilinear upsampling of coarse logits in small chunks.

A probe predicts logits on the patch grid, `f[K, h, w]`. A segmentation mask has `H x W` pixels. The upsampled logits
would be `K * H * W` numbers (157 MB for 150 classes at 512 x 512). Each is a weighted mean of four grid nodes,

    up[k, y, x] = sum_ij rows[y, i] * cols[j, x] * z[k, i, j]        with rows f[H, h] and cols f[w, W],

so they are never stored together. Columns are upsampled first, for the h grid rows only, by one small matrix product.
Pixel rows are then computed in *bands*. A band holds the pixel rows between the same two grid rows: one `torch.lerp` of
two rows, five times cheaper than a second product.

    h=2 -> H=4:   rows = [1 0], [.75 .25], [.25 .75], [0 1]     Two bands: pixel rows 0, 1, 2 mix grid rows 0 and 1,
                                                               pixel row 3 equals the last grid row.

A chunk is `f[N, R, K, C]`. The pixels of a row are innermost, so that the maximum over the classes vectorises.

Legend: N images, K classes, h w grid, H W pixels, R C pixel rows and columns of one chunk.
"""

import math
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import AxisExtent, AxisWindows, GridPlacement, axis_nodes, linear_weights
from .kernels import limit_on, use_triton

# Elements per chunk. On a CPU 2 MB, which stay in cache for a few passes and keep the number of calls into torch small.
CHUNK_NUMEL = {"cpu": 2**19, "cuda": 2**25}


class Band(NamedTuple):
    """Pixel rows `start:stop`, which interpolate between the grid rows `lo:hi` (two rows, or only the last one)."""

    start: int
    stop: int
    lo: int
    hi: int
    fractions: Tensor  # f[R, 1, 1], position between grid row lo (0) and hi - 1 (1)


class ResamplingPlan(NamedTuple):
    """Weights and chunks that upsample a grid; see `make_plan`."""

    cols: Tensor  # f[w, W]
    bands: tuple[Band, ...]
    tiles: tuple[slice, ...]  # pixel columns per chunk
    images: int  # images per chunk


@lru_cache(maxsize=64)
def bilinear_weights(
    n_in: int,
    n_out: int,
    extent: AxisExtent | AxisWindows | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the matrix f[n_out, n_in] that resamples one axis bilinearly. Its rows sum to 1.

    Without `extent` it equals `F.interpolate(mode="bilinear", align_corners=False, antialias=False)`, also downwards.
    The tensor is cached; do not modify it.
    """
    # a tensor cached during validation must be usable in training
    with torch.inference_mode(False):
        if isinstance(extent, AxisWindows):
            weights = extent.weights(n_in, n_out)
        else:
            weights = linear_weights(n_in, n_out, extent)
        return weights.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def make_plan(
    images: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    view: GridPlacement,
) -> ResamplingPlan:
    """Return the weights and chunks that upsample `images` grids (h, w) of `classes` logits to `size` (H, W).

    The type of the device sets the chunk size. `view` is the position of the grid on the pixels.
    """
    h, w = grid
    height, width = size
    numel = limit_on(device, CHUNK_NUMEL)
    cols = bilinear_weights(w, width, view.cols, dtype=dtype, device=device).T.contiguous()
    nodes, fractions = axis_nodes(h, height, view.rows)
    n_cols = cols.shape[1]
    fractions = fractions.to(device, dtype)[:, None, None]
    # A band has all its rows, unless a strip of 64 columns would exceed the chunk.
    most = max(1, numel // (classes * min(n_cols, 64)))
    bands = []
    first = 0
    for lo, group in groupby(nodes.tolist()):
        hi = min(lo + 2, h)
        last = first + len(list(group))
        for start in range(first, last, most):
            stop = min(start + most, last)
            bands.append(
                Band(start=start, stop=stop, lo=lo, hi=hi, fractions=fractions[start:stop])
            )
        first = last
    highest = max(band.stop - band.start for band in bands)
    # Tile widths are multiples of 32: a maximum over classes vectorises along pixels in such steps only.
    tile = min(n_cols, 32 * max(1, numel // (highest * classes * 32)))
    tiles = tuple(slice(x, min(x + tile, n_cols)) for x in range(0, n_cols, tile))
    # The h upsampled rows count as well: if the grid is finer than the mask, they are larger than a band.
    per_image = max(highest, h // 8) * classes * tile
    return ResamplingPlan(
        cols=cols, bands=tuple(bands), tiles=tiles, images=max(1, min(images, numel // per_image))
    )


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64 logits, else float32; half precision would produce ties between classes."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def upsample(maps: Tensor, size: tuple[int, int], view: GridPlacement | None = None) -> Tensor:
    """Return maps f[..., h, w] on the grid as pixels f[..., H, W], all at once; differentiable.

    Equals `F.interpolate(maps, size, mode="bilinear")`. `view` is the position of the grid on the pixels; None: the
    grid covers them exactly.
    """
    view = view or GridPlacement.full(size)
    like = {"dtype": compute_dtype(maps), "device": maps.device}
    rows = bilinear_weights(maps.shape[-2], n_out=size[0], extent=view.rows, **like)
    cols = bilinear_weights(maps.shape[-1], n_out=size[1], extent=view.cols, **like)
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps.to(rows.dtype) @ cols.T


@torch.no_grad()
def upsampled_argmax(
    logits: Tensor, size: tuple[int, int], view: GridPlacement | None = None
) -> Tensor:
    """Return the predicted class per pixel, uint8[..., H, W], or int16 if K > 255, of finite logits f[..., K, h, w].

    Equals `F.interpolate(logits, size, mode="bilinear").argmax(-3)` up to ties, in the memory of one chunk. `view` is
    the position of the grid on the pixels; None: the grid covers them exactly.
    """
    *leading, classes, h, w = logits.shape
    size = tuple(size)
    view = view or GridPlacement.full(size)
    if view.has_windows:
        return _argmax_of_windows(logits, size, view)
    dtype = compute_dtype(logits)
    grids = logits.reshape(-1, classes, h, w).transpose(1, 2)  # [N, h, K, w]
    if use_triton(logits):
        from probes.ops.kernels.argmax_counts import argmax_map
        from probes.ops.kernels.grid_cells import cells

        rows, cols = cells((h, w), size=size, view=view, device=logits.device)
        return argmax_map(grids.transpose(1, 2), rows, cols).view(*leading, *size)
    plan = make_plan(
        max(1, len(grids)),
        classes=classes,
        grid=(h, w),
        size=size,
        dtype=dtype,
        device=logits.device,
        view=view,
    )
    out = logits.new_empty(
        (len(grids), *size), dtype=torch.uint8 if classes <= 255 else torch.int16
    )
    # max() with indices does not vectorise. Instead, the maxima are marked and multiplied with class numbers in
    # descending order. The highest product belongs to the first maximum, as in argmax.
    numbers = torch.arange(classes - 1, -1, -1, dtype=dtype, device=logits.device)[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        for first in range(0, len(grids), plan.images):
            images = slice(first, first + plan.images)
            for tile in plan.tiles:
                stretched = grids[images].to(dtype) @ plan.cols[:, tile]
                for band in plan.bands:
                    upper = stretched.narrow(-3, band.lo, 1)
                    lower = stretched.narrow(-3, band.hi - 1, 1)
                    up = torch.lerp(upper, lower, band.fractions)  # [N, R, K, C]
                    highest = up.eq_(up.amax(-2, keepdim=True)).mul_(numbers).amax(-2)
                    out[images, band.start : band.stop, tile] = classes - 1 - highest
    return out.view(*leading, *size)


def _argmax_of_windows(logits: Tensor, size: tuple[int, int], view: GridPlacement) -> Tensor:
    """Return the class of each pixel as :func:`upsampled_argmax`, of the grids of windows f[..., K, h, w]."""
    *leading, classes, h, w = logits.shape
    like = {"dtype": compute_dtype(logits), "device": logits.device}
    rows = bilinear_weights(h, n_out=size[0], extent=view.rows, **like)
    cols = bilinear_weights(w, n_out=size[1], extent=view.cols, **like)
    step = max(1, limit_on(logits.device, CHUNK_NUMEL) // (classes * size[1]))
    out = logits.new_empty(
        (math.prod(leading), *size), dtype=torch.uint8 if classes <= 255 else torch.int16
    )
    with torch.autocast(logits.device.type, enabled=False):
        for grid, of_grid in zip(logits.reshape(-1, classes, h, w), out, strict=True):
            stretched = grid.to(rows.dtype) @ cols.T
            for part, of_part in zip(rows.split(step), of_grid.split(step), strict=True):
                of_part.copy_((part @ stretched).argmax(0))
    return out.view(*leading, *size)
