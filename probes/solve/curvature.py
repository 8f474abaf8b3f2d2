"""The curvature of the loss of one site on a sample of pixels, with which quasi-Newton steps begin.

    step = - L-BFGS(gradient; pairs of earlier steps), started from (H_S + r D + c H_0 + H_g)^-1

- H_S is the Hessian on a sample of pixels of all images. It is applied by conjugate gradients and never stored.
- H_0 = q_k s_j, with q_k the mean of p_k (1 - p_k) on the sample and s the spectrum of the moments of all
  tokens, keeps directions that the sample does not have.
- H_g = |g_k| s_j, with g_k the exact gradient by the bias of class k, which is its mean probability minus its
  frequency. Where a class has no pixels, as in a fold that lacks it, its optimum is at infinity, and the sample may
  miss the few pixels where it still has a probability: without H_g, steps of 20 to 30 were taken instead of one.
- The pairs (step, change of the exact gradient) correct all of this (`probes/ops/lbfgs.py`).

In memory, the sample are nodes of the masks (`sample_nodes`), between passes pixels (`pixel_sample.py`). Both prefer
those of which a probe is unsure, since sure ones have no curvature.

Legend: G probes that are solved together, n pixels or nodes of the sample, K classes, d width; F folds, B images,
T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from probes.ops.kernels import fast_dtype
from probes.ops.lbfgs import dot
from probes.ops.quadrature import PreparedMasks
from probes.tasks.losses import Loss

from .moments import full_precision
from .pixel_sample import CANDIDATES, keep_uncertain

CG_ITERATIONS = 100
# Share of the chance of a node in memory that is the same for all. With 1/2, as between passes, 184 photos of CamVid
# take 1.07 times as long, and 46 with 44 classes 1.14 times; with 1/20, 1.04 and 1.03. Without a preference it is 1.14
# and 1.28, and weak strengths of Gaussian states take twice as long.
NODES_ALIKE = 1 / 6
# The first damping, a weight of a probe for each pixel of the sample: fewer pixels show less of the curvature
FIRST_DAMPING = 0.5
LEAST_DAMPING = 0.03
MOST_FIRST_DAMPING = 3.0


@dataclass
class SampledPixels:
    """A sample of pixels of a site, or of nodes, on the device of the computation.

    Args:
        inputs: f32[n, d + 1], states in the coordinates of the site, and ones.
        weights: f32[n], labelled pixels that each one stands for.
        folds: i64[n], fold of each pixel's image.
    """

    inputs: Tensor
    weights: Tensor
    folds: Tensor

    @cached_property
    def fast_inputs(self) -> Tensor:
        """The inputs in the dtype that the device multiplies fastest.

        Products with them shape a step; loss, gradient and certificate of what it leads to are exact.
        """
        return self.inputs.to(fast_dtype(self.inputs.device))


class SampleHessian:
    """The Hessian of the objectives of some probes on a sample, and its preconditioner.

    Args:
        loss: Of the logits.
        sample: The pixels.
        points: f64[G, K, d + 1].
        gradient: f64[G, K, d + 1], of the objectives there, on all images.
        left_out: G folds, or None.
        ridge: f64[1, d + 1] or f64[G, 1, d + 1], weights of the squares of a point.
        input_spectrum: f64[d + 1], mean squares of the inputs.
        damping: f64[G], c.
    """

    @full_precision()
    def __init__(
        self,
        loss: Loss,
        sample: SampledPixels,
        points: Tensor,
        gradient: Tensor,
        left_out: Sequence[int | None],
        ridge: Tensor,
        input_spectrum: Tensor,
        damping: Tensor,
    ):
        self.inputs = sample.fast_inputs
        self.ridge = ridge
        used = torch.stack([_used(sample, fold) for fold in left_out], 1)
        total = used.sum(0).clamp(min=torch.finfo(used.dtype).tiny)
        self.weights = (used / total)[..., None]  # [n, G, 1]
        logits = sample.inputs @ points.flatten(0, 1).T.to(sample.inputs)
        self.curvature = loss.curvature(logits.view(len(used), *points.shape[:2]))
        spread = self.curvature.diagonal() * self.weights
        self.typical = spread.sum(0).double()[..., None] * input_spectrum + 1e-6  # H_0
        self.pull = damping[:, None, None] * self.typical
        self.pull += gradient[..., -1:].abs() * input_spectrum  # H_g

    def times(self, direction: Tensor) -> Tensor:
        """Return the product with f64[G, K, d + 1], with the pull towards the point."""
        logits = self.inputs @ direction.flatten(0, 1).T.to(self.inputs)
        change = self.curvature.times(logits.view(-1, *direction.shape[:2]).float())
        change *= self.weights
        change = change.flatten(1).to(self.inputs)
        product = (change.T @ self.inputs).view_as(direction).double()
        return product + (self.ridge + self.pull) * direction

    @full_precision()
    def solve(self, right: Tensor, residual: float) -> Tensor:
        """Return H^-1 right by conjugate gradients, f64[G, K, d + 1], up to a relative residual."""
        preconditioner = 1 / (self.typical + self.pull + self.ridge)
        solution = torch.zeros_like(right)
        left = right.clone()
        scaled = preconditioner * left
        direction = scaled.clone()
        size = dot(left, scaled)
        enough = residual**2 * size
        for _ in range(CG_ITERATIONS):
            active = size > enough
            if not active.any():
                break
            product = self.times(direction)
            step = torch.where(active, size / dot(direction, product).clamp(min=1e-300), 0)[
                :, None, None
            ]
            solution += step * direction
            left -= step * product
            scaled = preconditioner * left
            before = size
            size = dot(left, scaled)
            direction = scaled + (size / before.clamp(min=1e-300))[:, None, None] * direction
        return solution


def first_damping(weights: int, pixels: int) -> float:
    """Return the damping c of a first step.

    Args:
        weights: Of a probe.
        pixels: Of the sample.
    """
    damping = FIRST_DAMPING * weights / max(1, pixels)
    return min(max(damping, LEAST_DAMPING), MOST_FIRST_DAMPING)


def _used(sample: SampledPixels, left_out: int | None) -> Tensor:
    """Return the weights f32[n] of the pixels, 0 in the fold that is left out."""
    return sample.weights if left_out is None else sample.weights * (sample.folds != left_out)


@full_precision()
def sample_nodes(
    loss: Loss,
    tokens: Sequence[Tensor],
    masks: Sequence[PreparedMasks],
    count: int,
    point: Tensor,
) -> SampledPixels:
    """Return about `count` nodes of all images with the states there, rather those of which a probe is unsure.

    Args:
        loss: Of the logits.
        tokens: F tensors f32[B, T, d + 1], states in the coordinates of the site, and ones, of each fold.
        masks: The masks of each fold.
        count: Number of nodes of all folds.
        point: f64[K, d + 1], the probe.
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
        *nodes, weight = _draw_nodes(mask.mass, CANDIDATES * number, seed=fold)
        logits = _interpolate(states @ point.T.to(states), mask, *nodes)
        unsure = loss.curvature(logits).trace().cpu()
        chosen, stands_for = keep_uncertain(unsure, number, NODES_ALIKE)
        chosen = chosen.to(states.device)
        inputs.append(_interpolate(states, mask, *(x[chosen] for x in nodes)))
        weights.append((weight * stands_for).to(states))
        folds.append(torch.full_like(chosen, fold))
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
