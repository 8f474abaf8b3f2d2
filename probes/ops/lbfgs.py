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
    continued_from: Minimum | None = None,
) -> Minimum:
    """Return the minima of P independent smooth convex objectives, by L-BFGS.

    Args:
        objective: Value and gradient of some of the problems at given points.
        points: f64[P, K, n], where to start.
        first_guess: Gives about the inverse Hessian of some of the problems at the points of each step.
        tolerance: Predicted decrease at which a problem ends.
        continued_from: Where an earlier call has ended, if it starts there; None to evaluate the points.
    """
    active = list(range(len(points)))
    if continued_from is None:
        value, gradient = objective(points, active)
    else:
        value = continued_from.value
        gradient = continued_from.gradient
    pairs: deque[Pair] = deque(maxlen=MEMORY)
    decrease = torch.zeros_like(value)
    for iteration in range(ITERATIONS + 1):
        solve = first_guess(points[active], gradient[active], active)
        solve_active = partial(_solve_some, solve, active)
        direction = -quasi_newton(gradient, pairs=pairs, solve=solve_active)
        decrease[active] = -dot(gradient, direction)[active] / 2
        active = [i for i in active if decrease[i] > tolerance]
        if not active or iteration == ITERATIONS:
            break
        at = Evaluation(points, value=value, gradient=gradient)
        better, step, stuck = line_search(
            objective, at=at, direction=direction, decrease=decrease, active=active
        )
        taken = step[:, None, None] * direction
        pairs.append(Pair.of(taken, better.gradient - gradient))
        points, value, gradient = better
        # where no step decreases the value, it is exact to rounding
        active = [i for i in active if i not in stuck]
        if not active:
            break
    return Minimum(points=points, value=value, gradient=gradient, decrease=decrease)


class Evaluation(NamedTuple):
    """The objectives at some points.

    Args:
        points: f64[P, K, n].
        value: f64[P].
        gradient: f64[P, K, n].
    """

    points: Tensor
    value: Tensor
    gradient: Tensor


def line_search(
    objective: Objective, at: Evaluation, direction: Tensor, decrease: Tensor, active: list[int]
) -> tuple[Evaluation, Tensor, list[int]]:
    """Return where a step leads that decreases the values, its share f64[P] of the direction, and problems without one.

    A step is halved until the value falls by a small share of what is predicted.

    Args:
        objective: As of :func:`minimise`.
        at: Where it starts.
        direction: f64[P, K, n].
        decrease: f64[P], predicted for the direction.
        active: The problems that take a step.
    """
    better = Evaluation(*(tensor.clone() for tensor in at))
    step = torch.zeros_like(at.value)
    step[active] = 1.0
    trying = active
    for _ in range(HALVINGS):
        points = at.points[trying] + step[trying, None, None] * direction[trying]
        value, gradient = objective(points, trying)
        tried = Evaluation(points, value=value, gradient=gradient)
        is_enough = value <= at.value[trying] - 2e-4 * step[trying] * decrease[trying]
        for kept, new in zip(better, tried, strict=True):
            is_taken = is_enough.view(-1, *[1] * (new.ndim - 1))
            kept[trying] = torch.where(is_taken, new, kept[trying])
        trying = [i for i, ok in zip(trying, is_enough.tolist(), strict=True) if not ok]
        if not trying:
            break
        step[trying] /= 2
    step[trying] = 0.0
    return better, step, trying


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
        correction = factor - inverse * dot(change, result)
        result.addcmul_(correction[:, None, None], step)
    return result.to(gradient)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the scalar products f[...] of points f[..., K, n]."""
    return torch.linalg.vecdot(x.flatten(-2), y.flatten(-2))


def _solve_some(solve: Callable[[Tensor], Tensor], problems: list[int], right: Tensor) -> Tensor:
    """Return the product of some problems of f[P, K, n], and 0 for the others."""
    product = torch.zeros_like(right)
    product[problems] = solve(right[problems]).to(right)
    return product
