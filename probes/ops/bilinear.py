"""Bilinear upsampling of coarse logits, one small chunk at a time.

A probe gives logits on the patch grid, `f[K, h, w]`; a segmentation mask has `H x W` pixels. All logits of all pixels
are `K * H * W` numbers (157 MB for 150 classes at 512 x 512), yet each is only a weighted mean of four grid nodes,

    up[k, y, x] = sum_ij rows[y, i] * cols[j, x] * z[k, i, j]        with rows f[H, h] and cols f[w, W],

so nothing of that size is ever stored. Columns are stretched first, while there are only h rows: one small matrix
product. Pixel rows are then made in *bands*, all those between the same two grid rows: one `torch.lerp` of two
stretched rows, at a fifth of the price of a second product. The adjoint of a band is `rows[band, lo:hi].T @ band`.

    h=2 -> H=4:   rows = [1 0], [.75 .25], [.25 .75], [0 1]     Pixel rows 0, 1, 2 mix grid rows 0 and 1, pixel row 3
                                                               is the last grid row alone: two bands.

A chunk is `f[N, R, K, C]`: a row's pixels are innermost, so that max, exp and sum over the classes vectorise.
`cross_entropy.py` walks the same chunks.

Legend: N images, K classes, h w grid, H W pixels, R C pixel rows and columns of one chunk.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import AxisExtent, GridPlacement, axis_nodes
from .kernels import use_triton

# Numbers in a chunk. On a CPU 2 MB: a few passes over it stay in cache, and calls into torch are few. A GPU wants more.
CHUNK_NUMEL = {"cpu": 2**19, "cuda": 2**25}


class Band(NamedTuple):
    """Pixel rows `start:stop`, which mix the grid rows `lo:hi`: two of them, or the last one alone."""

    start: int
    stop: int
    lo: int
    hi: int
    weights: Tensor  # f[hi - lo, R], rows[start:stop, lo:hi].T
    fractions: Tensor  # f[R, 1, 1], of the way from grid row lo to hi - 1


class Plan(NamedTuple):
    """How one grid is resampled in chunks; see `make_plan`."""

    rows: Tensor  # f[H, h]
    cols: Tensor  # f[w, W]
    nodes: Tensor  # i64[H], the grid row at or above each pixel row
    bands: tuple[Band, ...]
    tiles: tuple[slice, ...]  # of pixel columns
    images: int  # in one chunk


@lru_cache(maxsize=64)
def bilinear_weights(
    n_in: int,
    n_out: int,
    span: AxisExtent | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns the matrix f[n_out, n_in] that resamples one axis bilinearly. Its rows sum to 1.

    Where the nodes divide the outputs (no `span`) it is the same as `F.interpolate(mode="bilinear",
    align_corners=False, antialias=False)`: up or down, at any ratio.
    The tensor is cached: do not write to it.

    Raises:
        ValueError: a size is below 1.
    """
    if min(n_in, n_out) < 1:
        raise ValueError(f"sizes must be at least 1, got n_in={n_in} and n_out={n_out}")
    with torch.inference_mode(False):  # a tensor cached during validation must serve in training, too
        nodes, fractions = axis_nodes(n_in, n_out, span)
        weights = torch.zeros(n_out, n_in, dtype=torch.float64)
        weights.scatter_(1, (nodes + 1).clamp(max=n_in - 1)[:, None], fractions[:, None])
        weights.scatter_(1, nodes[:, None], 1 - fractions[:, None])  # second: at the edge both are the same node
        return weights.to(device=device, dtype=dtype)


