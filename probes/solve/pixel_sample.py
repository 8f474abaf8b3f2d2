"""Labelled pixels of every image with the states there: the memory of `pass_refinement.py` between two passes.

Tokens of an image resemble each other. The memory of a few images, spent on a few pixels of every image,
describes the curvature of the loss of all images far better, and so do many pixels of few bits instead of few
pixels of many. The first pass keeps a byte a channel. Later ones keep half a byte for each axis of the site's
coordinates, where rounding adds 1% to the variance of each axis and nothing to others. The state at a pixel is what
the logits there are linear in: the bilinear interpolation of its four tokens. The loss at a pixel is a plain
cross-entropy. Later passes prefer pixels of which a probe is unsure, since sure ones add nothing to the curvature.

Legend: n pixels, B images, T tokens, d width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.data.base import IGNORE_INDEX
from probes.ops.geometry import GridPlacement, axis_nodes

from .moments import SiteSpace

# One byte: 4 bits of exponent, 3 of mantissa. A relative error of 6% at most changes the curvature by less than
# the choice of the pixels does.
STORED = torch.float8_e4m3fn
CANDIDATES = 8  # pixels from which one is kept where uncertain ones are preferred
PIXELS_ALIKE = 1 / 2  # share of their chance that is the same for all
LARGEST = 400.0  # in standard deviations; `STORED` ends at 448
LEVELS = 16  # of half a byte
# Between two levels, in standard deviations: the best for a Gaussian. Source: Max, Quantizing for minimum distortion,
# 1960, table II.
STEP = 0.3352


class Pixels(NamedTuple):
    """Where pixels lie among the tokens of a batch, and what they are.

    Args:
        tokens: i64[n, 4], tokens around each pixel, as indices into states f[B * T, d].
        shares: f32[n, 4], their weights in the interpolation.
        labels: i64[n].
        weights: f64[n], labelled pixels of the image that each one stands for.
        images: i64[n], index of the image in the dataset.
    """

    tokens: Tensor
    shares: Tensor
    labels: Tensor
    weights: Tensor
    images: Tensor

    def interpolate(self, states: Tensor) -> Tensor:
        """Return the states f32[n, d] at the pixels, from those of the batch f[B, T, d]."""
        corners = states.flatten(0, 1)[self.tokens.to(states.device)].float()
        return (corners * self.shares.to(states.device)[..., None]).sum(1)


def choose_pixels(
    target: Tensor,
    count: int,
    seed: int,
    grid: tuple[int, int],
    view: GridPlacement,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the tokens i64[n, 4], shares f32[n, 4] and labels i64[n] of random pixels, and the labelled pixels.

    The labelled pixels in raster order are cut into `count` equal parts; one pixel of each is drawn. There are none if
    the mask has no label.

    Args:
        target: Integer [H, W] on the CPU, the mask of an image.
        count: Number of pixels.
        seed: Seed of the draw.
        grid: (h, w) of the tokens.
        view: Position of the grid on the mask.
    """
    rows, cols = (target != IGNORE_INDEX).nonzero(as_tuple=True)
    count = count if len(rows) else 0
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = ((torch.arange(count) + draw) * len(rows) / max(1, count)).long()
    row = rows[chosen]
    col = cols[chosen]
    tokens = []
    shares = []
    upper, lower = _neighbours(row, grid[0], target.shape[0], view.rows)
    left, right = _neighbours(col, grid[1], target.shape[1], view.cols)
    for at_row, of_row in (upper, lower):
        for at_col, of_col in (left, right):
            tokens.append(at_row * grid[1] + at_col)
            shares.append(of_row * of_col)
    return (
        torch.stack(tokens, 1),
        torch.stack(shares, 1).float(),
        target[row, col].long(),
        len(rows),
    )


def count_and_seed(
    image: int,
    images: int,
    total: int,
    number: int,
) -> tuple[int, int]:
    """Return how many pixels a pass keeps of an image, and the seed that chooses them.

    Where there are fewer pixels than images, other images have one in each pass.

    Args:
        image: Index of the image.
        images: Number of images of the dataset.
        total: Pixels of all images.
        number: Number of the pass, from 0.
    """
    place = (image + number) % images
    count = (place + 1) * total // images - place * total // images
    return count, 1_000_003 * (image + images * number)


def draw_pixels(
    images: list[int],
    targets: Sequence[Tensor],
    draws: list[tuple[int, int]],
    grid: tuple[int, int],
    view: Callable[[tuple[int, ...]], GridPlacement],
) -> Pixels:
    """Return random pixels of the images of a batch.

    Args:
        images: B indices of images in the dataset.
        targets: B masks, as of :func:`choose_pixels`.
        draws: (count, seed) of each image.
        grid: (h, w) of the tokens.
        view: Position of the grid on a mask of a size.
    """
    parts = []
    for slot, (image, target, (count, seed)) in enumerate(zip(images, targets, draws, strict=True)):
        found = choose_pixels(target, count, seed, grid, view(tuple(target.shape)))
        tokens, shares, labels, labelled = found
        tokens = tokens + slot * grid[0] * grid[1]
        weights = torch.full((len(labels),), labelled / max(1, len(labels)), dtype=torch.float64)
        parts.append((tokens, shares, labels, weights, torch.full((len(labels),), image)))
    return Pixels(*map(torch.cat, zip(*parts, strict=True)))


