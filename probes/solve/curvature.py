"""The curvature of the loss of one site on a sample of nodes, with which quasi-Newton steps begin.

    step = - L-BFGS(gradient; pairs of earlier steps), started from (H_S + r D + c H_0 + H_g)^-1

- H_S is the Hessian on a sample of nodes of all masks. It is applied by conjugate gradients and never stored.
- H_0 = q_k s_j, with q_k the mean of p_k (1 - p_k) on the sample and s the spectrum of the moments of all
  tokens, keeps directions that the sample does not have.
- H_g = |g_k| s_j, with g_k the exact gradient by the bias of class k, which is its mean probability minus its
  frequency. Where a class has no pixels, as in a fold that lacks it, its optimum is at infinity, and the sample may
  miss the few pixels where it still has a probability: without H_g, steps of 20 to 30 were taken instead of one.
- The pairs (step, change of the exact gradient) correct all of this (`probes/ops/lbfgs.py`).

The sample prefers nodes where a probe is unsure, since sure ones have no curvature. All of it is float32: it shapes a
step, while loss, gradient and certificate of what the step leads to are exact.

Legend: P probes that are solved together, n nodes, K classes, d width; F folds, B images, T tokens, h w token grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.kernels import fast_dtype
from probes.ops.lbfgs import FirstGuess, dot
from probes.ops.quadrature import PreparedMasks

from .objective import SiteProblem
from .space import float_chunks, full_precision

CG_ITERATIONS = 100
CANDIDATES = 8  # nodes from which one is kept
# Share of the chance of a node that is the same for all. With 1/2, 184 photos of CamVid take 1.07 times as long, and 46
# with 44 classes 1.14 times; with 1/20, 1.04 and 1.03. Without a preference it is 1.14 and 1.28, and weak strengths of
# Gaussian states take twice as long.
ALIKE = 1 / 6
# The damping c, for a weight of a probe for each node of the sample: fewer nodes show less of the curvature. With 0.5,
# 46 photos of CamVid with 44 classes take 1.4 times as many evaluations.
DAMPING = 0.1
LEAST_DAMPING = 0.03
MOST_DAMPING = 3.0
# Nodes of the sample: one for a weight of a probe, at most one for two tokens, at least 500. With a quarter as many, 46
# photos of CamVid with 44 classes take 1.4 times as many evaluations.
TOKENS_PER_NODE = 2
LEAST_SAMPLED = 500
SAMPLE_RESIDUAL = 0.1  # of the step on the sample; with 0.03 it takes as many steps and more time


def first_guess(
    problem: SiteProblem, strengths: Tensor, left_out: Sequence[int | None], start: Tensor
) -> FirstGuess:
    """Return the inverse of the Hessian on a sample of nodes of all images, for `minimise`.

    Args:
        problem: The site's states and masks.
        strengths: f64[P].
        left_out: P folds, or None for all images.
        start: f64[P, K, d + 1], points from which it starts.
    """
    most = min(start[0].numel(), problem.states.shape[:2].numel() // TOKENS_PER_NODE)
    sample = sample_nodes(problem, max(LEAST_SAMPLED, most), start.mean(0))

    def inverse_hessian(
        points: Tensor, gradient: Tensor, problems: list[int]
    ) -> Callable[[Tensor], Tensor]:
        hessian = SampleHessian(
            problem=problem,
            sample=sample,
            points=points,
            gradient=gradient,
            strengths=strengths[problems],
            left_out=[left_out[i] for i in problems],
        )
        return hessian.solve

    return inverse_hessian


class SampledNodes(NamedTuple):
    """Nodes of the masks of a site, on the device of the computation.

    Args:
        inputs: f32[n, d + 1], states in the coordinates of the site, and ones.
        weights: f32[n], labelled pixels that each one stands for.
        folds: i64[n], fold of each node's image.
    """

    inputs: Tensor
    weights: Tensor
    folds: Tensor


class SampleHessian:
    """The Hessian of the objectives of some probes on a sample, and its preconditioner.

    Args:
        problem: The loss and the coordinates of the site.
        sample: The nodes.
        points: f64[P, K, d + 1].
        gradient: f64[P, K, d + 1], of the objectives there, on all images.
        strengths: f64[P].
        left_out: P folds, or None.
    """

    @full_precision()
    def __init__(
        self,
        problem: SiteProblem,
        sample: SampledNodes,
        points: Tensor,
        gradient: Tensor,
        strengths: Tensor,
        left_out: Sequence[int | None],
    ):
        spectrum = problem.space.input_spectrum
        self.inputs = sample.inputs.to(fast_dtype(sample.inputs.device))
        # every fold differs from None
        used = torch.stack([sample.weights * (sample.folds != fold) for fold in left_out], 1)
        total = used.sum(0).clamp(min=torch.finfo(used.dtype).tiny)
        self.weights = (used / total)[..., None]  # [n, P, 1]
        logits = sample.inputs @ points.flatten(0, 1).T.to(sample.inputs)
        self.curvature = problem.loss.curvature(logits.view(len(used), *points.shape[:2]))
        spread = self.curvature.diagonal() * self.weights
        typical = spread.sum(0).double()[..., None] * spectrum + 1e-6  # H_0
        # H_g and r D
        pull = gradient[..., -1:].abs() * spectrum + problem.space.ridge(strengths)
        damping = DAMPING * points[0].numel() / len(used)
        damping = min(max(damping, LEAST_DAMPING), MOST_DAMPING)
        self.pull = (damping * typical + pull).float()
        self.preconditioner = 1 / (typical.float() + self.pull)

    def times(self, direction: Tensor) -> Tensor:
        """Return the product with f32[P, K, d + 1], with the pull towards the point."""
        logits = self.inputs @ direction.flatten(0, 1).T.to(self.inputs)
        change = self.curvature.times(logits.view(-1, *direction.shape[:2]).float())
        change *= self.weights
        change = change.flatten(1).to(self.inputs)
        product = (change.T @ self.inputs).view_as(direction).float()
        return product.addcmul_(self.pull, direction)

    @full_precision()
    def solve(self, right: Tensor) -> Tensor:
        """Return H^-1 right by conjugate gradients, f32[P, K, d + 1]."""
        left = right.to(torch.float32, copy=True)
        tiny = torch.finfo(left.dtype).tiny
        solution = torch.zeros_like(left)
        scaled = self.preconditioner * left
        direction = scaled.clone()
        size = dot(left, scaled)
        enough = SAMPLE_RESIDUAL**2 * size
        for _ in range(CG_ITERATIONS):
            active = size > enough
            if not active.any():
                break
            product = self.times(direction)
            step = torch.where(active, size / dot(direction, product).clamp(min=tiny), 0)
            solution.addcmul_(step[:, None, None], direction)
            left.addcmul_(step[:, None, None], product, value=-1)
            torch.mul(self.preconditioner, left, out=scaled)
            before = size
            size = dot(left, scaled)
            direction.mul_((size / before.clamp(min=tiny))[:, None, None]).add_(scaled)
        return solution


class Nodes(NamedTuple):
    """Nodes of the masks of some images.

    Args:
        image: i64[n], position of each node's image among them.
        tokens: i64[n, C], tokens from which the node is interpolated.
        shares: f[n, C], their weights.
        weight: Labelled pixels that each node stands for.
    """

    image: Tensor
    tokens: Tensor
    shares: Tensor
    weight: float

    def interpolate(self, states: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
        """Return the states f[m, d] at some of the nodes, on their device.

        Args:
            states: f[B, T, d].
            images: i64[m], index of each node's image in them.
            chosen: i64[m], the nodes.
        """
        rows = states.flatten(0, 1)
        first = images.to(states.device) * states.shape[1]
        tokens = self.tokens[chosen].to(states.device)
        shares = self.shares[chosen]
        found = shares.new_zeros(len(chosen), states.shape[-1])
        for token, share in zip(tokens.T, shares.T, strict=True):
            found.addcmul_(share[:, None], rows.index_select(0, first + token).to(found))
        return found


@full_precision()
def sample_nodes(problem: SiteProblem, count: int, point: Tensor) -> SampledNodes:
    """Return about `count` nodes of all images with the states there, rather those of which a probe is unsure.

    Args:
        problem: The site's states and masks.
        count: Number of nodes of all folds.
        point: f64[K, d + 1], the probe.
    """
    states = problem.states
    space = problem.space
    probe = space.to_states(point).float()
    pixels = problem.pixels.tolist()
    parts = []
    for fold, images in enumerate(problem.folds):
        if pixels[fold] == 0:
            continue
        # one at least: the others may have no labels at all
        number = max(1, round(count * pixels[fold] / sum(pixels)))
        nodes = draw_nodes(problem.masks, images, CANDIDATES * number, seed=fold)
        unsure = []
        first = 0
        for part, x in float_chunks(states, images=images, mean=space.mean, rows=len(probe)):
            last = first + len(part)
            here = ((nodes.image >= first) & (nodes.image < last)).nonzero().flatten()
            logits = torch.addmm(probe[:, -1], x, probe[:, :-1].T).view(len(part), -1, len(probe))
            at_nodes = nodes.interpolate(logits, nodes.image[here] - first, here)
            unsure.append(problem.loss.curvature(at_nodes).trace())
            first = last
        chosen, stands_for = keep_uncertain(torch.cat(unsure).cpu(), number)
        chosen = chosen.to(probe.device)
        image = images[nodes.image[chosen].cpu()]
        inputs = space.coordinates(nodes.interpolate(states, image, chosen))
        weights = (nodes.weight * stands_for).to(probe)
        parts.append((inputs, weights, torch.full_like(chosen, fold)))
    return SampledNodes(*map(torch.cat, zip(*parts, strict=True)))


def draw_nodes(masks: PreparedMasks, images: Tensor, number: int, seed: int) -> Nodes:
    """Return random nodes of some images, in the order of the images.

    The nodes, one after the other, are cut into `number` parts of as many pixels; one node of each is drawn.

    Args:
        masks: Of all images.
        images: i64[B], on the CPU.
        number: n.
        seed: Seed of the draw.
    """
    mass = masks.mass[images]
    # on the CPU: on a GPU, sums of floats in order are not deterministic
    total = mass.cpu().clamp(min=0).double().flatten().cumsum(0)
    draw = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = total[-1].item() / number
    at = (torch.arange(number) + draw) * weight
    node = torch.searchsorted(total, at, right=True).clamp(max=len(total) - 1).to(mass.device)
    image, row, col = torch.unravel_index(node, mass.shape)
    rule = torch.tensor(masks.rule_of)[images].to(mass.device)[image]
    by_row, by_col = (torch.stack(rules) for rules in zip(*masks.rules, strict=True))
    (h, w) = (by_row.shape[-1], by_col.shape[-1])
    row_shares, at_row = by_row[rule, row].topk(min(2, h))
    col_shares, at_col = by_col[rule, col].topk(min(2, w))
    tokens = at_row[:, :, None] * w + at_col[:, None]
    shares = row_shares[:, :, None] * col_shares[:, None]
    return Nodes(image=image, tokens=tokens.flatten(1), shares=shares.flatten(1), weight=weight)


def keep_uncertain(uncertainty: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return which candidates are kept, i64[number], and for how many candidates each one stands, f64[number].

    A part of the chance of a candidate is the same for all, which limits the weights; the rest is in proportion to its
    uncertainty. Source: Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Args:
        uncertainty: f32[n], of each candidate, at least 0, on the CPU.
        number: How many are kept.
    """
    count = len(uncertainty)
    unsure = uncertainty.double() + 1e-12
    chance = ALIKE / count + (1 - ALIKE) * unsure / unsure.sum()
    at = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    chosen = torch.searchsorted(chance.cumsum(0), at).clamp(max=count - 1)
    return chosen, 1 / (number * chance[chosen])
