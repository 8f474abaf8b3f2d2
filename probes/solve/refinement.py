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
from .solution import Certificate, Solution
from .strength_search import FoldSearch

# Of the probes of all images. At 5e-7, half the evaluations are enough for certificates, but mIoU moves by 0.07 points
# (46 photos of CamVid).
TOLERANCE = 1e-7
ROUNDS = 4  # of a refinement, each to a quarter of the tolerance of the one before


def solve_classes(problem: SiteProblem, strengths: Sequence[float] | None = None) -> Solution:
    """Return the probes of a site at the optimum, at the best strength and its neighbours.

    Args:
        problem: The site's states and masks.
        strengths: Strengths to solve, all of them, from strong to weak; None to search for the best one.
    """
    tried, start = FoldSearch(problem).choose(strengths)
    solved = start.new_tensor([tried.strengths[i] for i in tried.solved])
    points, certificates = refine(problem, strengths=solved, points=start)
    probes = problem.space.to_states(points)
    return Solution(
        strengths=torch.tensor(tried.strengths, dtype=torch.float64),
        loss=torch.tensor(tried.loss, dtype=torch.float64),
        chosen=torch.tensor(tried.chosen),
        solved=torch.tensor(tried.solved),
        mean=problem.space.mean,
        scale=problem.space.scale,
        weights=probes[..., :-1].float(),
        bias=probes[..., -1].float(),
        certificates=torch.tensor(certificates, dtype=torch.float64),
    )


def refine(
    problem: SiteProblem, strengths: Tensor, points: Tensor
) -> tuple[Tensor, list[Certificate]]:
    """Return the probes f64[R, K, d + 1] of all images at the optimum, and how far each may be from it.

    Args:
        problem: The site's states and masks.
        strengths: f64[R].
        points: f64[R, K, d + 1], where to start.
    """
    nothing_left_out = [None] * len(points)
    objective = problem.objective(strengths, nothing_left_out)
    _, gradient_at_zero = objective(problem.start[None], [0])
    norm_at_zero = problem.space.whitened_norm(gradient_at_zero.expand_as(points), strengths)
    norm_at_zero = norm_at_zero.clamp(min=1e-300)
    # the second one is for the norm of the gradient
    tolerance = min(TOLERANCE, (GRADIENT * norm_at_zero.min().item()) ** 2 / 8)
    minimum = None
    for _ in range(ROUNDS):
        guess = first_guess(problem, strengths=strengths, left_out=nothing_left_out, start=points)
        minimum = minimise(
            objective, points=points, first_guess=guess, tolerance=tolerance, continued_from=minimum
        )
        points = minimum.points
        norm = problem.space.whitened_norm(minimum.gradient, strengths)
        relative = (norm / norm_at_zero).tolist()
        certificates = list(map(Certificate, relative, minimum.decrease.tolist()))
        if all(certificate.converged for certificate in certificates):
            break
        tolerance /= 4  # else the next round would end where it begins
    return points, certificates
