"""Linear probes of one site at the minimum of their loss if the states of all images do not fit into memory.

A pass over all images gives, exactly, the value and the gradient of the objective of `objective.py` at any number of
points (`pass_sums.py`), and the loss of the images that a fold leaves out. Between two passes each point takes one
quasi-Newton step (`curvature.py`), with another sample of pixels after each pass: what one sample misses, the
next ones have. A point whose value has risen is taken back: its pair shortens the next step, which is also damped.
A point that was meant for one strength is taken for another one whose value it lowers more.

Each strength of the window (`window.py`) has a probe for every fold and one of all images. A strength that enters it
starts at the point of its neighbour, where value, gradient and pairs are known: the penalty is all that differs.

Legend: W strengths in the window, F folds, G = F + 1 probes of a strength, or 1 when the strength is settled;
K classes, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from probes.ops.lbfgs import Pair, dot, quasi_newton
from probes.tasks.losses import Loss

from .curvature import LEAST_DAMPING, SampledPixels, SampleHessian, first_damping
from .moments import SiteSpace, full_precision
from .refinement import ROUNDING, Certificate, Evaluated, certify
from .window import WIDTH, Window

RESIDUAL = 0.03  # of a step: a pass costs more than conjugate gradients
PAIRS = 4  # steps that are remembered, in float32
# A step multiplies the damping of the next one by what it has gained, as a part of the decrease that the sample has
# promised: below 0 (it is taken back), 1/4, 3/4, and more. Source: Nocedal and Wright, algorithm 4.1
GAINS = (0.0, 0.25, 0.75)
DAMPING_FACTORS = (10.0, 3.0, 1.0, 1 / 3)


@dataclass
class PassProbes:
    """The probes of a site between two passes.

    Args:
        points: f64[W, G, K, d + 1], of which the next pass measures value and gradient.
        accepted: The best points so far, with their values f64[W, G] and gradients.
        held_out: f64[W, F], part of each fold in the cross-validated loss, at the accepted points.
        decrease: f64[W, G], decrease of the value that the last step promises.
        damping: f64[W, G], of the next step; 0 until the first sample.
        pairs: The last steps and changes of the gradient, f32[W, G, K, d + 1] each, with the penalty of their row.
    """

    points: Tensor
    accepted: Evaluated
    held_out: Tensor
    decrease: Tensor
    damping: Tensor
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def unmeasured(cls, points: Tensor) -> "PassProbes":
        """Return probes f64[G, K, d + 1] of one strength, of the folds and of all images."""
        points = points[None]
        unknown = points.new_full(points.shape[:2], torch.inf)
        accepted = Evaluated(points, unknown, torch.zeros_like(points))
        held_out = torch.zeros_like(unknown[:, :-1])
        return cls(points, accepted, held_out, unknown, torch.zeros_like(unknown))

    def select(self, rows: list[int], probes: slice = slice(None)) -> "PassProbes":
        """Return the probes of some strengths, of which some folds."""

        def chosen(x: Tensor) -> Tensor:
            return x[rows][:, probes]

        return PassProbes(
            chosen(self.points),
            Evaluated(*map(chosen, self.accepted)),
            self.held_out[rows],
            chosen(self.decrease),
            chosen(self.damping),
            [(chosen(step), chosen(change)) for step, change in self.pairs],
        )

    def add_penalty(self, added: Tensor) -> None:
        """Bring the accepted values, gradients and pairs to penalties that differ by weights f64[W, 1, 1, d + 1]."""
        points, value, gradient = self.accepted
        value = value + dot(added * points, points) / 2
        self.accepted = Evaluated(points, value, gradient + added * points)
        self.pairs = [(step, (change + added * step).float()) for step, change in self.pairs]


class PassRefinement:
    """The probes of a site on their way to the optimum, pass by pass.

    Args:
        loss: Of the logits.
        space: Coordinates of the site, from all images.
        null_gradient: f64[K, d + 1], gradient at w = 0, from all images.
        window: The strengths.
        probes: The probes of these strengths.
    """

    def __init__(
        self,
        loss: Loss,
        space: SiteSpace,
        null_gradient: Tensor,
        window: Window,
        probes: PassProbes,
    ):
        self.loss = loss
        self.space = space
        self.null_gradient = null_gradient
        self.window = window
        self.probes = probes

    @classmethod
    def start(
        cls,
        loss: Loss,
        space: SiteSpace,
        null_gradient: Tensor,
        strength: float,
        points: Tensor,
        given: Sequence[float] | None,
    ) -> "PassRefinement":
        """Return the refinement of what was found on a sample.

        Args:
            loss, space, null_gradient: As of the class.
            strength: Strength that the sample has chosen.
            points: f64[G, K, d + 1], probes of that strength: of the folds, then of all images.
            given: Strengths to solve; None to search for the best one.
        """
        window = Window([strength], given, strength)
        probes = PassProbes.unmeasured(points)
        return cls(loss, space, null_gradient, window, probes)

    # ------------------------------------------------------------------------------------------------ a pass
    @property
    def left_out(self) -> list[int | None]:
        """The fold that each of the G probes leaves out."""
        return [None] if self.window.settled else [*range(self.probes.held_out.shape[1]), None]

    def arguments(self) -> tuple[Tensor, Tensor, list[int | None], int]:
        """Return the arguments of :class:`PassSums` after the loss."""
        points = self.probes.points
        weights = self.space.to_states(points[..., :-1])
        return (
            self.space.mean,
            torch.cat([weights, points[..., -1:]], -1),
            self.left_out,
            self.probes.held_out.shape[1],
        )

    def accept_losses(
        self,
        value: Tensor,
        gradient: Tensor,
        held_out: Tensor,
    ) -> None:
        """Take what a pass has found at the points, without penalties.

        Args:
            value: f64[W, G], mean loss.
            gradient: f64[W, G, K, d + 1].
            held_out: f64[W, F], part of each fold in the cross-validated loss; ignored when the strength is settled.
        """
        probes = self.probes
        ridge = self._ridge()
        penalty = dot(ridge * probes.points, probes.points) / 2
        if probes.accepted.value.isfinite().all():
            self._adapt_damping(value + penalty)
            self._remember_pair(gradient + ridge * probes.points, value.isfinite())
        value, source = self._best_measured(value, penalty)
        probe = torch.arange(value.shape[1], device=value.device)
        points = probes.points[source, probe]
        found = Evaluated(points, value, gradient[source, probe] + ridge * points)
        better = probes.accepted.is_improved_by(found)
        probes.accepted = probes.accepted.replace_where(better, found)
        if not self.window.settled:  # of the points that are kept, too
            held_out = held_out[source[:, :-1], probe[:-1]]
            probes.held_out = torch.where(better[:, :-1], held_out, probes.held_out)
            losses = probes.held_out.sum(1).tolist()
            self.window.losses |= dict(zip(self.window.strengths, losses, strict=True))

    def _adapt_damping(self, value: Tensor) -> None:
        """Damp the next step more or less, by what the last one has gained; `value` f64[W, G] is where it has led."""
        probes = self.probes
        gain = (probes.accepted.value - value + ROUNDING) / (probes.decrease + ROUNDING)
        gain = gain.nan_to_num(nan=-1.0)
        factors = value.new_tensor(DAMPING_FACTORS)
        factor = factors[torch.bucketize(gain, value.new_tensor(GAINS), right=True)]
        probes.damping = (probes.damping * factor).clamp(min=LEAST_DAMPING)

    def _remember_pair(self, gradient: Tensor, usable: Tensor) -> None:
        """Remember the last steps and the changes of the gradient f64[W, G, K, d + 1], but where `usable` is False."""
        usable = usable[..., None, None]
        before = self.probes.accepted
        step = torch.where(usable, self.probes.points - before.points, 0).float()
        change = torch.where(usable, gradient - before.gradient, 0).float()
        self.probes.pairs = [*self.probes.pairs, (step, change)][-PAIRS:]

    def _best_measured(self, value: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest value f64[W, G] of each probe over the points of all strengths, and whose point it is.

        Args:
            value: f64[W, G], mean loss at the points, without penalties.
            penalty: f64[W, G], that of each point at its own strength, to which penalties are proportional.
        """
        strengths = value.new_tensor(self.window.strengths)
        ratio = strengths[:, None] / strengths
        lowest = (value + ratio[..., None] * penalty).nan_to_num(nan=torch.inf).min(1)
        return lowest.values, lowest.indices

    # ------------------------------------------------------------------------------------------------ a step
    @full_precision()
    def step(self, sample: SampledPixels, is_last: bool = False) -> None:
        """Choose the window, and move its probes; :meth:`accept_losses` must have been called.

        Args:
            sample: Pixels that give the curvature.
            is_last: No pass follows, which would measure strengths that enter the window: it stays.
        """
        if self.converged:  # steps below the resolution of float32 would only be noise
            self.probes.points = self.probes.accepted.points
            return
        if not (self.window.settled or is_last):
            self._move_window()
        self._start_damping(sample)
        self._move_points(sample)
        self._settle()

    def _move_window(self) -> None:
        """Bring strengths into the window, each with the probes of its nearest neighbour, and remove others."""
        before = self._ridge()
        rows = self.window.move(self._left())
        self.probes = self.probes.select(rows)
        self.probes.add_penalty(self._ridge() - before[rows])

    def _start_damping(self, sample: SampledPixels) -> None:
        """Set the damping of the first step."""
        if not self.probes.damping.any():
            weights = self.probes.points[0, 0].numel()
            self.probes.damping = self.probes.damping + first_damping(weights, len(sample.weights))

    def _move_points(self, sample: SampledPixels) -> None:
        """Take a quasi-Newton step from each accepted point."""
        points, _, gradient = self.probes.accepted
        moved = points.clone()
        decrease = torch.zeros_like(self.probes.decrease)
        for row, ridge in enumerate(self._ridge()):
            hessian = SampleHessian(
                self.loss,
                sample,
                points[row],
                gradient[row],
                self.left_out,
                ridge[0],
                self.space.input_spectrum,
                self.probes.damping[row],
            )
            solve = partial(hessian.solve, residual=RESIDUAL)
            direction = quasi_newton(gradient[row], self._pairs_near(row), solve)
            decrease[row] = dot(direction, gradient[row]) / 2
            moved[row] -= direction
        self.probes = replace(self.probes, points=moved, decrease=decrease)

    def _settle(self) -> None:
        """Leave out the folds when the strength is settled."""
        certified = all(certificate.converged for certificate in self.certificates)
        rows = self.window.settle(self._left(), certified)
        if rows is not None:
            self.probes = self.probes.select(rows, slice(-1, None))

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
            for step, change in self.probes.pairs
            for other in rows
        ]

    def _ridge(self) -> Tensor:
        """Return the weights f64[W, 1, 1, d + 1] of the squares of a point; 0 for biases."""
        return self.space.ridge(self.probes.points.new_tensor(self.window.strengths))[:, None]

    def _left(self) -> list[float]:
        """Return the largest decrease that is left of the probes of each strength."""
        return self.probes.decrease.amax(1).tolist()

    # ------------------------------------------------------------------------------------------------ results
    @property
    def certificates(self) -> list[Certificate]:
        """Certificates of the probes of all images at the strengths that are scored."""
        rows = self.window.solved
        strengths = self.probes.points.new_tensor([self.window.strengths[row] for row in rows])
        gradient = self.probes.accepted.gradient[rows, -1]
        decrease = self.probes.decrease[rows, -1]
        return certify(
            self.space,
            strengths,
            gradient,
            self.null_gradient,
            decrease,
        )

    @property
    def converged(self) -> bool:
        """The strength is settled, and its probes have certificates."""
        return self.window.settled and all(x.converged for x in self.certificates)

    @property
    def points(self) -> Tensor:
        """Probes of all images at the strengths that are scored, f64[R, K, d + 1]."""
        return self.probes.accepted.points[self.window.solved, -1]