def _even(total: int, most: int) -> int:
    """Returns the part size that cuts `total` into the fewest parts of at most `most`, as equal as they come."""
    return -(-total // -(-total // max(1, min(total, most))))


@lru_cache(maxsize=64)
def make_plan(
    images: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    view: GridPlacement | None = None,
    stride: int = 1,
    max_rows: int | None = None,
) -> Plan:
    """Returns the weights and the chunks that resample `images` grids of `classes` logits each.

    Args:
        images: number of grids; `Plan.images` says how many of them one chunk takes.
        classes: K.
        grid: (h, w).
        size: (H, W).
        dtype: of the weights.
        device: of the weights; its type also sets the size of a chunk.
        view: where the grid lies on the pixels; by default it divides them.
        stride: takes only each stride-th pixel row and column, from `stride // 2` on; H, W are then what remains.
        max_rows: at most so many pixel rows in a chunk; by default what fits.
    """
    (h, w), (height, width), keep = grid, size, slice(stride // 2, None, stride)
    view = view or GridPlacement.whole(size)
    numel = CHUNK_NUMEL.get(device.type, CHUNK_NUMEL["cuda"])
    rows = bilinear_weights(h, height, view.rows, dtype=dtype, device=device)[keep]
    cols = bilinear_weights(w, width, view.cols, dtype=dtype, device=device)[keep].T.contiguous()
    nodes, n_cols = axis_nodes(h, height, view.rows)[0][keep], cols.shape[1]
    # Bands are as high as they come, unless a strip of 64 columns would overfill the chunk.
    most = max_rows or max(1, numel // (classes * min(n_cols, 64)))
    bands, first = [], 0
    for lo, group in groupby(nodes.tolist()):
        hi, last = min(lo + 2, h), first + len(list(group))
        for start in range(first, last, most):
            stop = min(start + most, last)
            weights = rows[start:stop, lo:hi].T.contiguous()
            bands.append(Band(start, stop, lo, hi, weights, weights[-1, :, None, None]))
        first = last
    highest = max(band.stop - band.start for band in bands)
    # Tiles of whole 32s: a maximum over classes vectorises along the pixels in such strides, and crawls in between.
    tile = min(n_cols, 32 * _even(-(-n_cols // 32), numel // (highest * classes * 32)))
    tiles = tuple(slice(x, min(x + tile, n_cols)) for x in range(0, n_cols, tile))
    # The h stretched rows count, too: where the grid shrinks they outweigh the band made from two of them.
    per_image = max(highest, h // 8) * classes * tile
    return Plan(rows, cols, nodes.to(device), tuple(bands), tiles, max(1, min(images, numel // per_image)))


def band_rows(stretched: Tensor, band: Band) -> Tensor:
    """Returns the pixels of the band, f[..., R, K, C], from all grid rows with stretched columns, f[..., h, K, C]."""
    upper, lower = stretched.narrow(-3, band.lo, 1), stretched.narrow(-3, band.hi - 1, 1)
    return torch.lerp(upper, lower, band.fractions)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Returns float64 for float64 logits, else float32: in half precision neighbouring classes tie."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.no_grad()
def upsampled_argmax(logits: Tensor, size: tuple[int, int], view: GridPlacement | None = None) -> Tensor:
    """Returns the class of each pixel, uint8[..., H, W], or int16 where K > 255.

    The same as `F.interpolate(logits, size, mode="bilinear").argmax(-3)`, float ties aside, in the memory of a chunk.

    Args:
        logits: f[..., K, h, w], finite.
        size: (H, W).
        view: where the grid lies on these pixels; by default it divides them.

    Raises:
        ValueError: logits have fewer than three axes, or one of size 0 among the last three.
    """
    if logits.ndim < 3 or 0 in logits.shape[-3:]:
        raise ValueError(f"logits must be [..., K, h, w], none of them 0, got {list(logits.shape)}")
    (*leading, classes, h, w), size, dtype = logits.shape, tuple(size), compute_dtype(logits)
    grids = logits.reshape(-1, classes, h, w).transpose(1, 2)  # [N, h, K, w]
    if use_triton(logits):
        from probes.ops.kernels.argmax_counts import argmax_map
        from probes.ops.kernels.grid_cells import cells

        rows, cols = cells((h, w), size, view or GridPlacement.whole(size), 1, logits.device)
        return argmax_map(grids.transpose(1, 2), rows, cols).view(*leading, *size)
    plan = make_plan(max(1, len(grids)), classes, (h, w), size, dtype, logits.device, view=view)
    out = logits.new_empty((len(grids), *size), dtype=torch.uint8 if classes <= 255 else torch.int16)
    # max() with indices does not vectorise. Instead mark the best, number the classes downwards, take the highest: the
    # first of the best, as argmax would.
    numbers = torch.arange(classes - 1, -1, -1, dtype=dtype, device=logits.device)[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        for first in range(0, len(grids), plan.images):
            images = slice(first, first + plan.images)
            for tile in plan.tiles:
                stretched = grids[images].to(dtype) @ plan.cols[:, tile]
                for band in plan.bands:
                    up = band_rows(stretched, band)
                    highest = up.eq_(up.amax(-2, keepdim=True)).mul_(numbers).amax(-2)
                    out[images, band.start : band.stop, tile] = classes - 1 - highest
    return out.view(*leading, *size)
