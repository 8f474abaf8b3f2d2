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


class TriedStrengths(NamedTuple):
    """The strengths of a site that were tried, its regularisation path, and their cross-validated losses.

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
        minimum: Where the folds have ended, with points f64[F, K, d + 1].
    """

    strength: float
    loss: float
    minimum: Minimum

    @property
    def decrease(self) -> float:
        """The largest decrease that a further step of a fold is expected to have."""
        return self.minimum.decrease.max().item()


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

    def choose(self, strengths: Sequence[float] | None = None) -> tuple[TriedStrengths, Tensor]:
        """Return what was tried, and where the probes of all images start at its `solved`, f64[R, K, d + 1].

        Args:
            strengths: Strengths to solve, all of them, from strong to weak; None to search for the best one.
        """
        if strengths is None:
            self.search()
            self._decide(is_search=True)
        else:
            for strength in strengths:
                self.visit(strength)
            self._decide(is_search=False)
        order = sorted(self.visited, reverse=True)
        chosen = order.index(self.lowest)
        solved = list(range(len(order)))
        if strengths is None:
            last = len(order) - 1
            chosen = min(max(chosen, 1), last - 1)
            solved = [chosen - 1, chosen, chosen + 1]
        losses = [self.visited[strength].loss for strength in order]
        starts = []
        for index in solved:
            folds = self.visited[order[index]]
            starts.append(self._mean_of_folds(folds.minimum.points))
        tried = TriedStrengths(strengths=order, loss=losses, chosen=chosen, solved=solved)
        return tried, torch.stack(starts)

    def search(self) -> None:
        """Visit weaker strengths, then stronger ones, as far as the loss falls."""
        self.visit(half_decade(FIRST))
        for step, last in ((1, WEAKEST), (-1, STRONGEST)):
            index = FIRST
            while index != last and self.lowest == half_decade(index):
                index += step
                self.visit(half_decade(index))

    @property
    def lowest(self) -> float:
        """The strength with the lowest loss of those that were visited."""
        return min(self.visited, key=lambda strength: self.visited[strength].loss)

    def visit(self, strength: float) -> None:
        """Solve the folds at a strength, started from the solutions of the nearest ones."""
        if self.visited:
            start = self._extrapolate(strength)
            minimum = self._minimise(strength, start=start, tolerance=TOLERANCE)
        else:
            start = self.problem.start.expand(len(self.problem.folds), -1, -1)
            rough = self._minimise(strength, start=start, tolerance=ROUGH)
            minimum = self._continue(strength, minimum=rough, tolerance=TOLERANCE)
        self._keep(strength, minimum)

    def _extrapolate(self, strength: float) -> Tensor:
        """Return where the folds start at a strength, f64[F, K, d + 1], from the two nearest that were visited."""
        nearest = sorted(self.visited, key=lambda other: abs(math.log(other / strength)))
        points = self.visited[nearest[0]].minimum.points
        if len(nearest) == 1:
            return points
        is_beyond_both = (nearest[0] < strength) == (nearest[1] < nearest[0])
        if not is_beyond_both:
            return points
        before = self.visited[nearest[1]].minimum.points
        # where the bias of an unknown class ends is chance
        return torch.where(self.problem.lone[..., None], points, 2 * points - before)

    def _decide(self, is_search: bool) -> None:
        """Solve the folds further at strengths whose losses are too close, and at neighbours of the best one."""
        while True:
            missing = []
            if is_search:
                missing = [x for x in neighbours(self.lowest) if x not in self.visited]
            if missing:
                self.visit(missing[0])
                continue
            undecided = too_close(self.visited)
            for folds in undecided:
                tolerance = max(folds.decrease / 10, LEAST_TOLERANCE)
                further = self._continue(folds.strength, folds.minimum, tolerance)
                self._keep(folds.strength, further)
            # if none is better, rounding of float32 logits allows no better
            if all(self.visited[folds.strength].decrease >= folds.decrease for folds in undecided):
                return

    def _continue(self, strength: float, minimum: Minimum, tolerance: float) -> Minimum:
        return self._minimise(
            strength, start=minimum.points, tolerance=tolerance, continued_from=minimum
        )

    def _minimise(
        self,
        strength: float,
        start: Tensor,
        tolerance: float,
        continued_from: Minimum | None = None,
    ) -> Minimum:
        folds = range(len(start))
        strengths = start.new_full((len(folds),), strength)
        guess = first_guess(self.problem, strengths=strengths, left_out=folds, start=start)
        return minimise(
            self.problem.objective(strengths, left_out=folds),
            points=start,
            first_guess=guess,
            tolerance=tolerance,
            continued_from=continued_from,
        )

    def _keep(self, strength: float, minimum: Minimum) -> None:
        loss = self.problem.held_out_loss(minimum.points)
        self.visited[strength] = FoldProbes(strength, loss=loss, minimum=minimum)

    def _mean_of_folds(self, points: Tensor) -> Tensor:
        """Return the mean of points f64[F, K, d + 1], of each class over the folds that know it."""
        knows = ~self.problem.lone[..., None]
        total = torch.where(knows, points, 0).sum(0)
        return total / knows.sum(0)


def half_decade(index: int) -> float:
    """Return a strength on the grid in steps of half a decade: 1 for 0, and 0.1 for 2."""
    return 10 ** (-index / 2)


def neighbours(strength: float) -> list[float]:
    """Return the strengths half a decade stronger and weaker and the strength itself, from strong to weak.

    At an end of the grid, the strength is one of the last three.
    """
    index = round(-2 * math.log10(strength))
    middle = min(max(index, STRONGEST + 1), WEAKEST - 1)
    return [half_decade(middle + step) for step in (-1, 0, 1)]


def too_close(visited: dict[float, FoldProbes]) -> list[FoldProbes]:
    """Return the folds that may yet change which strength has the lowest loss, and can be solved further."""
    best = min(visited.values(), key=lambda folds: folds.loss)
    close = []
    for folds in visited.values():
        uncertainty = HELD_OUT_GAIN * (folds.decrease + best.decrease)
        if folds is not best and folds.loss - best.loss < uncertainty:
            close.append(folds)
    if not close:
        return []
    return [folds for folds in (best, *close) if folds.decrease > LEAST_TOLERANCE]
