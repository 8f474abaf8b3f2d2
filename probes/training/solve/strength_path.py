"""The strength of regularisation of one site, chosen by cross-validation on images or pixels in memory.

Each fold of images has a path of its own, from strong to weak. A fold must never start from the solution of all
images: that one has seen what the fold leaves out, and with finite tolerances weak strengths would look better than
they are. The path stops when the loss of left-out images has risen twice. The probes of all images are then solved at
the chosen strength and its two neighbours only, started from the mean over folds.

Legend: P problems solved together, F folds, R strengths, d width, K classes.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.lbfgs import MEMORY, Pair, add_penalty, minimise

from .objective import LOOSE_NODES, STRONGEST, WEAKEST, FoldProblem, half_decades

PATH_STRENGTHS = half_decades(2, WEAKEST)  # 0.1 to 1e-8
STRONGER = half_decades(STRONGEST, 1)[::-1]  # 0.3 to 1000, if 0.1 is the best of those
# predicted decrease, nats; at 2e-4, folds are 0.01 nats too good at weak strengths
PATH_TOLERANCE = 1e-5


class StrengthPath(NamedTuple):
    """The strengths of a site and their cross-validated losses.

    Args:
        strengths: From strong to weak, as far as the path went.
        loss: Cross-validated loss in nats per pixel at each strength.
        chosen: Index of the chosen strength: the lowest loss that has a stronger and a weaker neighbour.
        solved: Indices of the strengths at which the probes of all images are solved.
    """

    strengths: list[float]
    loss: list[float]
    chosen: int
    solved: list[int]


class PathSolution(NamedTuple):
    """A path of strengths on the images in memory, and the probes that it ends with.

    Args:
        path: The strengths and their cross-validated losses.
        fold_points: f64[F, K, d + 1], probes of the folds at the chosen strength.
        points: f64[R, K, d + 1], probes of all images at `path.solved`.
    """

    path: StrengthPath
    fold_points: Tensor
    points: Tensor

    @property
    def strengths(self) -> Tensor:
        """Strengths of `points`, f64[R]."""
        return self.points.new_tensor([self.path.strengths[i] for i in self.path.solved])


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
        visited = self.follow(strengths)
        losses = [loss for _, loss, _ in visited]
        chosen = losses.index(min(losses))
        solved = list(range(len(visited)))
        if strengths is None:
            chosen = min(max(chosen, 1), len(visited) - 2)
            solved = [chosen - 1, chosen, chosen + 1]
        path = StrengthPath([strength for strength, _, _ in visited], losses, chosen, solved)
        start = torch.stack([visited[i][2].mean(0) for i in solved])
        at = start.new_tensor([path.strengths[i] for i in solved])
        self._keep_first_fold(len(solved))
        points = self._minimise(at, [None] * len(solved), start)
        return PathSolution(path, visited[chosen][2], points)

    def follow(self, strengths: Sequence[float] | None) -> list[tuple[float, float, Tensor]]:
        """Return strength, loss of left-out images and points of the folds, f64[F, K, d + 1], from strong to weak."""
        start = self.problem.start.expand(self.folds, -1, -1)
        visited: list[tuple[float, float, Tensor]] = []
        last = before = start
        for strength in sorted(strengths or PATH_STRENGTHS, reverse=True):
            guess = last
            if len(visited) > 1:
                guess = 2 * last - before
            before = last
            visited.append(self._solve(strength, guess))
            last = visited[-1][2]
            losses = [loss for _, loss, _ in visited]
            has_risen_twice = len(visited) > 2 and min(losses[-2:]) > min(losses[:-2])
            if strengths is None and has_risen_twice:
                break
        stronger = STRONGER if strengths is None else ()
        for strength in stronger:
            best = min(visited, key=lambda entry: entry[1])
            strongest = max(visited, key=lambda entry: entry[0])
            if best[0] < strongest[0]:
                break
            visited.append(self._solve(strength, start))
        return sorted(visited, key=lambda entry: -entry[0])

    def _solve(self, strength: float, start: Tensor) -> tuple[float, float, Tensor]:
        r = torch.full((self.folds,), strength, dtype=torch.float64, device=start.device)
        points = self._minimise(r, list(range(self.folds)), start)
        return strength, self.problem.held_out_loss(points), points

    def _minimise(self, strengths: Tensor, left_out: Sequence[int | None], start: Tensor) -> Tensor:
        """Return the minima f64[P, K, d + 1] at strengths f64[P], starting with the pairs that are known."""
        problem = self.problem
        if self.learned_at is not None:
            added = problem.space.ridge(strengths) - problem.space.ridge(self.learned_at)
            add_penalty(self.pairs, added)
        self.learned_at = strengths
        objective = problem.objective(strengths, left_out, LOOSE_NODES)
        guess = problem.first_guess(strengths, left_out, LOOSE_NODES)
        return minimise(objective, start, guess, PATH_TOLERANCE, pairs=self.pairs).points

    def _keep_first_fold(self, count: int) -> None:
        """Keep what is known of the first fold, for `count` problems: most of the images of all are its own."""
        self.learned_at = self.learned_at[:1].expand(count)
        for _ in range(len(self.pairs)):
            pair = self.pairs.popleft()
            self.pairs.append(Pair(*(x[:1].expand(count, *x.shape[1:]) for x in pair)))
