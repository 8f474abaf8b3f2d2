"""The curvature of the loss of one site on a sample of pixels, and a quasi-Newton step that starts from it.

    step = - L-BFGS(gradient; pairs of earlier steps), started from (H_S + r D + c H_0)^-1

- H_S is the Hessian on a sample of pixels of every image (`pixel_sample.py`). It is applied by conjugate gradients
  and never stored.
- H_0 = q_k s_j, with q_k the mean of p_k (1 - p_k) on the sample and s the spectrum of the moments of all
  tokens, keeps directions that the sample does not have.
- The pairs (step, change of the exact gradient) correct both. Source: Nocedal and Wright, algorithm 7.4.

Legend: G probes of a strength, n pixels of the sample, K classes, d width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from probes.ops.kernels import fast_dtype

RESIDUAL = 0.03  # of conjugate gradients, relative
ITERATIONS = 100  # of conjugate gradients


@dataclass
class SampledPixels:
    """A sample of pixels of a site on the device of the computation.

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
        sample: The pixels.
        points: f64[G, K, d + 1].
        left_out: G folds, or None.
        ridge: f64[1, d + 1], weights of the squares of a point.
        input_spectrum: f64[d + 1], mean squares of the inputs.
        damping: f64[G], c.
    """

    def __init__(
        self,
        sample: SampledPixels,
        points: Tensor,
        left_out: list[int | None],
        ridge: Tensor,
        input_spectrum: Tensor,
        damping: Tensor,
    ):
        self.inputs = sample.fast_inputs
        self.ridge = ridge
        used = torch.stack([_used(sample, fold) for fold in left_out], 1)
        self.weights = (used / used.sum(0))[..., None]  # [n, G, 1]
        logits = sample.inputs @ points.flatten(0, 1).T.to(sample.inputs)
        self.probability = logits.view(len(used), *points.shape[:2]).softmax(-1)
        spread = self.probability * (1 - self.probability) * self.weights
        self.typical = spread.sum(0).double()[..., None] * input_spectrum + 1e-6  # H_0
        self.pull = damping[:, None, None] * self.typical

    def times(self, direction: Tensor) -> Tensor:
        """Return the product with f64[G, K, d + 1], with the pull towards the point."""
        change = (self.inputs @ direction.flatten(0, 1).T.to(self.inputs)).view_as(self.probability)
        change = self.probability * change.float()
        change -= self.probability * change.sum(-1, keepdim=True)
        change *= self.weights
        change = change.flatten(1).to(self.inputs)
        product = (change.T @ self.inputs).view_as(direction).double()
        return product + (self.ridge + self.pull) * direction

    def solve(self, right: Tensor) -> Tensor:
        """Return H^-1 right by conjugate gradients, f64[G, K, d + 1]."""
        preconditioner = 1 / (self.typical + self.pull + self.ridge)
        solution = torch.zeros_like(right)
        residual = right.clone()
        scaled = preconditioner * residual
        direction = scaled.clone()
        size = dot(residual, scaled)
        enough = RESIDUAL**2 * size
        for _ in range(ITERATIONS):
            active = size > enough
            if not active.any():
                break
            product = self.times(direction)
            step = torch.where(active, size / dot(direction, product).clamp(min=1e-300), 0)[
                :, None, None
            ]
            solution += step * direction
            residual -= step * product
            scaled = preconditioner * residual
            before = size
            size = dot(residual, scaled)
            direction = scaled + (size / before.clamp(min=1e-300))[:, None, None] * direction
        return solution


def _used(sample: SampledPixels, left_out: int | None) -> Tensor:
    """Return the weights f32[n] of the pixels, 0 in the fold that is left out."""
    return sample.weights if left_out is None else sample.weights * (sample.folds != left_out)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the scalar products of points f64[..., K, d + 1]."""
    return (x * y).sum((-2, -1))


def quasi_newton(
    gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], solve: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return about H^-1 gradient, f64[G, K, d + 1]: the two-loop recursion of L-BFGS around `solve`.

    Args:
        gradient: f64[G, K, d + 1].
        pairs: Steps and changes of the gradient, from old to new.
        solve: Product with a first guess of H^-1.
    """
    result = gradient.clone()
    factors = []
    for step, change in reversed(pairs):
        curvature = dot(step.double(), change.double())
        inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-300), 0)
        factor = inverse * dot(step, result)
        result -= factor[:, None, None] * change
        factors.append((inverse, factor))
    result = solve(result)
    for (step, change), (inverse, factor) in zip(pairs, reversed(factors), strict=True):
        result += (factor - inverse * dot(change, result))[:, None, None] * step
    return result