def pack_refinement(refinement: PassRefinement) -> dict[str, Tensor]:
    """Return what a killed run needs to resume from a pass, as tensors of a file."""
    probes = refinement.probes
    window = refinement.window
    tensors = {"null_gradient": refinement.null_gradient}
    tensors |= {f"space_{name}": x for name, x in vars(refinement.space).items()}
    tensors |= {f"accepted_{name}": x for name, x in probes.accepted._asdict().items()}
    for name in ("points", "held_out", "decrease", "damping"):
        tensors[name] = getattr(probes, name)
    for i, (step, change) in enumerate(probes.pairs):
        tensors |= {f"step_{i}": step, f"change_{i}": change}
    numbers = {
        "strengths": window.strengths,
        "losses": list(window.losses.items()),
        "best": window.best,
        "settled": window.settled,
    }
    tensors |= {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    return {name: x.clone() for name, x in tensors.items()}


def unpack_refinement(
    tensors: dict[str, Tensor], loss: Loss, given: Sequence[float] | None
) -> PassRefinement:
    """Return the refinement of :func:`pack_refinement`.

    Args:
        tensors: Of the file.
        loss: Of the logits.
        given: Strengths to solve; None to search for the best one.
    """

    def group(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    probes = PassProbes(
        tensors["points"],
        Evaluated(**group("accepted_")),
        tensors["held_out"],
        tensors["decrease"],
        tensors["damping"],
        [(tensors[f"step_{i}"], tensors[f"change_{i}"]) for i in range(len(group("step_")))],
    )
    window = Window(
        tensors["strengths"].tolist(),
        given,
        tensors["best"].item(),
        dict(tensors["losses"].view(-1, 2).tolist()),
        bool(tensors["settled"]),
    )
    space = SiteSpace(**group("space_"))
    return PassRefinement(
        loss,
        space,
        tensors["null_gradient"],
        window,
        probes,
    )


def bytes_of_probes(width: int, classes: int, folds: int) -> int:
    """Return the memory of a site's probes between passes while the window has all its strengths."""
    numbers = (2 * WIDTH + 1) * (folds + 1) * classes * (width + 1)
    # points, kept points and gradients in float64; pairs in float32
    return numbers * (3 * 8 + 2 * PAIRS * 4)
