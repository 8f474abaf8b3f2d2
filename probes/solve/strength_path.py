"""The strength of regularisation of one site, chosen by cross-validation on images or pixels in memory.

Each fold of images has a path of its own, from strong to weak. A fold must never start from the solution of all
images: that one has seen what the fold leaves out, and with finite tolerances weak strengths would look better than
they are. The path stops when the loss of left-out images rises.

The path has few nodes, which find the region. Its losses may be 0.01 nats too high, and those of neighbouring strengths
are often closer than that. So the folds are solved with many nodes where the choice is in question, and further if it
is close: the chosen strength is then a property of the data, the same in memory and by passes.

The probes of all images are solved at the chosen strength and its two neighbours only, started from the mean over
folds.

Legend: P problems solved together, F folds, R strengths, d width, K classes.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.lbfgs import MEMORY, Minimum, Pair, add_penalty, minimise

from .objective import (
    LOOSE_NODES,
    STRONGEST,
    TIGHT_NODES,
    WEAKEST,
    FoldProblem,
    half_decade,
    half_decades,
)

PATH_STRENGTHS = half_decades(2, WEAKEST)  # 0.1 to 1e-8
STRONGER = half_decades(STRONGEST, 1)[::-1]  # 0.3 to 1000, if 0.1 is the best of those
# Predicted decreases, in nats, at which the folds end: on the path, where at 2e-4 they are 0.01 nats too good at weak
# strengths, then with many nodes, and at last if a choice is close.
PATH_TOLERANCE = 1e-5
COMPARED_TOLERANCE = 1e-5
LEAST_TOLERANCE = 1e-7
# Change of the loss of left-out images for a decrease of the folds' own. Measured: 1 to 25 on CamVid and on the demo
# (folds that end at 1e-4 against the same at 1e-8), up to 50 on six images.
HELD_OUT_GAIN = 50


class StrengthPath(NamedTuple):
    """The strengths of a site and their cross-validated losses.

    Args:
        strengths: From strong to weak, as far as the path went.
        loss: Cross-validated loss in nats per pixel at each strength.
        compared: Indices of the strengths among which one was chosen; the losses of others have few nodes, or are of
            folds that have not converged.
        chosen: Index of the chosen strength: the lowest loss that has a stronger and a weaker neighbour.
        solved: Indices of the strengths at which the probes of all images are solved.
    """

    strengths: list[float]
    loss: list[float]
    compared: list[int]
    chosen: int
    solved: list[int]


class PathSolution(NamedTuple):
    """A path of strengths on the images in memory, and the probes that it ends with.

    Args:
        path: The strengths and their cross-validated losses.
        fold_points: f64[F, K, d + 1], probes of the folds at the chosen strength.
        points: f64[R, K, d + 1], probes of all images at `path.solved`; with nodes, where their refinement starts.
    """

    path: StrengthPath
    fold_points: Tensor
    points: Tensor

    @property
    def strengths(self) -> Tensor:
        """Strengths of `points`, f64[R]."""
        return self.points.new_tensor([self.path.strengths[i] for i in self.path.solved])


class FoldProbes(NamedTuple):
    """The probes of all folds at one strength.

    Args:
        strength: Of regularisation.
        loss: Mean loss of all images, each under the probe of its fold.
        points: f64[F, K, d + 1].
        decrease: The largest decrease that a further step of a fold is expected to have.
    """

    strength: float
    loss: float
    points: Tensor
    decrease: float


class FoldSearch:
    """The probes of the folds, from strong to weak strengths.

    Each strength starts from the linear extrapolation of the two before, which takes a third fewer steps than starting
    from the last one, and is closer to the minimum of each fold at equal tolerance. It also starts with what the one
    before has learned of the curvature: the penalty is all that differs.

    Args:
        problem: The site's states and masks.
    """

    def __init__(self, problem: FoldProblem):
        self.problem = problem
        self.folds = len(problem.pixels)
        self.pairs: deque[Pair] = deque(maxlen=MEMORY)
        self.learned_at: Tensor | None = None  # strengths f64[P] of the pairs

    def solve(self, strengths: Sequence[float] | None = None) -> PathSolution:
        """Return the path, and the probes of all images at the strengths that are scored.

        Args:
            strengths: Strengths to solve, all of them; None to search for the best one.
        """
        found = {folds.strength: folds for folds in self.follow(strengths)}
        compared = found
        if self.problem.has_nodes:
            compared = self._compare(found, strengths)
        found |= compared
        visited = [found[strength] for strength in sorted(found, reverse=True)]
        order = [folds.strength for folds in visited]
        lowest = min(compared, key=lambda strength: compared[strength].loss)
        chosen = order.index(lowest)
        solved = list(range(len(visited)))
        if strengths is None:
            chosen = min(max(chosen, 1), len(visited) - 2)
            solved = [chosen - 1, chosen, chosen + 1]
        path = StrengthPath(
            order,
            [folds.loss for folds in visited],
            sorted(order.index(strength) for strength in compared),
            chosen,
            solved,
        )
        points = torch.stack([self._mean_of_folds(visited[i].points) for i in solved])
        at = points.new_tensor([order[i] for i in solved])
        self._keep_one_fold(at)
        if not self.problem.has_nodes:
            points = self._minimise(at, [None] * len(solved), points, LOOSE_NODES).points
        return PathSolution(path, visited[chosen].points, points)

    def follow(self, strengths: Sequence[float] | None) -> list[FoldProbes]:
        """Return the folds with few nodes, from strong to weak."""
        start = self.problem.start.expand(self.folds, -1, -1)
        visited: list[FoldProbes] = []
        last = before = start
        for strength in sorted(strengths or PATH_STRENGTHS, reverse=True):
            guess = last
            if len(visited) > 1:
                guess = 2 * last - before
            before = last
            visited.append(self._solve_folds(strength, guess))
            last = visited[-1].points
            has_risen = len(visited) > 1 and visited[-1].loss > visited[-2].loss
            if strengths is None and has_risen:
                break
        stronger = STRONGER if strengths is None else ()
        for strength in stronger:
            best = min(visited, key=lambda folds: folds.loss)
            strongest = max(visited, key=lambda folds: folds.strength)
            if best.strength < strongest.strength:
                break
            visited.append(self._solve_folds(strength, start))
        return sorted(visited, key=lambda folds: -folds.strength)

    # ------------------------------------------------------------------------------------------------ many nodes
    def _compare(
        self, found: dict[float, FoldProbes], strengths: Sequence[float] | None
    ) -> dict[float, FoldProbes]:
        """Return the folds with many nodes at all given strengths, or at the best one and its neighbours.

        Args:
            found: The folds with few nodes by strength.
            strengths: Strengths to solve; None to search for the best one.
        """
        self.pairs.clear()  # they are of few nodes
        compared: dict[float, FoldProbes] = {}
        wanted = list(found)
        if strengths is None:
            wanted = neighbours(min(found, key=lambda strength: found[strength].loss))
        while missing := [strength for strength in wanted if strength not in compared]:
            for strength in missing:
                start = _nearest(found | compared, strength)
                compared[strength] = self._solve_folds(
                    strength,
                    start.points,
                    TIGHT_NODES,
                    COMPARED_TOLERANCE,
                )
            if strengths is None:
                wanted = neighbours(_lowest(compared).strength)
        while undecided := too_close(compared.values()):
            for folds in undecided:
                compared[folds.strength] = self._solve_folds(
                    folds.strength,
                    folds.points,
                    TIGHT_NODES,
                    max(folds.decrease / 10, LEAST_TOLERANCE),
                )
            if all(compared[folds.strength].decrease >= folds.decrease for folds in undecided):
                break  # rounding of float32 states allows no better
        return compared

    def _solve_folds(
        self,
        strength: float,
        start: Tensor,
        nodes: int = LOOSE_NODES,
        tolerance: float = PATH_TOLERANCE,
    ) -> FoldProbes:
        r = torch.full((self.folds,), strength, dtype=torch.float64, device=start.device)
        found = self._minimise(
            r,
            list(range(self.folds)),
            start,
            nodes,
            tolerance,
        )
        loss = self.problem.held_out_loss(found.points)
        return FoldProbes(strength, loss, found.points, found.decrease.max().item())

    def _minimise(
        self,
        strengths: Tensor,
        left_out: Sequence[int | None],
        start: Tensor,
        nodes: int,
        tolerance: float = PATH_TOLERANCE,
    ) -> Minimum:
        """Return the minima f64[P, K, d + 1] at strengths f64[P], starting with the pairs that are known."""
        problem = self.problem
        self._carry_pairs(strengths)
        objective = problem.objective(strengths, left_out, nodes)
        guess = problem.first_guess(
            strengths,
            left_out,
            nodes,
            start,
        )
        return minimise(objective, start, guess, tolerance, pairs=self.pairs)

    def _carry_pairs(self, strengths: Tensor) -> None:
        """Bring the pairs to the penalties of strengths f64[P]."""
        if self.learned_at is not None:
            ridge = self.problem.space.ridge
            add_penalty(self.pairs, ridge(strengths) - ridge(self.learned_at))
        self.learned_at = strengths

    def _mean_of_folds(self, points: Tensor) -> Tensor:
        """Return the mean of points f64[F, K, d + 1], of each class over the folds that know it."""
        knows = ~self.problem.lone[..., None]
        return torch.where(knows, points, 0).sum(0) / knows.sum(0)

    def _keep_one_fold(self, strengths: Tensor) -> None:
        """Keep what is known of a fold for probes of all images, most of which are its own, if it knows all classes.

        Along the weights of a class that it does not know, it has no curvature; all images have.
        """
        knows_all = (~self.problem.lone.any(1)).nonzero().flatten().tolist()
        if not knows_all:
            self.pairs.clear()
            self.learned_at = None
            return
        fold = slice(knows_all[0], knows_all[0] + 1)
        count = len(strengths)
        self.learned_at = self.learned_at[:1].expand(count)
        for _ in range(len(self.pairs)):
            pair = self.pairs.popleft()
            self.pairs.append(Pair(*(x[fold].expand(count, *x.shape[1:]) for x in pair)))
        self._carry_pairs(strengths)


def neighbours(strength: float) -> list[float]:
    """Return the strengths half a decade stronger and weaker and the strength itself, from strong to weak.

    At an end of the grid, the strength is one of the last three.
    """
    middle = min(max(half_decade(strength), STRONGEST + 1), WEAKEST - 1)
    return [*half_decades(middle - 1, middle + 1)]


def too_close(compared: Iterable[FoldProbes]) -> list[FoldProbes]:
    """Return the folds that may yet change which strength has the lowest loss, and can be solved further."""
    best = min(compared, key=lambda folds: folds.loss)
    close = [
        folds
        for folds in compared
        if folds is not best
        and folds.loss - best.loss < HELD_OUT_GAIN * (folds.decrease + best.decrease)
    ]
    if not close:
        return []
    return [folds for folds in (best, *close) if folds.decrease > LEAST_TOLERANCE]


def _lowest(compared: dict[float, FoldProbes]) -> FoldProbes:
    return min(compared.values(), key=lambda folds: folds.loss)


def _nearest(found: dict[float, FoldProbes], strength: float) -> FoldProbes:
    return min(found.values(), key=lambda folds: abs(math.log(folds.strength / strength)))