def prefer_uncertain(pixels: Pixels, uncertainty: Tensor) -> Pixels:
    """Return one in `CANDIDATES` pixels of each image, with weights that make up for the preference.

    Args:
        pixels: Candidates; those of an image stand together and have equal weights.
        uncertainty: f32[n], at least 0.
    """
    kept = []
    weights = []
    start = 0
    for count in pixels.images.unique_consecutive(return_counts=True)[1].tolist():
        of_image = uncertainty[start : start + count]
        chosen, weight = keep_uncertain(of_image, count // CANDIDATES, PIXELS_ALIKE)
        kept.append(chosen + start)
        weights.append(pixels.weights[chosen + start] * weight)
        start += count
    if not kept:
        return pixels
    return Pixels(*(field[torch.cat(kept)] for field in pixels))._replace(
        weights=torch.cat(weights)
    )


def keep_uncertain(uncertainty: Tensor, number: int, alike: float) -> tuple[Tensor, Tensor]:
    """Return which candidates are kept, i64[number], and for how many candidates each one stands, f64[number].

    A part of the chance of a candidate is the same for all, which limits the weights; the rest is in proportion to its
    uncertainty. Source: Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Args:
        uncertainty: f32[n], of each candidate, at least 0, on the CPU.
        number: How many are kept.
        alike: Share of the chance that is the same for all; weights are at most 1 / alike times the mean.
    """
    count = len(uncertainty)
    unsure = uncertainty.double() + 1e-12
    chance = alike / count + (1 - alike) * unsure / unsure.sum()
    at = (torch.arange(number, dtype=torch.float64) + 0.5) / max(1, number)
    chosen = torch.searchsorted(chance.cumsum(0), at).clamp(max=count - 1)
    return chosen, 1 / (number * chance[chosen])


def _neighbours(
    at: Tensor,
    tokens: int,
    pixels: int,
    extent,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (token, share) before and after each position on an axis."""
    first, fraction = axis_nodes(tokens, pixels, extent)
    first = first[at]
    fraction = fraction[at]
    return (first, 1 - fraction), ((first + 1).clamp(max=tokens - 1), fraction)


class ChannelRange(NamedTuple):
    """How the channels of a site are stored in a byte.

    Args:
        mean: f32[d].
        deviation: f32[d], standard deviation.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, states: Tensor) -> "ChannelRange":
        """Return the range of states f[B, T, d]."""
        flat = states.flatten(0, 1).float()
        return cls(flat.mean(0), flat.std(0).clamp(min=1e-12))

    def store(self, states: Tensor) -> Tensor:
        """Return states f[n, d] in a byte each."""
        scaled = (states.float() - self.mean) / self.deviation
        return scaled.clamp(-LARGEST, LARGEST).to(STORED)

    def restore(self, stored: Tensor) -> Tensor:
        """Return the states f32[n, d]."""
        return stored.float() * self.deviation.to(stored.device) + self.mean.to(stored.device)


class AxisRange(NamedTuple):
    """How states are stored in half a byte for each axis of a site's coordinates.

    Args:
        space: The coordinates.
        deviation: f32[d], standard deviation along each axis.
    """

    space: SiteSpace
    deviation: Tensor

    @classmethod
    def of(cls, space: SiteSpace, inputs: Tensor) -> "AxisRange":
        """Return the range of inputs f32[n, d + 1] in the coordinates."""
        return cls(space, inputs[:, :-1].std(0).clamp(min=1e-12))

    def store(self, states: Tensor) -> Tensor:
        """Return states f[n, d] as uint8[n, ceil(d / 2)]."""
        level = self.space.coordinates(states)[:, :-1] / (STEP * self.deviation)
        code = (level.floor() + LEVELS // 2).clamp(0, LEVELS - 1).to(torch.uint8)
        if code.shape[1] % 2:
            code = torch.cat([code, torch.zeros_like(code[:, :1])], 1)
        return code[:, ::2] * LEVELS + code[:, 1::2]

    def coordinates_of(self, stored: Tensor) -> Tensor:
        """Return the coordinates f32[n, d + 1] in the middle of their levels, with a last column of ones."""
        code = torch.stack([stored // LEVELS, stored % LEVELS], -1).flatten(1)[
            :, : len(self.deviation)
        ]
        inputs = (code.float() - (LEVELS - 1) / 2) * (STEP * self.deviation)
        return torch.cat([inputs, torch.ones_like(inputs[:, :1])], -1)
