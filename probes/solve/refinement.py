"""The probes of one site at the exact optimum, and certificates of how near they are.

Legend: R strengths, d width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.ops.lbfgs import minimise
from probes.score.strengths import GRADIENT

from .curvature import first_guess
from .objective import SiteProblem
from .path import FoldSearch
from .solution import Certificate, Solution

# Of the probes of all images. At 5e-7, half the evaluations are enough for certificates, but mIoU moves by 0.07 points
# (46 photos of CamVid).
TOLERANCE = 1e-7
ROUNDS = 4  # of a refinement, each to a quarter of the tolerance of the one before


def refine(
    problem: SiteProblem, strengths: Tensor, points: Tensor
) -> tuple[Tensor, list[Certificate]]:
    """Return the probes f64[R, K, d + 1] of all images at the optimum, and how far each may be from it.

    Args:
        problem: The site's states and masks.
        strengths: f64[R].
        points: f64[R, K, d + 1], where to start.
    """
    everything = [None] * len(points)
    objective = problem.objective(strengths, everything)
    at_zero = objective(problem.start[None], [0])[1].expand_as(points)
    null = problem.space.whitened_norm(at_zero, strengths).clamp(min=1e-300)
    # the second one is for the norm of the gradient
    tolerance = min(TOLERANCE, (GRADIENT * null.min().item()) ** 2 / 8)
    found = None
    for _ in range(ROUNDS):
        guess = first_guess(problem, strengths=strengths, left_out=everything, start=points)
        found = minimise(
            objective, points=points, first_guess=guess, tolerance=tolerance, known=found
        )
        points = found.points
        relative = problem.space.whitened_norm(found.gradient, strengths) / null
        both = zip(relative.tolist(), found.decrease.tolist(), strict=True)
        certificates = [Certificate(*numbers) for numbers in both]
        if all(certificate.converged for certificate in certificates):
            break
        tolerance /= 4  # else the next round would end where it begins
    return points, certificates


def solve_classes(problem: SiteProblem, strengths: Sequence[float] | None = None) -> Solution:
    """Return the probes of a site at the optimum, at the best strength and its neighbours.

    Args:
        problem: The site's states and masks.
        strengths: Strengths to solve, all of them, from strong to weak; None to search for the best one.
    """
    path, points = FoldSearch(problem).choose(strengths)
    at = points.new_tensor([path.strengths[i] for i in path.solved])
    points, certificates = refine(problem, at, points)
    probes = problem.space.to_states(points)
    return Solution(
        strengths=torch.tensor(path.strengths, dtype=torch.float64),
        loss=torch.tensor(path.loss, dtype=torch.float64),
        chosen=torch.tensor(path.chosen),
        solved=torch.tensor(path.solved),
        mean=problem.space.mean,
        scale=problem.space.scale,
        weights=probes[..., :-1].float(),
        bias=probes[..., -1].float(),
        certificates=torch.tensor(certificates, dtype=torch.float64),
    )
