"""The strength of regularisation of one site, chosen by cross-validation.

The probes of all folds are solved at one strength, then at weaker ones for as long as the loss of left-out images
falls, then at stronger ones likewise. A fold must never start from the solution of all images: that one has seen what
the fold leaves out, and with finite tolerances weak strengths would look better than they are. Where the choice is
close, folds are solved further: the chosen strength is a property of the data.

The probes of all images are solved at the chosen strength and its two neighbours only, started from the mean over
folds.

Legend: P problems solved together, F folds, R strengths, d width, K classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.lbfgs import Minimum, minimise

from .curvature import first_guess
from .objective import SiteProblem

# the strongest and the weakest regularisation that is tried, in half decades: 1000 and 1e-8
STRONGEST = -6
WEAKEST = 16
FIRST = 2  # 0.1
# Predicted decreases, in nats, at which the folds end: before the first sample of nodes of which a probe is unsure, at
# each strength, and at last if the choice is close
ROUGH = 1e-2
TOLERANCE = 3e-5
LEAST_TOLERANCE = 1e-7
# Change of the loss of left-out images for a decrease of the folds' own. Measured: 1 to 25 on CamVid and on the demo
# (folds that end at 1e-4 against the same at 1e-8), up to 50 on six images.
HELD_OUT_GAIN = 50


class StrengthPath(NamedTuple):
    """The strengths of a site and their cross-validated losses.

    Args:
        strengths: From strong to weak.
        loss: Cross-validated loss in nats per pixel at each strength.
        chosen: Index of the chosen strength: the lowest loss that has a stronger and a weaker neighbour.
        solved: Indices of the strengths at which the probes of all images are solved.
    """

    strengths: list[float]
    loss: list[float]
    chosen: int
    solved: list[int]


class FoldProbes(NamedTuple):
    """The probes of all folds at one strength.

    Args:
        strength: Of regularisation.
        loss: Mean loss of all images, each under the probe of its fold.
        found: Where the folds have ended, with points f64[F, K, d + 1].
    """

    strength: float
    loss: float
    found: Minimum

    @property
    def decrease(self) -> float:
        """The largest decrease that a further step of a fold is expected to have."""
        return self.found.decrease.max().item()


class FoldSearch:
    """The probes of the folds at the strengths that were visited.

    A strength starts from the linear extrapolation of the two before it, which takes a third fewer steps than starting
    from the last one, and is closer to the minimum of each fold at equal tolerance.

    Args:
        problem: The site's states and masks.
    """

    def __init__(self, problem: SiteProblem):
        self.problem = problem
        self.visited: dict[float, FoldProbes] = {}

    def choose(self, strengths: Sequence[float] | None = None) -> tuple[StrengthPath, Tensor]:
        """Return the path, and where the probes of all images start at `path.solved`, f64[R, K, d + 1].

        Args:
            strengths: Strengths to solve, all of them, from strong to weak; None to search for the best one.
        """
        for strength in strengths or ():
            self.visit(strength)
        if strengths is None:
            self.search()
        self._decide(is_search=strengths is None)
        order = sorted(self.visited, reverse=True)
        chosen = order.index(self.lowest)
        solved = list(range(len(order)))
        if strengths is None:
            chosen = min(max(chosen, 1), len(order) - 2)
            solved = [chosen - 1, chosen, chosen + 1]
        losses = [self.visited[strength].loss for strength in order]
        points = [self._mean_of_folds(self.visited[order[i]].found.points) for i in solved]
        return StrengthPath(
            strengths=order, loss=losses, chosen=chosen, solved=solved
        ), torch.stack(points)

    @property
    def lowest(self) -> float:
        """The strength with the lowest loss of those that were visited."""
        return min(self.visited, key=lambda strength: self.visited[strength].loss)

    def search(self) -> None:
        """Visit weaker strengths, then stronger ones, as far as the loss falls."""
        self.visit(half_decade(FIRST))
        for step, last in ((1, WEAKEST), (-1, STRONGEST)):
            at = FIRST
            while at != last and self.lowest == half_decade(at):
                at += step
                self.visit(half_decade(at))

    def visit(self, strength: float) -> None:
        """Solve the folds at a strength, started from what is known of the nearest ones."""
        near = sorted(self.visited, key=lambda other: abs(math.log(other / strength)))
        if not near:
            start = self.problem.start.expand(len(self.problem.folds), -1, -1)
            rough = self._minimise(strength, start, ROUGH)
            found = self._minimise(strength, start=rough.points, tolerance=TOLERANCE, known=rough)
            self._keep(strength, found)
            return
        points = [self.visited[other].found.points for other in near[:2]]
        start = points[0]
        if len(near) > 1 and (near[0] < strength) == (near[1] < near[0]):
            # beyond both; but where the bias of an unknown class ends is chance
            start = torch.where(self.problem.lone[..., None], start, 2 * start - points[1])
        self._keep(strength, self._minimise(strength, start, TOLERANCE))

    def _decide(self, is_search: bool) -> None:
        """Solve the folds further at strengths whose losses are too close, and at neighbours of the best one."""
        while True:
            wanted = neighbours(self.lowest) if is_search else []
            if missing := [strength for strength in wanted if strength not in self.visited]:
                self.visit(missing[0])
                continue
            undecided = too_close(self.visited)
            for folds in undecided:
                tolerance = max(folds.decrease / 10, LEAST_TOLERANCE)
                further = self._minimise(
                    folds.strength, start=folds.found.points, tolerance=tolerance, known=folds.found
                )
                self._keep(folds.strength, further)
            # if none is better, rounding of float32 logits allows no better
            if all(self.visited[x.strength].decrease >= x.decrease for x in undecided):
                return

    def _minimise(
        self, strength: float, start: Tensor, tolerance: float, known: Minimum | None = None
    ) -> Minimum:
        left_out = range(len(start))
        strengths = start.new_full((len(left_out),), strength)
        return minimise(
            self.problem.objective(strengths, left_out),
            points=start,
            first_guess=first_guess(
                self.problem, strengths=strengths, left_out=left_out, start=start
            ),
            tolerance=tolerance,
            known=known,
        )

    def _keep(self, strength: float, found: Minimum) -> None:
        loss = self.problem.held_out_loss(found.points)
        self.visited[strength] = FoldProbes(strength, loss, found)

    def _mean_of_folds(self, points: Tensor) -> Tensor:
        """Return the mean of points f64[F, K, d + 1], of each class over the folds that know it."""
        knows = ~self.problem.lone[..., None]
        return torch.where(knows, points, 0).sum(0) / knows.sum(0)


def half_decade(index: int) -> float:
    """Return a strength on the grid in steps of half a decade: 1 for 0, and 0.1 for 2."""
    return 10 ** (-index / 2)


def neighbours(strength: float) -> list[float]:
    """Return the strengths half a decade stronger and weaker and the strength itself, from strong to weak.

    At an end of the grid, the strength is one of the last three.
    """
    middle = min(max(round(-2 * math.log10(strength)), STRONGEST + 1), WEAKEST - 1)
    return [half_decade(middle + step) for step in (-1, 0, 1)]


def too_close(visited: dict[float, FoldProbes]) -> list[FoldProbes]:
    """Return the folds that may yet change which strength has the lowest loss, and can be solved further."""
    best = min(visited.values(), key=lambda folds: folds.loss)
    close = [
        folds
        for folds in visited.values()
        if folds is not best
        and folds.loss - best.loss < HELD_OUT_GAIN * (folds.decrease + best.decrease)
    ]
    return [folds for folds in (best, *close) if close and folds.decrease > LEAST_TOLERANCE]
