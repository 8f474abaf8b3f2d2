"""The probes of one site at the exact optimum of the images in memory, and certificates of how near they are.

Legend: R strengths, d width, K classes.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.lbfgs import MEMORY, Minimum, Objective, Pair, minimise
from probes.score.strengths import CONVERGED, GRADIENT

from .moments import SiteSpace
from .objective import LOOSE_NODES, TIGHT_NODES, SiteProblem
from .strength_path import FoldSearch, StrengthPath

# Of the probes of all images. At 5e-7, half the evaluations are enough for certificates, but mIoU moves by 0.07 points
# (46 photos of CamVid).
TOLERANCE = 1e-7
# Rounds of a refinement in memory after the first, which has few nodes. Those do not describe the loss of very rough
# logits, as of a few images without regularisation: the others minimise the loss with many nodes.
TIGHT_ROUNDS = 4
ROUNDING = 1e-7  # change of a loss in nats that float32 logits do not resolve


class Certificate(NamedTuple):
    """How far a point can be from the minimum of a convex objective.

    Args:
        gradient: Norm of the gradient in whitened coordinates, relative to that at w = 0.
        decrease: Decrease in nats that a further step is expected to have.
    """

    gradient: float
    decrease: float

    @property
    def converged(self) -> bool:
        """Both are below their tolerance."""
        return self.gradient < GRADIENT and self.decrease < CONVERGED


class Evaluated(NamedTuple):
    """Points f64[..., K, d + 1] with the values f64[...] and gradients of the objective there."""

    points: Tensor
    value: Tensor
    gradient: Tensor

    def is_improved_by(self, other: "Evaluated") -> Tensor:
        """Return where the value of others is not higher, up to rounding, bool[...]."""
        return other.value <= self.value + ROUNDING

    def replace_where(self, better: Tensor, other: "Evaluated") -> "Evaluated":
        """Return the others where `better` bool[...] is True, and these elsewhere."""
        of_points = better[..., None, None]
        return Evaluated(
            torch.where(of_points, other.points, self.points),
            torch.where(better, other.value, self.value),
            torch.where(of_points, other.gradient, self.gradient),
        )


def certify(
    space: SiteSpace,
    strengths: Tensor,
    gradient: Tensor,
    null_gradient: Tensor,
    decrease: Tensor,
) -> list[Certificate]:
    """Return the certificates of R points.

    Args:
        space: Coordinates of the site.
        strengths: f64[R].
        gradient: f64[R, K, d + 1].
        null_gradient: f64[K, d + 1], at w = 0.
        decrease: f64[R], expected of another step.
    """
    null = null_norm(space, strengths, null_gradient)
    relative = space.whitened_norm(gradient, strengths) / null
    return [Certificate(*pair) for pair in zip(relative.tolist(), decrease.tolist(), strict=True)]


def null_norm(space: SiteSpace, strengths: Tensor, null_gradient: Tensor) -> Tensor:
    """Return the norms f64[R] of the gradient at w = 0, f64[K, d + 1], by which others are divided."""
    at_zero = null_gradient.expand(len(strengths), -1, -1)
    return space.whitened_norm(at_zero, strengths).clamp(min=1e-300)


class Refinement:
    """R probes of a site on their way to the optimum with many nodes.

    The first step minimises a model of the objective f about the current point w_t,

        f_S(w) + <grad f(w_t) - grad f_S(w_t), w - w_t>

    where f_S is the objective with few nodes, and f the one with many. It has the right gradient, and nearly the right
    curvature, at a sixth of the cost. If f has risen, the step is taken back. The others minimise f itself.

    Args:
        problem: The site's states and masks.
        strengths: f64[R].
        points: f64[R, K, d + 1], where to start.
        pairs: What `minimise` has learned of the curvature, with the penalties of these strengths.
    """

    def __init__(
        self,
        problem: SiteProblem,
        strengths: Tensor,
        points: Tensor,
        pairs: deque[Pair] | None = None,
    ):
        self.problem = problem
        self.strengths = strengths
        self.points = points
        self.pairs = deque(maxlen=MEMORY) if pairs is None else pairs
        unknown = torch.full_like(strengths, torch.inf)
        self.accepted = Evaluated(points, unknown, torch.zeros_like(points))
        self.certificates: list[Certificate] = []
        at_start = self._objective(LOOSE_NODES)(problem.start[None], [0])
        self.null_gradient = at_start[1][0]
        least = null_norm(problem.space, strengths, self.null_gradient).min().item()
        self.tolerance = min(TOLERANCE, (GRADIENT * least) ** 2 / 8)  # for the norm of the gradient

    @property
    def _everything(self) -> list[int]:
        return list(range(len(self.points)))

    def _objective(self, nodes: int) -> Objective:
        return self.problem.objective(self.strengths, [None] * len(self.points), nodes)

    @property
    def converged(self) -> bool:
        """All probes have a certificate."""
        return bool(self.certificates) and all(
            certificate.converged for certificate in self.certificates
        )

    def solve_in_memory(self) -> None:
        """Refine the probes to the optimum of the images in memory."""
        exact = self._objective(TIGHT_NODES)
        self.accept(*exact(self.points, self._everything))
        self._step_with_few_nodes()
        value, gradient = exact(self.points, self._everything)
        if not (value <= self.accepted.value + ROUNDING).all():
            self.pairs.clear()  # they are of a model that is wrong
        self.accept(value, gradient)
        for _ in range(TIGHT_ROUNDS):
            points, value, gradient = self.accepted
            found = self._minimise(exact, points, (value, gradient), TIGHT_NODES)
            self.points = found.points
            self.accept(found.value, found.gradient)
            self._certify(found.decrease)
            if self.converged:
                break
            if (found.decrease > self.tolerance).any():
                self.pairs.clear()  # steps along them do not lower the loss
            self.tolerance /= 4  # else the next round would end where it begins

    def accept(self, value: Tensor, gradient: Tensor) -> None:
        """Take exact values f64[R] and gradients f64[R, K, d + 1] of the objective at `points`."""
        found = Evaluated(self.points, value, gradient)
        better = self.accepted.is_improved_by(found)
        self.accepted = self.accepted.replace_where(better, found)
        self.points = self.accepted.points

    def _step_with_few_nodes(self) -> None:
        """Move the accepted points to the minima of their models."""
        points, _, gradient = self.accepted
        few = self._objective(LOOSE_NODES)
        value, of_few = few(points, self._everything)
        tilt = gradient - of_few

        def model(x: Tensor, problems: list[int]) -> tuple[Tensor, Tensor]:
            value, by_x = few(x, problems)
            apart = x - points[problems]
            return value + (tilt[problems] * apart).sum((1, 2)), by_x + tilt[problems]

        found = self._minimise(model, points, (value, gradient), LOOSE_NODES)
        self.points = found.points

    def _minimise(
        self,
        objective: Objective,
        points: Tensor,
        known: tuple[Tensor, Tensor],
        nodes: int,
    ) -> Minimum:
        """Minimise an objective of so many nodes."""
        guess = self.problem.first_guess(
            self.strengths,
            [None] * len(points),
            nodes,
            points,
        )
        return minimise(objective, points, guess, self.tolerance, pairs=self.pairs, known=known)

    def _certify(self, decrease: Tensor) -> None:
        """Set the certificates of the accepted points, from the decreases f64[R] that are expected of another step."""
        self.certificates = certify(
            self.problem.space,
            self.strengths,
            self.accepted.gradient,
            self.null_gradient,
            decrease,
        )


def solve_site(
    problem: SiteProblem, strengths: Sequence[float] | None = None
) -> tuple[StrengthPath, Refinement]:
    """Return the path of strengths of a site, and its probes at the optimum of the images in memory.

    Args:
        problem: The site's states and masks.
        strengths: Strengths to solve, all of them; None to search for the best one.
    """
    path, refinement = start_refinement(problem, strengths)
    refinement.solve_in_memory()
    return path, refinement


def start_refinement(
    problem: SiteProblem, strengths: Sequence[float] | None = None
) -> tuple[StrengthPath, Refinement]:
    """Return the path of strengths of a site, and its probes, which are to be refined."""
    search = FoldSearch(problem)
    found = search.solve(strengths)
    return found.path, Refinement(problem, found.strengths, found.points, search.pairs)
