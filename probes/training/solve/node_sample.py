"""Nodes of the masks of images in memory, drawn as often as they have pixels: the sample for the curvature of the loss.

Legend: F folds, B images, T tokens, d width, n nodes of the sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.ops.quadrature import PreparedMasks

from .sample_hessian import SampledPixels


def sample_nodes(
    tokens: Sequence[Tensor], masks: Sequence[PreparedMasks], count: int
) -> SampledPixels:
    """Return about `count` nodes of all images with the states there.

    Args:
        tokens: F tensors f32[B, T, d + 1], states in the coordinates of the site, and ones, of each fold.
        masks: The masks of each fold.
        count: Number of nodes of all folds.
    """
    pixels = [mask.pixels.sum().item() for mask in masks]
    inputs = []
    weights = []
    folds = []
    for fold, (states, mask) in enumerate(zip(tokens, masks, strict=True)):
        if pixels[fold] == 0:
            continue
        # one at least: the others may have no labels at all
        number = max(1, round(count * pixels[fold] / sum(pixels)))
        image, row, col, weight = _draw_nodes(mask.mass, number, seed=fold)
        inputs.append(_interpolate(states, mask, image, row, col))
        weights.append(torch.full_like(inputs[-1][:, 0], weight))
        folds.append(torch.full_like(image, fold))
    return SampledPixels(torch.cat(inputs), torch.cat(weights), torch.cat(folds))


def _draw_nodes(
    mass: Tensor,
    number: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return image, row and column i64[n] of nodes, and the weight of each one.

    The nodes, one after the other, are cut into `number` parts of as many pixels; one node of each is drawn.

    Args:
        mass: f[B, My, Mx], pixels of each node.
        number: n.
        seed: Seed of the draw.
    """
    # on the CPU: on a GPU, sums of floats in order are not deterministic
    total = mass.cpu().clamp(min=0).double().flatten().cumsum(0)
    draw = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = total[-1].item() / number
    at = (torch.arange(number) + draw) * weight
    node = torch.searchsorted(total, at, right=True).clamp(max=len(total) - 1).to(mass.device)
    _, rows, cols = mass.shape
    return node // (rows * cols), node // cols % rows, node % cols, weight


def _interpolate(
    states: Tensor,
    masks: PreparedMasks,
    image: Tensor,
    row: Tensor,
    col: Tensor,
) -> Tensor:
    """Return the states f[n, d] at nodes, from those of the images f[B, T, d].

    Args:
        states: f[B, T, d].
        masks: Of the images.
        image: i64[n], image of each node.
        row: i64[n], its row among the nodes of the image.
        col: i64[n], its column.
    """
    by_row, by_col = (torch.stack(rules) for rules in zip(*masks.rules, strict=True))
    rule = torch.tensor(masks.rule_of, device=image.device)[image]
    row_share, at_row = by_row[rule, row].topk(min(2, by_row.shape[-1]))
    col_share, at_col = by_col[rule, col].topk(min(2, by_col.shape[-1]))
    found = states.new_zeros(len(image), states.shape[-1])
    for i in range(at_row.shape[1]):
        for j in range(at_col.shape[1]):
            token = at_row[:, i] * by_col.shape[-1] + at_col[:, j]
            found += (row_share[:, i] * col_share[:, j])[:, None] * states[image, token]
    return found
