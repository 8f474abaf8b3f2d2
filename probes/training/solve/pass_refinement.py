"""Linear probes of one site at the minimum of the paper's loss if the states of all images do not fit into memory.

A pass over all images gives, exactly, the value and the gradient of the objective of `objective.py` at any number of
points (`pass_sums.py`), and the loss of the images that a fold leaves out. Between two passes each point takes one
quasi-Newton step (`sample_hessian.py`), with another sample of pixels after each pass: what one sample misses, the
next ones have. A point whose value has risen is taken back: its pair shortens the next step, which is also damped.
A point that was meant for one strength is taken for another one whose value it lowers more.

The strength is chosen among a few neighbouring ones, a *window*, each with a probe for every fold and one of all
images. The sample alone would choose too strong a regularisation, as few tokens need more of it. So the window
begins where the sample chooses and moves with the cross-validated loss of all images. A strength that enters it
starts at the point of its neighbour, where value, gradient and pairs are known: the penalty is all that differs.

Legend: W strengths in the window, F folds, G = F + 1 probes of a strength, or 1 when the strength is settled;
K classes, d width.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probes.ops.lbfgs import Pair, dot, quasi_newton
from probes.tasks.losses import Loss

from .moments import SiteSpace, full_precision
from .objective import STRONGEST, WEAKEST, half_decade, half_decades
from .refinement import CONVERGED, ROUNDING, Certificate
from .sample_hessian import LEAST_DAMPING, SampledPixels, SampleHessian, first_damping
from .strength_path import HELD_OUT_GAIN

SAVED = {  # attributes by their names in the file of a killed run
    "null": "null_gradient",
    "points": "points",
    "value": "value",
    "gradient": "gradient",
    "kept": "accepted_points",
    "decrease": "decrease",
    "held_out": "held_out",
    "damping": "damping",
}
RESIDUAL = 0.03  # of a step: a pass costs more than conjugate gradients
PAIRS = 4  # steps that are remembered, in float32
# A step multiplies the damping of the next one by what it has gained, as a part of the decrease that the sample has
# promised: below 0 (it is taken back), 1/4, 3/4, and more. Source: Nocedal and Wright, algorithm 4.1
GAINS = (0.0, 0.25, 0.75)
DAMPING_FACTORS = (10.0, 3.0, 1.0, 1 / 3)
# The window follows probes with at most this decrease left, in nats, or to strengths that are better by more
LEAVE = 100 * CONVERGED
# Decrease of the folds, in nats, that is enough to choose between strengths whose losses are very close. Another pass
# would be needed for each factor of about five.
CLOSE = 3e-6
WINDOW = 2  # half decades on both sides of the best strength


class PassRefinement:
    """The probes of a site between passes.

    Args:
        loss: Of the logits.
        space: Coordinates of the site, from all images.
        null_gradient: f64[K, d + 1], gradient at w = 0, from all images.
        strength: Strength that the sample has chosen.
        points: f64[G, K, d + 1], probes of that strength: of the folds, then of all images.
        given: Strengths to solve; None to search for the best one.
    """

    def __init__(
        self,
        loss: Loss,
        space: SiteSpace,
        null_gradient: Tensor,
        strength: float,
        points: Tensor,
        given: tuple[float, ...] | None,
    ):
        self.loss = loss
        self.space = space
        self.null_gradient = null_gradient
        self.given = given
        self.folds = len(points) - 1
        self.strengths = [strength]
        self.points = points[None]
        self.value = points.new_full((1, len(points)), torch.inf)
        self.gradient = torch.zeros_like(self.points)
        self.accepted_points = self.points
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.damping = torch.zeros_like(self.value)  # until the first sample
        self.held_out = points.new_zeros(1, self.folds)
        # cross-validated, by strength; one that has just entered the window has none until the next pass
        self.losses: dict[float, float] = {}
        self.best = strength
        self.decrease = torch.full_like(self.value, torch.inf)
        self.settled = False

    # ------------------------------------------------------------------------------------------------ a pass
    @property
    def left_out(self) -> list[int | None]:
        """The fold that each of the G probes leaves out."""
        return [None] if self.settled else [*range(self.folds), None]

    def probes(self) -> tuple[Tensor, Tensor, list[int | None], int]:
        """Return the arguments of :class:`PassSums` after the loss."""
        weights = self.space.to_states(self.points[..., :-1])
        return (
            self.space.mean,
            torch.cat([weights, self.points[..., -1:]], -1),
            self.left_out,
            self.folds,
        )

    def accept_losses(self, value: Tensor, gradient: Tensor, held_out: Tensor) -> None:
        """Take what a pass has found at `points`, without penalties.

        Args:
            value: f64[W, G], mean loss.
            gradient: f64[W, G, K, d + 1].
            held_out: f64[W, F], part of each fold in the cross-validated loss; ignored when the strength is settled.
        """
        ridge = self._ridge()
        penalty = dot(ridge * self.points, self.points) / 2
        if self.value.isfinite().all():
            self._adapt_damping(value + penalty)
            self._remember_pair(gradient + ridge * self.points, value.isfinite())
        value, source = self._best_measured(value, penalty)
        probe = torch.arange(value.shape[1], device=value.device)
        points = self.points[source, probe]
        gradient = gradient[source, probe] + ridge * points
        better = value <= self.value + ROUNDING
        self.value = torch.where(better, value, self.value)
        self.accepted_points = torch.where(better[..., None, None], points, self.accepted_points)
        self.gradient = torch.where(better[..., None, None], gradient, self.gradient)
        if not self.settled:  # of the points that are kept, too
            held_out = held_out[source[:, :-1], probe[:-1]]
            self.held_out = torch.where(better[:, :-1], held_out, self.held_out)
            self.losses |= dict(zip(self.strengths, self.held_out.sum(1).tolist(), strict=True))

    def _adapt_damping(self, value: Tensor) -> None:
        """Damp the next step more or less, by what the last one has gained; `value` f64[W, G] is where it has led."""
        gain = (self.value - value + ROUNDING) / (self.decrease + ROUNDING)
        gain = gain.nan_to_num(nan=-1.0)
        factors = value.new_tensor(DAMPING_FACTORS)
        factor = factors[torch.bucketize(gain, value.new_tensor(GAINS), right=True)]
        self.damping = (self.damping * factor).clamp(min=LEAST_DAMPING)

    def _remember_pair(self, gradient: Tensor, usable: Tensor) -> None:
        """Remember the last steps and the changes of the gradient f64[W, G, K, d + 1], but where `usable` is False."""
        usable = usable[..., None, None]
        step = torch.where(usable, self.points - self.accepted_points, 0).float()
        change = torch.where(usable, gradient - self.gradient, 0).float()
        self.pairs = [*self.pairs, (step, change)][-PAIRS:]

    def _best_measured(self, value: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest value f64[W, G] of each probe over the points of all strengths, and whose point it is.

        Args:
            value: f64[W, G], mean loss at `points`, without penalties.
            penalty: f64[W, G], that of each point at its own strength, to which penalties are proportional.
        """
        strengths = value.new_tensor(self.strengths)
        ratio = strengths[:, None] / strengths
        lowest = (value + ratio[..., None] * penalty).nan_to_num(nan=torch.inf).min(1)
        return lowest.values, lowest.indices

    @full_precision()
    def step(self, sample: SampledPixels, is_last: bool = False) -> None:
        """Choose the window, and move its probes; :meth:`accept_losses` must have been called.

        Args:
            sample: Pixels that give the curvature.
            is_last: No pass follows, which would measure strengths that enter the window: it stays.
        """
        if self.converged:  # steps below the resolution of float32 would only be noise
            self.points = self.accepted_points
            return
        if not (self.settled or is_last):
            self._move_window()
        self._start_damping(sample)
        self.points = self.accepted_points.clone()
        self.decrease = torch.zeros_like(self.value)
        for row, ridge in enumerate(self._ridge()):
            hessian = SampleHessian(
                self.loss,
                sample,
                self.accepted_points[row],
                self.gradient[row],
                self.left_out,
                ridge[0],
                self.space.input_spectrum,
                self.damping[row],
            )
            solve = partial(hessian.solve, residual=RESIDUAL)
            direction = quasi_newton(self.gradient[row], self._pairs_near(row), solve)
            self.decrease[row] = dot(direction, self.gradient[row]) / 2
            self.points[row] -= direction
        self._settle()

    def _start_damping(self, sample: SampledPixels) -> None:
        """Set the damping of the first step."""
        if not self.damping.any():
            weights = self.points[0, 0].numel()
            self.damping += first_damping(weights, len(sample.weights))

    def _pairs_near(self, row: int) -> list[Pair]:
        """Return the pairs f32[G, K, d + 1] of a strength and its neighbours, from old to new, its own after theirs.

        The curvature of a neighbour differs by the penalty, and little by where its point is.
        """
        ridge = self._ridge()
        rows = [other for other in (row - 1, row + 1) if 0 <= other < len(ridge)] + [row]
        return [
            Pair.of(
                step[other], (change[other] + (ridge[row] - ridge[other]) * step[other]).float()
            )
            for step, change in self.pairs
            for other in rows
        ]

    # ------------------------------------------------------------------------------------------------ strengths
    def _ridge(self) -> Tensor:
        """Return the weights f64[W, 1, 1, d + 1] of the squares of a point; 0 for biases."""
        return self.space.ridge(self.points.new_tensor(self.strengths))[:, None]

    def _window(self) -> list[float]:
        """Return the strengths that the window should have, from strong to weak."""
        if self.given is not None:
            return sorted(self.given, reverse=True)
        index = [half_decade(strength) for strength in self.strengths]
        row = min(range(len(index)), key=lambda i: self.losses[self.strengths[i]])
        best = index[row]
        if len(index) > 1:
            is_inside = min(index) < best < max(index)
            # probes that stopped early may be better than at their optimum: no reason to leave the window
            is_behind = self.decrease[row].max() > LEAVE
            if is_inside or (is_behind and not self._all_too_weak(row)):
                return self.strengths
        # a sample asks for more regularisation than all images
        first = best if len(index) == 1 else best - WINDOW
        first = min(max(first, STRONGEST), WEAKEST - 2 * WINDOW)
        return [*half_decades(first, first + 2 * WINDOW)]

    def _all_too_weak(self, row: int) -> bool:
        """Return whether the best strength, in `row`, is the strongest, though its probes may have stopped too early.

        That makes weak strengths better than they are, and more so than strong ones: to stop early regularises. Probes
        that have just entered the window are alike, so that their order says nothing.
        """
        if row > 0:
            return False
        strongest, second = (self.losses[strength] for strength in self.strengths[:2])
        return strongest < second - LEAVE

    def _move_window(self) -> None:
        """Bring strengths into the window, each from its nearest neighbour, and remove others."""
        window = self._window()
        self._forget_losses(window)

        def distance(old, new):
            return abs(half_decade(self.strengths[old]) - half_decade(new))

        source = [
            min(range(len(self.strengths)), key=lambda old, new=new: distance(old, new))
            for new in window
        ]
        before = self._ridge()[source]
        self.points = self.accepted_points = self.accepted_points[source]
        self.strengths = window
        added = self._ridge() - before
        self.value = (
            self.value[source] + dot(added * self.accepted_points, self.accepted_points) / 2
        )
        self.gradient = self.gradient[source] + added * self.accepted_points
        self.held_out = self.held_out[source]
        self.damping = self.damping[source]
        self.pairs = [
            (step[source], (change[source] + added * step[source]).float())
            for step, change in self.pairs
        ]

    def _forget_losses(self, window: list[float]) -> None:
        """Forget the losses of strengths that leave the window with probes that have stopped too early."""
        for strength, left in zip(self.strengths, self.decrease, strict=True):
            if strength not in window and left.max() > LEAVE:
                del self.losses[strength]

    def _settle(self) -> None:
        """Leave out the folds when two passes choose the same strength and its neighbours cannot become better."""
        chosen = self.strengths[self.chosen]
        before = self.best
        self.best = chosen
        lowest = min(self.strengths, key=self._loss_of)
        at_end = half_decade(lowest) in (STRONGEST, WEAKEST)
        if self.settled or chosen != before or not (chosen == lowest or at_end):
            return
        rows = self.solved
        if not all(self.strengths[row] in self.losses for row in rows):
            return
        if not all(self.decrease[row].max() < self._allowed(row) for row in rows):
            return
        # strengths that are given are all reported: their folds go on as long as any of their probes does
        if self.given is not None and not all(found.converged for found in self.certificates):
            return
        self.settled = True
        self.strengths = [self.strengths[row] for row in rows]

        def rest(x):
            return x[rows][:, -1:]

        self.points = rest(self.points)
        self.accepted_points = rest(self.accepted_points)
        self.value = rest(self.value)
        self.gradient = rest(self.gradient)
        self.decrease = rest(self.decrease)
        self.damping = rest(self.damping)
        self.pairs = [(rest(step), rest(change)) for step, change in self.pairs]

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

    @property
    def chosen(self) -> int:
        """Row of the chosen strength in the window."""
        row = min(range(len(self.strengths)), key=lambda i: self._loss_of(self.strengths[i]))
        if self.given is not None or len(self.strengths) == 1:
            return row
        return min(max(row, 1), len(self.strengths) - 2)

    def _loss_of(self, strength: float) -> float:
        return self.losses.get(strength, math.inf)

    @property
    def solved(self) -> list[int]:
        """Rows of the window whose probes are scored: all given strengths, or the chosen one and its neighbours.

        A window of one strength, as after two passes, has no neighbours.
        """
        if self.given is not None or len(self.strengths) == 1:
            return list(range(len(self.strengths)))
        return [self.chosen - 1, self.chosen, self.chosen + 1]

    @property
    def compared(self) -> list[float]:
        """Strengths among which one was chosen."""
        return [strength for strength in self.strengths if strength in self.losses]

    # ------------------------------------------------------------------------------------------------ results
    @property
    def certificates(self) -> list[Certificate]:
        """Certificates of the probes of all images at `solved`."""
        rows = self.solved
        strengths = self.value.new_tensor([self.strengths[row] for row in rows])
        at_zero = self.null_gradient.expand(len(rows), -1, -1)
        norm = self.space.whitened_norm(self.gradient[rows, -1], strengths)
        null = self.space.whitened_norm(at_zero, strengths).clamp(min=1e-300)
        pairs = zip((norm / null).tolist(), self.decrease[rows, -1].tolist(), strict=True)
        return [Certificate(*pair) for pair in pairs]

    def solution(self) -> dict[str, Any]:
        """Return the probes of all images at the strengths that are scored, and the path by which they were chosen."""
        path = sorted(self.losses, reverse=True)
        rows = self.solved
        return {
            "strengths": path,
            "loss": [self.losses[strength] for strength in path],
            "compared": [path.index(strength) for strength in self.compared],
            "chosen": path.index(self.strengths[self.chosen]),
            "solved": [path.index(self.strengths[row]) for row in rows],
            "space": self.space,
            "points": self.accepted_points[rows, -1],
            "certificates": self.certificates,
        }

    @property
    def converged(self) -> bool:
        """The strength is settled, and its probes have certificates."""
        return self.settled and all(certificate.converged for certificate in self.certificates)

    def state(self) -> dict[str, Tensor]:
        """Return what a killed run needs to resume from a pass."""
        tensors = {name: getattr(self, key).clone() for name, key in SAVED.items()}
        tensors |= {f"space_{name}": x for name, x in vars(self.space).items()}
        tensors |= {f"step_{i}": step for i, (step, _) in enumerate(self.pairs)}
        tensors |= {f"change_{i}": change for i, (_, change) in enumerate(self.pairs)}
        numbers = {
            "strengths": self.strengths,
            "losses": [number for pair in self.losses.items() for number in pair],
            "best": [self.best],
            "settled": [float(self.settled)],
            "folds": [float(self.folds)],
        }
        return tensors | {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}

    @classmethod
    def of_state(
        cls, loss: Loss, state: dict[str, Tensor], given: tuple[float, ...] | None
    ) -> "PassRefinement":
        """Return the refinement whose :meth:`state` is given."""
        prefix = "space_"
        space = SiteSpace(
            **{name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        )
        refinement = cls(
            loss,
            space,
            state["null"],
            float(state["best"]),
            state["points"][0],
            given,
        )
        for name, key in SAVED.items():
            setattr(refinement, key, state[name])
        count = sum(name.startswith("step_") for name in state)
        refinement.pairs = [(state[f"step_{i}"], state[f"change_{i}"]) for i in range(count)]
        refinement.strengths = state["strengths"].tolist()
        refinement.losses = dict(state["losses"].view(-1, 2).tolist())
        refinement.settled = bool(state["settled"])
        refinement.folds = int(state["folds"])
        return refinement


def bytes_of_probes(width: int, classes: int, folds: int) -> int:
    """Return the memory of a site's probes between passes while the window has all its strengths."""
    numbers = (2 * WINDOW + 1) * (folds + 1) * classes * (width + 1)
    # points, kept points and gradients in float64; pairs in float32
    return numbers * (3 * 8 + 2 * PAIRS * 4)
