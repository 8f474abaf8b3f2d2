"""Linear least squares of a site at every strength of regularisation, in closed form from its moments.

With C the covariance of the upsampled states over the labelled pixels, c their covariance with the target and D the
diagonal of C, the weights of strength r minimise the squared error of the pixels
plus a ridge,

    w_r = argmin (1 - r) E|w (x - mean) + b - y|^2 + r w D w^T        w_r = (1 - r) ((1 - r) C + r D)^-1 c,

so that r -> 0 is least squares and r = 1 predicts the mean of the targets everywhere. This is the optimum of its loss:
there is nothing to refine. One eigendecomposition gives all r (`moments.py`), and one pass over the images all
moments (`ops/normal_equations.py`). The squared error of left-out images is a polynomial of their moments, so that the
strength is chosen by an exact cross-validation without another pass.

Legend: F folds, R strengths, B images, T tokens, d width, K channels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.ops.normal_equations import NormalEquations, apply_gram

from .moments import Moments, standardise

LEAST_SQUARES_STRENGTHS = tuple(10 ** (-6 + i / 4) for i in range(25))  # 1e-6 to 1


@dataclass
class LeastSquaresMoments(Moments):
    """Moments of one site with the targets, per fold of images.

    The "classes" of :class:`Moments` are the K channels of the target, weighted by T = U^T D y, and a last one with the
    rest of each token's weight: all columns sum to the weight, as the soft labels of classes do.

    Args:
        square: f64[F, K], sum of the squared targets.
    """

    square: Tensor

    @classmethod
    def zeros(
        cls,
        pivot: Tensor,
        folds: int,
        channels: int,
    ) -> "LeastSquaresMoments":
        """Return empty moments on the device of `pivot`."""
        sums = Moments.zeros(pivot, folds, channels + 1)
        square = torch.zeros(folds, channels, dtype=torch.float64, device=pivot.device)
        return cls(sums.pivot, sums.count, sums.first, sums.second, square)

    @torch.no_grad()
    def add_images(
        self,
        states: Tensor,
        equations: NormalEquations,
        grid: tuple[int, int],
        fold: int,
    ) -> None:
        """Add the states f[B, T, d] of images, with their normal equations, to a fold."""
        rest = equations.weight - equations.projected.sum(-1)
        labels = (
            torch.cat([equations.projected, rest[..., None]], -1)
            .flatten(0, 1)
            .to(self.count.device)
        )
        # Products in float64: those of float32 would change the weights by percents at the weakest strengths.
        x = states.to(self.pivot).double() - self.pivot
        self.count[fold] += labels.sum(0)
        self.first[fold] += labels.T @ x.flatten(0, 1)
        self.add_products(
            x.flatten(0, 1), apply_gram(equations.couplings, x, grid).flatten(0, 1), fold
        )
        self.square[fold] += equations.square.to(self.square.device)

    def sums(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return super().sums() | {"square": self.square}

    def check_values(self) -> None:
        """Raise a UserError if no pixel has a value, in the training images or in those of all folds but one."""
        for left_out in (None, *range(len(self.count))):
            if (
                not sum(pixels for fold, pixels in enumerate(self.count.sum(1)) if fold != left_out)
                > 0
            ):
                images = "the training images" + (
                    f" that are not of fold {left_out}" if left_out is not None else ""
                )
                raise UserError(
                    f"{images} have no pixel with a value; expected targets with values (`probes verify-data`)"
                )

    def squared_error(
        self,
        fold: int,
        weights: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Return the summed squared error f64[R] of probes in a fold.

        Args:
            fold: The fold.
            weights: f64[R, K, d] of x - pivot.
            bias: f64[R, K].
        """
        count, first, second = self.sum_over([fold])
        states = first.sum(0)
        quadratic = (
            ((weights @ second) * weights).sum(-1)
            + 2 * bias * (weights @ states)
            + count.sum() * bias.square()
        )
        cross = (weights * first[:-1]).sum(-1) + bias * count[:-1]
        return (quadratic - 2 * cross + self.square[fold]).sum(-1)


class LeastSquares(NamedTuple):
    """The probes of a site at every strength, and what chooses among them.

    Args:
        mean: f64[d], of the upsampled states.
        scale: f64[d], D^-1/2; 0 for constant channels.
        weights: f64[R, K, d], for x - mean.
        bias: f64[R, K], the mean of the targets.
        loss: f64[R], cross-validated squared error per pixel, summed over channels.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    loss: Tensor


def solve_least_squares(moments: LeastSquaresMoments, strengths: tuple[float, ...]) -> LeastSquares:
    """Return the probes of all folds together, with the squared error of each fold under the probes of the others.

    `moments.check_values` must have passed.
    """
    mean, scale, weights, bias = _solve(moments, None, strengths)
    loss = torch.zeros(len(strengths), dtype=torch.float64, device=mean.device)
    for fold in range(len(moments.count)):
        others, _, w, b = _solve(moments, fold, strengths)
        loss += moments.squared_error(fold, w, b - w @ (others - moments.pivot.double()))
    return LeastSquares(
        mean,
        scale,
        weights,
        bias,
        loss / moments.count.sum(),
    )


def _solve(
    moments: LeastSquaresMoments, left_out: int | None, strengths: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, scale, weights and bias of :class:`LeastSquares` for all folds but one, or for all."""
    count, first, second = moments.without(left_out)
    total = count.sum()
    states = first.sum(0)
    mean = states / total
    target = count[:-1] / total
    covariance = second / total - torch.outer(mean, mean)
    square = second.diagonal() / total + (moments.pivot.double() + mean).square()
    scale, spectrum, basis = standardise(covariance, square)
    directions = ((first[:-1] / total - target[:, None] * mean) * scale) @ basis
    strength = torch.tensor(strengths, dtype=torch.float64, device=mean.device)[:, None]
    gain = (1 - strength) / ((1 - strength) * spectrum + strength)
    weights = ((gain[:, None] * directions) @ basis.T) * scale
    return (
        moments.pivot.double() + mean,
        scale,
        weights,
        target.expand(len(strengths), -1).contiguous(),
    )
