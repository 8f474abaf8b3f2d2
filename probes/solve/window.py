"""Which strengths have probes between passes, and when the choice among them is settled.

The strength is chosen among a few neighbouring ones, a *window*. The sample alone would choose too strong a
regularisation, as few tokens need more of it. So the window begins where the sample chooses and moves with the
cross-validated loss of all images.

To stop early regularises: probes of weak strengths that have not converged look better than they are. What they may
still gain, the decreases that are *left*, decides what their losses are worth.

Legend: W strengths in the window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from probes.score.strengths import CONVERGED

from .objective import STRONGEST, WEAKEST, half_decade, half_decades
from .strength_path import HELD_OUT_GAIN, StrengthPath

# The window follows probes with at most this decrease left, in nats, or to strengths that are better by more
LEAVE = 100 * CONVERGED
# Decrease of the folds, in nats, that is enough to choose between strengths whose losses are very close. Another pass
# would be needed for each factor of about five.
CLOSE = 3e-6
WIDTH = 2  # half decades on both sides of the best strength


@dataclass
class Window:
    """The strengths of a site.

    Args:
        strengths: W strengths, from strong to weak.
        given: Strengths to solve; None to search for the best one.
        best: The one that was chosen after the last pass.
        losses: Cross-validated, by strength; one that has just entered the window has none until the next pass.
        settled: The choice is final: the window has the chosen strength and its neighbours, or all given ones.
    """

    strengths: list[float]
    given: Sequence[float] | None
    best: float
    losses: dict[float, float] = field(default_factory=dict)
    settled: bool = False

    @property
    def chosen(self) -> int:
        """Row of the chosen strength."""
        row = min(range(len(self.strengths)), key=lambda i: self._loss_of(self.strengths[i]))
        if self.given is not None or len(self.strengths) == 1:
            return row
        return min(max(row, 1), len(self.strengths) - 2)

    @property
    def solved(self) -> list[int]:
        """Rows whose probes are scored: all given strengths, or the chosen one and its neighbours.

        A window of one strength, as after two passes, has no neighbours.
        """
        if self.given is not None or len(self.strengths) == 1:
            return list(range(len(self.strengths)))
        return [self.chosen - 1, self.chosen, self.chosen + 1]

    def path(self) -> StrengthPath:
        """Return the strengths whose losses are known, and which of them are compared, chosen and scored."""
        order = sorted(self.losses, reverse=True)
        compared = [strength for strength in self.strengths if strength in self.losses]
        return StrengthPath(
            order,
            [self.losses[strength] for strength in order],
            [order.index(strength) for strength in compared],
            order.index(self.strengths[self.chosen]),
            [order.index(self.strengths[row]) for row in self.solved],
        )

    def move(self, left: list[float]) -> list[int]:
        """Bring strengths into the window and remove others; return the row where each had its nearest neighbour.

        Args:
            left: Decrease of the probes of each strength that is left, in nats.
        """
        before = self.strengths
        self.strengths = self.next_strengths(left)
        for strength, of_strength in zip(before, left, strict=True):
            # probes that have stopped too early leave no loss
            if strength not in self.strengths and of_strength > LEAVE:
                del self.losses[strength]

        def distance(row: int, strength: float) -> int:
            return abs(half_decade(before[row]) - half_decade(strength))

        rows = range(len(before))
        return [min(rows, key=lambda row, s=s: distance(row, s)) for s in self.strengths]

    def next_strengths(self, left: list[float]) -> list[float]:
        """Return the strengths that the window should have, from strong to weak; `left` as of :meth:`move`."""
        if self.given is not None:
            return sorted(self.given, reverse=True)
        index = [half_decade(strength) for strength in self.strengths]
        row = min(range(len(index)), key=lambda i: self.losses[self.strengths[i]])
        best = index[row]
        if len(index) > 1:
            is_inside = min(index) < best < max(index)
            # probes that stopped early may be better than at their optimum: no reason to leave the window
            is_behind = left[row] > LEAVE
            if is_inside or (is_behind and not self._all_too_weak(row)):
                return self.strengths
        # a sample asks for more regularisation than all images
        first = best if len(index) == 1 else best - WIDTH
        first = min(max(first, STRONGEST), WEAKEST - 2 * WIDTH)
        return [*half_decades(first, first + 2 * WIDTH)]

    def _all_too_weak(self, row: int) -> bool:
        """Return whether the best strength, in `row`, is the strongest, though its probes may have stopped too early.

        That makes weak strengths better than they are, and more so than strong ones. Probes that have just entered the
        window are alike, so that their order says nothing.
        """
        if row > 0:
            return False
        strongest, second = (self.losses[strength] for strength in self.strengths[:2])
        return strongest < second - LEAVE

    def settle(self, left: list[float], certified: bool) -> list[int] | None:
        """Choose a strength; return the rows that stay if the choice is settled now, else None.

        It is when two passes choose the same strength and its neighbours cannot become better.

        Args:
            left: As of :meth:`move`.
            certified: The probes of all images at the strengths that are scored have converged.
        """
        chosen = self.strengths[self.chosen]
        before = self.best
        self.best = chosen
        lowest = min(self.strengths, key=self._loss_of)
        at_end = half_decade(lowest) in (STRONGEST, WEAKEST)
        if self.settled or chosen != before or not (chosen == lowest or at_end):
            return None
        rows = self.solved
        if not all(self.strengths[row] in self.losses for row in rows):
            return None
        if not all(left[row] < self._allowed(row) for row in rows):
            return None
        # strengths that are given are all reported: their folds go on as long as any of their probes does
        if self.given is not None and not certified:
            return None
        self.settled = True
        self.strengths = [self.strengths[row] for row in rows]
        return rows

    def _allowed(self, row: int) -> float:
        """Return the decrease, in nats, below which the choice of the strength does not wait for its probes.

        What left-out images may gain by it must not make up for what a strength is behind the best one, or the best
        one ahead of the next, unless the two are too close for any pass to tell.
        """
        if self.given is not None or len(self.strengths) == 1:
            return CONVERGED
        best, *others = sorted(self._loss_of(strength) for strength in self.strengths)
        own = self._loss_of(self.strengths[row])
        apart = own - best if own > best else others[0] - best
        return max(CLOSE, apart / (2 * HELD_OUT_GAIN))

    def _loss_of(self, strength: float) -> float:
        return self.losses.get(strength, math.inf)
