"""Linear probes of one site at the minimum of the paper's loss if the states of all images do not fit into memory.

A pass over all images gives, exactly, the value and the gradient of the objective of `optimum.py` at any
number of points, and the loss of the images that a fold leaves out. Between two passes each point takes one
quasi-Newton step:

    step = - L-BFGS(gradient; pairs of earlier steps), started from (H_S + r D + c H_0)^-1

- H_S is the Hessian on a sample of pixels of every image (`pixel_sample.py`), another sample after each pass:
  what one sample misses, the next ones have. It is applied by conjugate gradients and never stored.
- H_0 = q_k s_j, with q_k the mean of p_k (1 - p_k) on the sample and s the spectrum of the moments of all
  tokens, keeps directions that the sample does not have.
- The pairs (step, change of the exact gradient) correct both. Source: Nocedal and Wright, algorithm 7.4.

A point whose value has risen is taken back; its pair shortens the next step.

The strength is chosen among a few neighbouring ones, a *window*, each with a probe for every fold and one of all
images. The sample alone would choose too strong a regularisation, as few tokens need more of it. So the window
begins where the sample chooses and moves with the cross-validated loss of all images. A strength that enters it
starts at the point of its neighbour, where value, gradient and pairs are known: the penalty is all that differs.

Legend: W strengths in the window, F folds, G = F + 1 probes of a strength, or 1 when the strength is settled;
n pixels of the sample, K classes, d width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.ops.quadrature import PreparedMasks

from .closed_form import Moments, SiteSpace, full_precision
from .optimum import CONVERGED, ROUNDING, Certificate, loss_sums, whitened_norm

PAIRS = 4  # steps that are remembered, in float32
SHRINKAGE = 0.3  # c
RESIDUAL = 0.03  # of conjugate gradients, relative
ITERATIONS = 100  # of conjugate gradients
WINDOW = 2  # half decades on both sides of the best strength
# in half decades: 1000 to 1e-8
STRONGEST = -6
WEAKEST = 16


class PassSums:
    """Losses and gradients of a site's probes, summed over the images of a pass.

    Args:
        mean: f64[d], of the states.
        points: f64[W, G, K, d + 1], weights of x - mean, and biases.
        left_out: The fold that each of the G probes leaves out.
        folds: F.
    """

    def __init__(self, mean: Tensor, points: Tensor, left_out: list[int | None], folds: int):
        self.mean = mean.float()
        self.points = points
        self.left_out = left_out
        self.loss = points.new_zeros(points.shape[:2])
        self.gradient = torch.zeros_like(points)
        self.held_out = points.new_zeros(len(points), folds)

    def add(self, states: Tensor, masks: PreparedMasks, folds: list[int]) -> None:
        """Add images of states f[B, T, d]; `folds` has the fold of each."""
        x = states.float() - self.mean
        inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        for fold in sorted(set(folds)):
            images = [i for i, own in enumerate(folds) if own == fold]
            self._add_fold(inputs[images], masks[images], fold)

    def _add_fold(self, inputs: Tensor, masks: PreparedMasks, fold: int) -> None:
        used = [g for g, left_out in enumerate(self.left_out) if left_out != fold]
        points = self.points[:, used]
        loss, gradient = loss_sums(inputs, masks, points.flatten(0, 1))
        self.loss[:, used] += loss.view(points.shape[:2])
        self.gradient[:, used] += gradient.view_as(points)
        if fold in self.left_out:
            points = self.points[:, self.left_out.index(fold)]
            self.held_out[:, fold] += loss_sums(inputs, masks, points, needs_grad=False)[0]

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums, which are added over processes in place."""
        return self.loss, self.gradient, self.held_out

    def means(self, space: SiteSpace, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`PassRefinement.accept` takes; `pixels` f64[F] are the labelled ones of each fold."""
        total = pixels.sum()
        used = torch.stack(
            [total if fold is None else total - pixels[fold] for fold in self.left_out]
        )
        gradient = torch.cat(
            [space.from_gradient(self.gradient[..., :-1]), self.gradient[..., -1:]], -1
        )
        return self.loss / used, gradient / used[:, None, None], self.held_out / total


def null_gradient(space: SiteSpace, moments: Moments) -> Tensor:
    """Return the gradient of the mean loss of all images at the constant prediction, f64[K, d + 1].

    The prediction is the same everywhere, so that the moments have its gradient.
    """
    count, first, _ = moments.without(None)
    first = first + count[:, None] * (moments.pivot.double() - space.mean)
    prior = space.log_prior.exp()
    weights = space.from_gradient(torch.outer(prior, first.sum(0)) - first)
    biases = prior * count.sum() - count
    return torch.cat([weights, biases[:, None]], 1) / count.sum()


@dataclass
class SampledPixels:
    """A sample of pixels of a site on the device of the computation.

    Args:
        inputs: f32[n, d + 1], states in the coordinates of the site, and ones.
        weights: f32[n], labelled pixels that each one stands for.
        folds: i64[n], fold of each pixel's image.
    """

    inputs: Tensor
    weights: Tensor
    folds: Tensor


class SampleHessian:
    """The Hessian of the objectives of some probes on a sample, and its preconditioner.

    Args:
        sample: The pixels.
        points: f64[G, K, d + 1].
        left_out: G folds, or None.
        ridge: f64[1, d + 1], weights of the squares of a point.
        spectrum: f64[d + 1], mean squares of the inputs.
    """

    def __init__(
        self,
        sample: SampledPixels,
        points: Tensor,
        left_out: list[int | None],
        ridge: Tensor,
        spectrum: Tensor,
    ):
        self.inputs = sample.inputs
        self.ridge = ridge
        used = torch.stack([_used(sample, fold) for fold in left_out], 1)
        self.weights = (used / used.sum(0))[..., None]  # [n, G, 1]
        logits = self.inputs @ points.flatten(0, 1).T.to(self.inputs)
        self.probability = logits.view(len(used), *points.shape[:2]).softmax(-1)
        spread = self.probability * (1 - self.probability) * self.weights
        self.typical = spread.sum(0).double()[..., None] * spectrum + 1e-6  # H_0
        self.pull = SHRINKAGE * self.typical

    def times(self, direction: Tensor) -> Tensor:
        """Return the product with f64[G, K, d + 1], with the pull towards the point."""
        change = (self.inputs @ direction.flatten(0, 1).T.to(self.inputs)).view_as(self.probability)
        change = self.probability * change
        change -= self.probability * change.sum(-1, keepdim=True)
        change *= self.weights
        product = (change.flatten(1).T @ self.inputs).view_as(direction).double()
        return product + (self.ridge + self.pull) * direction

    def solve(self, right: Tensor) -> Tensor:
        """Return H^-1 right by conjugate gradients, f64[G, K, d + 1]."""
        preconditioner = 1 / (self.typical + self.pull + self.ridge)
        solution = torch.zeros_like(right)
        residual = right.clone()
        scaled = preconditioner * residual
        direction = scaled.clone()
        size = _dot(residual, scaled)
        enough = RESIDUAL**2 * size
        for _ in range(ITERATIONS):
            active = size > enough
            if not active.any():
                break
            product = self.times(direction)
            step = torch.where(active, size / _dot(direction, product).clamp(min=1e-300), 0)[
                :, None, None
            ]
            solution += step * direction
            residual -= step * product
            scaled = preconditioner * residual
            before = size
            size = _dot(residual, scaled)
            direction = scaled + (size / before.clamp(min=1e-300))[:, None, None] * direction
        return solution


def _used(sample: SampledPixels, left_out: int | None) -> Tensor:
    """Return the weights f32[n] of the pixels, 0 in the fold that is left out."""
    return sample.weights if left_out is None else sample.weights * (sample.folds != left_out)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the scalar products of points f64[..., K, d + 1]."""
    return (x * y).sum((-2, -1))


def quasi_newton(
    gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], solve: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return about H^-1 gradient, f64[G, K, d + 1]: the two-loop recursion of L-BFGS around `solve`.

    Args:
        gradient: f64[G, K, d + 1].
        pairs: Steps and changes of the gradient, from old to new.
        solve: Product with a first guess of H^-1.
    """
    result = gradient.clone()
    factors = []
    for step, change in reversed(pairs):
        curvature = _dot(step, change)
        inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-300), 0)
        factor = inverse * _dot(step, result)
        result -= factor[:, None, None] * change
        factors.append((inverse, factor))
    result = solve(result)
    for (step, change), (inverse, factor) in zip(pairs, reversed(factors), strict=True):
        result += (factor - inverse * _dot(change, result))[:, None, None] * step
    return result


class PassRefinement:
    """The probes of a site between passes.

    Args:
        space: Coordinates of the site, from all images.
        null: f64[K, d + 1], gradient at w = 0, from all images.
        strength: Strength that the sample has chosen.
        points: f64[G, K, d + 1], probes of that strength: of the folds, then of all images.
        given: Strengths to solve; None to search for the best one.
    """

    def __init__(
        self,
        space: SiteSpace,
        null: Tensor,
        strength: float,
        points: Tensor,
        given: tuple[float, ...] | None,
    ):
        self.space = space
        self.null = null
        self.given = given
        self.folds = len(points) - 1
        self.strengths = [strength]
        self.points = points[None]
        self.value = points.new_full((1, len(points)), torch.inf)
        self.gradient = torch.zeros_like(self.points)
        self.kept = self.points
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held_out = points.new_zeros(1, self.folds)
        self.losses: dict[float, float] = {}  # cross-validated, by strength
        self.best = strength
        self.decrease = torch.full_like(self.value, torch.inf)
        self.settled = False

    # ------------------------------------------------------------------------------------------------ a pass
    @property
    def left_out(self) -> list[int | None]:
        """The fold that each of the G probes leaves out."""
        return [None] if self.settled else [*range(self.folds), None]

    def probes(self) -> tuple[Tensor, Tensor, list[int | None], int]:
        """Return the arguments of :class:`PassSums`."""
        weights = self.space.to_states(self.points[..., :-1])
        return (
            self.space.mean,
            torch.cat([weights, self.points[..., -1:]], -1),
            self.left_out,
            self.folds,
        )

    def accept(self, value: Tensor, gradient: Tensor, held_out: Tensor) -> None:
        """Take what a pass has found at `points`, without penalties.

        Args:
            value: f64[W, G], mean loss.
            gradient: f64[W, G, K, d + 1].
            held_out: f64[W, F], part of each fold in the cross-validated loss; ignored when the strength is settled.
        """
        ridge = self._ridge()
        gradient = gradient + ridge * self.points
        value = value + _dot(ridge * self.points, self.points) / 2
        known = self.value.isfinite()
        if known.all():
            step = (self.points - self.kept).float()
            change = (gradient - self.gradient).float()
            self.pairs = [*self.pairs, (step, change)][-PAIRS:]
        better = value <= self.value + ROUNDING
        self.value = torch.where(better, value, self.value)
        self.kept = torch.where(better[..., None, None], self.points, self.kept)
        self.gradient = torch.where(better[..., None, None], gradient, self.gradient)
        if not self.settled:  # of the points that are kept, too
            self.held_out = torch.where(better[:, :-1], held_out, self.held_out)
            self.losses |= dict(zip(self.strengths, self.held_out.sum(1).tolist(), strict=True))

    @full_precision()
    def step(self, sample: SampledPixels) -> None:
        """Choose the window, and move its probes; :meth:`accept` must have been called."""
        if not self.settled:
            self._move_window()
        spectrum = torch.cat([self.space.spectrum, self.space.spectrum.new_ones(1)])
        self.points, self.decrease = self.kept.clone(), torch.zeros_like(self.value)
        for row, ridge in enumerate(self._ridge()):
            hessian = SampleHessian(sample, self.kept[row], self.left_out, ridge[0], spectrum)
            pairs = [(step[row].double(), change[row].double()) for step, change in self.pairs]
            direction = quasi_newton(self.gradient[row], pairs, hessian.solve)
            self.decrease[row] = _dot(direction, self.gradient[row]) / 2
            self.points[row] -= direction
        self._settle()

    # ------------------------------------------------------------------------------------------------ strengths
    def _ridge(self) -> Tensor:
        """Return the weights f64[W, 1, 1, d + 1] of the squares of a point; 0 for biases."""
        return ridge_of(self.strengths, self.points)

    def _window(self) -> list[float]:
        """Return the strengths that the window should have, from strong to weak."""
        if self.given is not None:
            return sorted(self.given, reverse=True)
        index = [half_decade(strength) for strength in self.strengths]
        best = half_decade(min(self.strengths, key=self.losses.__getitem__))
        if len(index) > 1 and min(index) < best < max(index):
            return self.strengths
        # a sample asks for more regularisation than all images
        first = best if len(index) == 1 else best - WINDOW
        first = min(max(first, STRONGEST), WEAKEST - 2 * WINDOW)
        return [10 ** (-i / 2) for i in range(first, first + 2 * WINDOW + 1)]

    def _move_window(self) -> None:
        """Bring strengths into the window, each from its nearest neighbour, and remove others."""
        window = self._window()

        def distance(old, new):
            return abs(half_decade(self.strengths[old]) - half_decade(new))

        source = [
            min(range(len(self.strengths)), key=lambda old, new=new: distance(old, new))
            for new in window
        ]
        self.losses |= {
            new: self.losses[self.strengths[old]] for old, new in zip(source, window, strict=True)
        }
        before = self._ridge()[source]
        self.points = self.kept = self.kept[source]
        self.strengths = window
        added = self._ridge() - before
        self.value = self.value[source] + _dot(added * self.kept, self.kept) / 2
        self.gradient = self.gradient[source] + added * self.kept
        self.held_out = self.held_out[source]
        self.pairs = [
            (step[source], (change[source] + added * step[source]).float())
            for step, change in self.pairs
        ]

    def _settle(self) -> None:
        """Leave out the folds when their probes have converged and two passes choose the same strength."""
        chosen = self.strengths[self.chosen]
        before = self.best
        self.best = chosen
        if (
            self.settled
            or chosen != before
            or chosen != min(self.strengths, key=self.losses.__getitem__)
        ):
            return
        rows = self.solved
        if not (self.decrease[rows] < CONVERGED).all():
            return
        self.settled = True
        self.strengths = [self.strengths[row] for row in rows]

        def rest(x):
            return x[rows][:, -1:]

        self.points, self.kept, self.value = rest(self.points), rest(self.kept), rest(self.value)
        self.gradient, self.decrease = rest(self.gradient), rest(self.decrease)
        self.pairs = [(rest(step), rest(change)) for step, change in self.pairs]

    @property
    def chosen(self) -> int:
        """Row of the chosen strength in the window."""
        row = min(range(len(self.strengths)), key=lambda i: self.losses[self.strengths[i]])
        return row if self.given is not None else min(max(row, 1), len(self.strengths) - 2)

    @property
    def solved(self) -> list[int]:
        """Rows of the window whose probes are scored: all given strengths, or the chosen one and its neighbours."""
        if self.given is not None:
            return list(range(len(self.strengths)))
        return [self.chosen - 1, self.chosen, self.chosen + 1]

    # ------------------------------------------------------------------------------------------------ results
    @property
    def certificates(self) -> list[Certificate]:
        """Certificates of the probes of all images at `solved`."""
        rows = self.solved
        strengths = self.value.new_tensor([self.strengths[row] for row in rows])
        norm = whitened_norm(self.space.spectrum, self.gradient[rows, -1], strengths)
        null = whitened_norm(
            self.space.spectrum, self.null.expand(len(rows), -1, -1), strengths
        ).clamp(min=1e-300)
        pairs = zip((norm / null).tolist(), self.decrease[rows, -1].tolist(), strict=True)
        return [Certificate(*pair) for pair in pairs]

    def found(self) -> dict[str, Any]:
        """Return the probes of all images at the strengths that are scored, and the path by which they were chosen."""
        path = sorted(self.losses, reverse=True)
        rows = self.solved
        return {
            "strengths": path,
            "loss": [self.losses[strength] for strength in path],
            "chosen": path.index(self.strengths[self.chosen]),
            "solved": [path.index(self.strengths[row]) for row in rows],
            "space": self.space,
            "points": self.kept[rows, -1],
            "certificates": self.certificates,
        }

    @property
    def converged(self) -> bool:
        """The strength is settled, and its probes have certificates."""
        return self.settled and all(certificate.converged for certificate in self.certificates)

    def state(self) -> dict[str, Tensor]:
        """Return what a killed run needs to resume from a pass."""
        tensors = {
            name: getattr(self, name).clone()
            for name in ("null", "points", "value", "gradient", "kept", "decrease", "held_out")
        }
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
        cls, state: dict[str, Tensor], given: tuple[float, ...] | None
    ) -> "PassRefinement":
        """Return the refinement whose :meth:`state` is given."""
        prefix = "space_"
        space = SiteSpace(
            **{name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        )
        refinement = cls(space, state["null"], float(state["best"]), state["points"][0], given)
        for name in ("points", "value", "gradient", "kept", "decrease", "held_out"):
            setattr(refinement, name, state[name])
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


def half_decade(strength: float) -> int:
    """Return the index of a strength on the grid in half decades, 0 for 1 and 2 for 0.1."""
    return round(-2 * torch.tensor(strength, dtype=torch.float64).log10().item())


def ridge_of(strengths: list[float], points: Tensor) -> Tensor:
    """Return the weights f64[W, 1, 1, d + 1] of the squares of points f64[..., d + 1]; 0 for biases."""
    ridge = points.new_tensor(strengths)[:, None].repeat(1, points.shape[-1])
    ridge[:, -1] = 0
    return ridge[:, None, None]
