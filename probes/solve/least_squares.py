"""Linear least squares of a site at every strength of regularisation, in closed form from its moments.

With C the covariance of the upsampled states over the labelled pixels, c their covariance with the target and D the
diagonal of C, the weights of strength r minimise the squared error of the pixels
plus a ridge,

    w_r = argmin (1 - r) E|w (x - mean) + b - y|^2 + r w D w^T        w_r = (1 - r) ((1 - r) C + r D)^-1 c,

so that r -> 0 is least squares and r = 1 predicts the mean of the targets everywhere. This is the optimum of its loss:
there is nothing to refine. One eigendecomposition gives all r (`space.py`). The squared error of left-out images is a
polynomial of their moments, so that the strength is chosen by an exact cross-validation.

The "classes" of the moments are the K channels of the target, weighted by T = U^T D y (`ops/normal_equations.py`), and
a last one with the rest of each token's weight: all of them sum to the weight, as the soft labels of classes do.

Legend: F folds, R strengths, B images, T tokens, d width, K channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.ops.normal_equations import NormalEquations, apply_gram

from .solution import Solution
from .space import Moments, float_chunks, moments_of, standardise

LEAST_SQUARES_STRENGTHS = tuple(10 ** (-i / 4) for i in range(25))  # 1 to 1e-6


def solve_values(
    states: Tensor,
    equations: NormalEquations,
    grid: tuple[int, int],
    fold_of: Tensor,
    strengths: Sequence[float] | None = None,
) -> Solution:
    """Return the probes of a site at all strengths, with the squared error of each fold under those of the others.

    Args:
        states: f[B, T, d], of any dtype.
        equations: Of the images.
        grid: (h, w) of the tokens.
        fold_of: i64[B], fold of each image.
        strengths: Strengths from 1 to 0; None for `LEAST_SQUARES_STRENGTHS`.
    """
    strengths = strengths or LEAST_SQUARES_STRENGTHS
    device = equations.weight.device
    pivot = states[0].to(device).double().mean(0)

    def parts(images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # Products in float64: those of float32 would change the weights by percents at the weakest strengths.
        for part, x in float_chunks(states, images=images, mean=pivot, rows=0, dtype=torch.float64):
            of_part = equations[part]
            rest = of_part.weight - of_part.projected.sum(-1)
            labels = torch.cat([of_part.projected, rest[..., None]], -1)
            weighted = apply_gram(of_part.couplings, x.unflatten(0, (len(part), -1)), grid)
            yield x, labels.flatten(0, 1), weighted.flatten(0, 1)

    folds = [(fold_of == fold).nonzero().flatten() for fold in range(int(fold_of.max()) + 1)]
    moments = [moments_of(parts(images)) for images in folds]
    loss = torch.zeros(len(strengths), dtype=torch.float64, device=device)
    for fold, images in enumerate(folds):
        others = _join(moments[:fold] + moments[fold + 1 :])
        mean, _, weights, bias = _solve(others, pivot, strengths)
        square = equations.square[images].sum(0)
        loss += _squared_error(
            moments[fold], square=square, weights=weights, bias=bias - weights @ mean
        )
    loss /= torch.stack([of_fold.count for of_fold in moments]).sum()
    mean, scale, weights, bias = _solve(_join(moments), pivot, strengths)
    return Solution(
        strengths=torch.tensor(strengths, dtype=torch.float64),
        loss=loss,
        chosen=loss.argmin(),
        solved=torch.arange(len(strengths)),
        mean=pivot + mean,
        scale=scale,
        weights=weights.float(),
        bias=bias.float(),
        certificates=torch.zeros(0, 2, dtype=torch.float64),
    )


def check_values(equations: NormalEquations, fold_of: Tensor) -> None:
    """Raise a UserError if no pixel of all folds but one has a value."""
    pixels = equations.weight.sum(1).cpu()
    for fold in range(int(fold_of.max()) + 1):
        if not pixels[fold_of != fold].sum() > 0:
            raise UserError(
                f"the training images that are not of fold {fold} have no pixel with a value; expected targets with "
                "values (`probes verify-data`)"
            )


def _join(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the images of several."""
    return Moments(*(torch.stack(x).sum(0) for x in zip(*parts, strict=True)))


def _solve(
    moments: Moments, pivot: Tensor, strengths: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the probes of some images.

    Returns:
        mean: f64[d], of the upsampled states, minus the pivot.
        scale: f64[d], D^-1/2; 0 for constant channels.
        weights: f64[R, K, d], for x - mean.
        bias: f64[R, K], the mean of the targets.
    """
    count, first, second = moments
    total = count.sum()
    mean = first.sum(0) / total
    target = count[:-1] / total
    covariance = second / total - torch.outer(mean, mean)
    square = second.diagonal() / total + (pivot + mean).square()
    scale, spectrum, basis = standardise(covariance, square)
    directions = ((first[:-1] / total - target[:, None] * mean) * scale) @ basis
    strength = torch.tensor(strengths, dtype=torch.float64, device=mean.device)[:, None]
    gain = (1 - strength) / ((1 - strength) * spectrum + strength)
    weights = ((gain[:, None] * directions) @ basis.T) * scale
    return mean, scale, weights, target.expand(len(strengths), -1).contiguous()


def _squared_error(moments: Moments, square: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Return the summed squared error f64[R] of probes in a fold.

    Args:
        moments: Of the fold.
        square: f64[K], of its targets.
        weights: f64[R, K, d], of x - pivot.
        bias: f64[R, K].
    """
    count, first, second = moments
    quadratic = (
        ((weights @ second) * weights).sum(-1)
        + 2 * bias * (weights @ first.sum(0))
        + count.sum() * bias.square()
    )
    cross = (weights * first[:-1]).sum(-1) + bias * count[:-1]
    return (quadratic - 2 * cross + square).sum(-1)
