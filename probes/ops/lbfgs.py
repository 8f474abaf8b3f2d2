"""L-BFGS for many small smooth convex objectives at the same time.

Legend: P problems solved together, K classes, n weights of a class.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 300  # at most
# pairs; 20 take a quarter more steps, 12 three times as many for few patches and weak strengths
MEMORY = 40
PAIR_DTYPE = torch.float32  # pairs shape a step; points, values and gradients are float64
HALVINGS = 10  # of a step, before rounding is blamed

# points f64[P, K, n] of the problems in a list
Objective = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]
# points and gradients f64[P, K, n] of the problems in a list: the product with about the inverse Hessian there
FirstGuess = Callable[[Tensor, Tensor, list[int]], Callable[[Tensor], Tensor]]


class Pair(NamedTuple):
    """A step that was taken, and how the gradient has changed.

    Args:
        step: f32[P, K, n].
        change: f32[P, K, n].
        inverse: f32[P], one by their product; 0 where that is not above 0, or too small for its dtype.
    """

    step: Tensor
    change: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, step: Tensor, change: Tensor) -> "Pair":
        """Return the pair of a step and a change f[P, K, n]."""
        step = step.to(PAIR_DTYPE)
        change = change.to(PAIR_DTYPE)
        product = dot(step, change)
        tiny = torch.finfo(product.dtype).tiny
        inverse = torch.where(product > tiny, 1 / product.clamp(min=tiny), 0)
        return cls(step, change, inverse)


class Minimum(NamedTuple):
    """Where :func:`minimise` has ended.

    Args:
        points: f64[P, K, n].
        value: f64[P].
        gradient: f64[P, K, n].
        decrease: f64[P], predicted decrease that is left.
    """

    points: Tensor
    value: Tensor
    gradient: Tensor
    decrease: Tensor


def minimise(
    objective: Objective,
    points: Tensor,
    first_guess: FirstGuess,
    tolerance: float,
    known: Minimum | None = None,
) -> Minimum:
    """Return the minima of P independent smooth convex objectives, by L-BFGS.

    Args:
        objective: Value and gradient of some of the problems at given points.
        points: f64[P, K, n], where to start.
        first_guess: Gives about the inverse Hessian of some of the problems at the points of each step.
        tolerance: Predicted decrease at which a problem ends.
        known: Where an earlier call has ended, if it starts there; None to evaluate the points.
    """
    active = list(range(len(points)))
    value, gradient = objective(points, active) if known is None else (known.value, known.gradient)
    pairs: deque[Pair] = deque(maxlen=MEMORY)
    decrease = torch.zeros_like(value)
    for iteration in range(ITERATIONS + 1):
        solve = first_guess(points[active], gradient[active], active)
        direction = -quasi_newton(gradient, pairs, partial(_solve_some, solve, active))
        decrease[active] = -dot(gradient, direction)[active] / 2
        active = [i for i in active if decrease[i] > tolerance]
        if not active or iteration == ITERATIONS:
            break
        step = torch.zeros_like(value)
        new = (points.clone(), value.clone(), gradient.clone())
        step[active] = 1.0
        trying = active
        for _ in range(HALVINGS):
            x = points[trying] + step[trying, None, None] * direction[trying]
            found, by_x = objective(x, trying)
            enough = found <= value[trying] - 2e-4 * step[trying] * decrease[trying]
            for old, at in zip(new, (x, found, by_x), strict=True):
                is_better = enough.view(-1, *[1] * (at.ndim - 1))
                old[trying] = torch.where(is_better, at, old[trying])
            trying = [i for i, ok in zip(trying, enough.tolist(), strict=True) if not ok]
            if not trying:
                break
            step[trying] /= 2
        step[trying] = 0.0
        pairs.append(Pair.of(step[:, None, None] * direction, new[2] - gradient))
        points, value, gradient = new
        # where no step decreases the value, it is exact to rounding
        active = [i for i in active if i not in trying]
        if not active:
            break
    return Minimum(points=points, value=value, gradient=gradient, decrease=decrease)


def quasi_newton(
    gradient: Tensor, pairs: Sequence[Pair], solve: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return about H^-1 gradient, f64[P, K, n]: the two-loop recursion of L-BFGS around `solve`.

    Source: Nocedal and Wright, algorithm 7.4, for P problems.

    Args:
        gradient: f64[P, K, n].
        pairs: From old to new.
        solve: Product with a first guess of H^-1, of f32[P, K, n].
    """
    result = gradient.to(PAIR_DTYPE, copy=True)
    factors = []
    for step, change, inverse in reversed(pairs):
        factor = inverse * dot(step, result)
        result.addcmul_(factor[:, None, None], change, value=-1)
        factors.append(factor)
    result = solve(result).to(PAIR_DTYPE)
    for (step, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        result.addcmul_((factor - inverse * dot(change, result))[:, None, None], step)
    return result.to(gradient)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the scalar products f[...] of points f[..., K, n]."""
    return torch.linalg.vecdot(x.flatten(-2), y.flatten(-2))


def _solve_some(solve: Callable[[Tensor], Tensor], problems: list[int], right: Tensor) -> Tensor:
    """Return the product of some problems of f[P, K, n], and 0 for the others."""
    product = torch.zeros_like(right)
    product[problems] = solve(right[problems]).to(right)
    return product
