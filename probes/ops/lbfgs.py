"""L-BFGS for many small smooth convex objectives at the same time.

Legend: P problems solved together, K classes, n weights of a class.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 300  # at most
# pairs; 20 take a quarter more steps, 12 three times as many for few patches and weak strengths
MEMORY = 40
HALVINGS = 10  # of a step, before rounding is blamed

# points f64[P, K, n] of the problems in a list
Objective = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]


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
    scale: Tensor,
    tolerance: float,
    pairs: deque | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> Minimum:
    """Return the minima of P independent smooth convex objectives, by L-BFGS with steps in units of `scale`.

    Args:
        objective: Value and gradient of some of the problems at given points.
        points: f64[P, K, n], where to start.
        scale: f64[P, K, n], about the inverse square root of the curvature.
        tolerance: Predicted decrease at which a problem ends.
        pairs: What an earlier call has learned of nearly the same curvature in the same units; steps are added to it.
        known: Value f64[P] and gradient f64[P, K, n] at `points`; None to evaluate them.
    """
    shape = points.shape
    points = points.flatten(1)
    scale = scale.flatten(1)

    def evaluate(x, problems):
        found = objective(x.view(-1, *shape[1:]), problems)
        return tuple(y if y.ndim == 1 else y.flatten(1) for y in found)

    if known is None:
        value, gradient = evaluate(points, list(range(len(points))))
    else:
        value = known[0]
        gradient = known[1].flatten(1)
    pairs = deque(maxlen=MEMORY) if pairs is None else pairs
    # no step decreases the value: it is exact to rounding
    blocked = torch.zeros_like(value, dtype=torch.bool)
    for iteration in range(ITERATIONS + 1):
        scaled = gradient * scale
        direction = -_times_inverse_hessian(scaled, pairs)
        decrease = -(scaled * direction).sum(1) / 2
        active = ((decrease > tolerance) & ~blocked).nonzero().flatten().tolist()
        if not active or iteration == ITERATIONS:
            break
        step = value.new_zeros(len(value))
        new = (points.clone(), value.clone(), gradient.clone())
        step[active] = 1.0
        trying = active
        for _ in range(HALVINGS):
            x = points[trying] + (step[trying, None] * direction[trying]) * scale[trying]
            found, by_x = evaluate(x, trying)
            enough = found <= value[trying] - 2e-4 * step[trying] * decrease[trying]
            for old, at in zip(new, (x, found, by_x), strict=True):
                is_better = enough.view(-1, *[1] * (at.ndim - 1))
                old[trying] = torch.where(is_better, at, old[trying])
            trying = [i for i, ok in zip(trying, enough.tolist(), strict=True) if not ok]
            if not trying:
                break
            step[trying] /= 2
        step[trying] = 0.0
        blocked[trying] = True
        s = step[:, None] * direction
        y = (new[2] - gradient) * scale
        points, value, gradient = new
        pairs.append(_pair(s, y))
    return Minimum(points.view(shape), value, gradient.view(shape), decrease)


def change_units(
    pairs: deque,
    before: Tensor,
    after: Tensor,
    added: Tensor,
) -> None:
    """Bring pairs into the units of a later call of :func:`minimise`, whose objectives have another penalty.

    Args:
        pairs: Of P problems.
        before: f64[P, K, n], `scale` of the call that has made the pairs.
        after: f64[P, K, n], `scale` of the call that takes them.
        added: f64[P, 1, n], a: the new objectives are the old ones + a/2 x^2, with a below 0 where a penalty is weaker.
    """
    ratio = (before / after).flatten(1)
    curvature = (added * before * after).flatten(1)
    for _ in range(len(pairs)):  # one at a time: all of them twice may be gigabytes
        s, y, *_ = pairs.popleft()
        pairs.append(_pair(s * ratio, y / ratio + curvature * s))


def _pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a step, the change of the gradient, both f64[P, n], and the factors of the recursion; 0 where s y <= 0."""
    curvature = (s * y).sum(1)
    rho = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-300), 0)
    stretched = (rho * y.square().sum(1)).clamp(min=1e-300)
    size = torch.where(rho > 0, 1 / stretched, 0)
    return s, y, rho, size


def _times_inverse_hessian(gradient: Tensor, pairs: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return H^-1 g of L-BFGS f64[P, n]: the two-loop recursion (Nocedal and Wright, algorithm 7.4) for P problems."""
    q = gradient.clone()
    alphas = []
    size = torch.ones_like(gradient[:, 0])
    for *_, of_step in pairs:  # the last step of each problem sets the size of the first guess
        size = torch.where(of_step > 0, of_step, size)
    for s, y, rho, _ in reversed(pairs):
        alphas.append(rho * (s * q).sum(1))
        q -= alphas[-1][:, None] * y
    q *= size[:, None]
    for (s, y, rho, _), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - rho * (y * q).sum(1))[:, None] * s
    return q
