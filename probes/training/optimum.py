"""Linear probes of one site at the minimum of the paper's loss, along a path of strengths of regularisation.

The objective of a strength r is convex:

    f(w, b) = mean cross-entropy of the upsampled logits over labelled pixels + r/2 w^T D w        (D: closed_form.py)

`SiteProblem` has the states of a sample of images in memory. w is in coordinates in which D is the identity and the
pooled within-class covariance diag(s) (`closed_form.py`). There, p_k (1 - p_k) s_j + r, with p the frequencies of the
classes, is about the curvature along w_kj: L-BFGS in steps of its inverse square root needs no Hessian.

The strength is chosen by cross-validation over folds of images. Each fold has a path of its own, from strong to weak. A
fold must never start from the solution of all images: that one has seen what the fold leaves out, and with finite
tolerances weak strengths would look better than they are. The path stops when the loss of left-out images has risen
twice. The probes of all images are then solved at the chosen strength and its two neighbours only, started from the
mean over folds.

The path uses two nodes per cell (`probes/ops`). Certificates, the last probes and reported losses use five.

Legend: P problems solved together, F folds, R strengths, B images, T tokens, d width, K classes.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.cross_entropy import loss_and_gradient
from probes.ops.lbfgs import MEMORY, Minimum, Objective, change_units, minimise
from probes.ops.quadrature import PreparedMasks

from .closed_form import SiteSpace, full_precision

LOOSE_NODES = 2
TIGHT_NODES = 5
STRENGTHS = tuple(10 ** (-k / 2) for k in range(2, 17))  # 0.1 to 1e-8, in half decades
STRONGER = tuple(10 ** (k / 2) for k in range(-1, 7))  # 0.3 to 1000, if 0.1 is the best of those
# predicted decrease, nats; at 2e-4, folds are 0.01 nats too good at weak strengths
PATH_TOLERANCE = 1e-5
# Of the probes of all images. At 5e-7, half the evaluations are enough for certificates, but mIoU moves by 0.07 points
# (46 photos of CamVid).
TOLERANCE = 1e-7
CONVERGED = 1e-4  # decrease in nats up to which a certificate holds
GRADIENT = 1e-3  # the same for the gradient's norm relative to that at w = 0
CHUNK_NUMEL = 2**24  # logits at a time
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


class FoldProblem:
    """The objective of a site on the images of some folds; a subclass has them in memory.

    Args:
        space: Coordinates of the site.
        pixels: f64[F], labelled pixels of each fold.
    """

    def __init__(self, space: SiteSpace, pixels: Tensor):
        self.space = space
        self.pixels = pixels

    def sums(
        self, fold: int, points: Tensor, nodes: int, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss f64[P] of points f64[P, K, d + 1] on a fold, and its gradient."""
        raise NotImplementedError

    @property
    def start(self) -> Tensor:
        """The constant prediction, f64[K, d + 1]: w = 0, and the logarithm of the frequencies as bias."""
        return constant_prediction(self.space)

    def scale(self, strengths: Tensor) -> Tensor:
        """Return the length of steps f64[P, K, d + 1], the inverse square root of about the curvature."""
        p = self.space.log_prior.exp().clamp(min=1e-4)
        spectrum = torch.cat([self.space.spectrum, self.space.spectrum.new_ones(1)])
        curvature = (p * (1 - p))[:, None] * spectrum + self.ridge(strengths)
        return curvature.rsqrt()

    def ridge(self, strengths: Tensor) -> Tensor:
        """Return the weights f64[P, 1, d + 1] of the squares of a point; 0 for biases."""
        ridge = strengths[:, None, None].expand(-1, 1, len(self.space.spectrum) + 1).clone()
        ridge[..., -1] = 0
        return ridge

    def objective(self, strengths: Tensor, left_out: Sequence[int | None], nodes: int) -> Objective:
        """Return value f64[P] and gradient f64[P, K, d + 1] of P problems as a function of their points.

        Args:
            strengths: f64[P].
            left_out: P folds, or None for all images.
            nodes: `LOOSE_NODES` or `TIGHT_NODES`.
        """
        ridge = self.ridge(strengths)

        def value_and_gradient(points: Tensor, problems: list[int]) -> tuple[Tensor, Tensor]:
            value = points.new_zeros(len(points))
            gradient = torch.zeros_like(points)
            for fold in range(len(self.pixels)):
                used = [i for i, problem in enumerate(problems) if left_out[problem] != fold]
                if used:
                    loss, by_point = self.sums(fold, points[used], nodes)
                    value[used] += loss
                    gradient[used] += by_point
            pixels = torch.stack([self._pixels_without(left_out[problem]) for problem in problems])
            penalty = ridge[problems] * points
            value = value / pixels + (penalty * points).sum((1, 2)) / 2
            return value, gradient / pixels[:, None, None] + penalty

        return value_and_gradient

    def _pixels_without(self, fold: int | None) -> Tensor:
        return self.pixels.sum() - (0 if fold is None else self.pixels[fold])

    def held_out_loss(self, points: Tensor) -> float:
        """Return the mean cross-entropy of all images, each under the point f64[F, K, d + 1] of its fold."""
        by_fold = [(fold, point[None]) for fold, point in enumerate(points)]
        losses = [
            self.sums(fold, point, TIGHT_NODES, needs_grad=False)[0] for fold, point in by_fold
        ]
        return (torch.cat(losses).sum() / self.pixels.sum()).item()

    def whitened_norm(self, gradient: Tensor, strengths: Tensor) -> Tensor:
        """Return the norms f64[P] of gradients f64[P, K, d + 1] in coordinates that whiten the states."""
        return whitened_norm(self.space.spectrum, gradient, strengths)


class SiteProblem(FoldProblem):
    """The objective of a site on images in memory.

    Args:
        states: f[B, T, d], on the device of the computation.
        loose: The masks of the images, with few nodes.
        tight: The same with many nodes.
        fold_of: i64[B], fold of each image.
    """

    def __init__(self, states: Tensor, loose: PreparedMasks, tight: PreparedMasks, fold_of: Tensor):
        self.order = fold_of.argsort(stable=True)
        self.sizes = fold_of.bincount().tolist()
        self.space = SiteSpace.of(states, tight.soft)
        folds = [images.tolist() for images in self.order.split(self.sizes)]
        self.tokens = [self.space.coordinates(states[images]) for images in folds]
        both = (LOOSE_NODES, loose), (TIGHT_NODES, tight)
        self.masks = {nodes: [masks[images] for images in folds] for nodes, masks in both}
        super().__init__(
            self.space, torch.stack([masks.pixels.sum() for masks in self.masks[TIGHT_NODES]])
        )

    def release(self) -> None:
        """Free the memory of states and masks; most of it."""
        self.tokens = []
        self.masks = {}

    def sums(
        self, fold: int, points: Tensor, nodes: int, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss of points on a fold, and its gradient; `nodes` as for :meth:`objective`."""
        return loss_sums(self.tokens[fold], self.masks[nodes][fold], points, needs_grad)


class PixelProblem(FoldProblem):
    """The objective of a site on a sample of pixels; there are no nodes.

    Args:
        space: Coordinates of the site.
        inputs: f32[n, d + 1], states in the coordinates, and ones.
        labels: i64[n].
        weights: f64[n], labelled pixels that each one stands for.
        fold_of: i64[n], fold of the image of each pixel.
        folds: Number of folds.
    """

    def __init__(
        self,
        space: SiteSpace,
        inputs: Tensor,
        labels: Tensor,
        weights: Tensor,
        fold_of: Tensor,
        folds: int,
    ):
        parts = [(fold_of == fold).nonzero().flatten() for fold in range(folds)]
        self.parts = [(inputs[part], labels[part], weights[part].float()) for part in parts]
        super().__init__(space, torch.stack([weights[part].sum() for part in parts]))

    @full_precision()
    def sums(
        self, fold: int, points: Tensor, nodes: int, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss of points on a fold, and its gradient."""
        inputs, labels, weights = self.parts[fold]
        count, classes = points.shape[:2]
        logits = (inputs @ points.flatten(0, 1).T.to(inputs)).view(-1, count, classes)
        log_probability = logits.log_softmax(-1)
        at_label = labels[:, None, None].expand(-1, count, 1)
        loss = -(log_probability.gather(2, at_label)[..., 0] * weights[:, None]).sum(
            0, dtype=torch.float64
        )
        if not needs_grad:
            return loss, None
        residual = log_probability.exp()
        residual.scatter_add_(2, at_label, residual.new_full((1, 1, 1), -1).expand_as(at_label))
        residual *= weights[:, None, None]
        return loss, (residual.flatten(1).T @ inputs).view_as(points).double()


def constant_prediction(space: SiteSpace) -> Tensor:
    """Return the constant prediction f64[K, d + 1]: w = 0, and the logarithm of the frequencies as bias."""
    prior = space.log_prior
    return torch.cat([prior.new_zeros(len(prior), len(space.spectrum)), prior[:, None]], 1)


def whitened_norm(spectrum: Tensor, gradient: Tensor, strengths: Tensor) -> Tensor:
    """Return the norms f64[P] of gradients f64[P, K, d + 1] in coordinates that whiten the states.

    Args:
        spectrum: f64[d].
        gradient: Gradients of P problems.
        strengths: f64[P].
    """
    metric = spectrum + strengths[:, None]
    metric = torch.cat([metric, torch.ones_like(metric[:, :1])], 1)[:, None]
    return (gradient / metric.sqrt()).flatten(1).norm(dim=1)


@full_precision()
def loss_sums(
    tokens: Tensor, masks: PreparedMasks, points: Tensor, needs_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss f64[P] of P linear probes on the same images, and its gradient f64[P, K, n].

    Args:
        tokens: f32[B, T, n], the inputs of the probes.
        masks: B masks.
        points: f64[P, K, n], weights of the inputs.
        needs_grad: If False, the gradient is None.
    """
    n_probes, classes = points.shape[:2]
    weights = points.flatten(0, 1).to(tokens)
    grid = tuple(masks.soft.shape[2:])
    loss = torch.zeros(n_probes, dtype=torch.float64, device=points.device)
    gradient = torch.zeros_like(points) if needs_grad else None
    step = max(1, CHUNK_NUMEL // (len(weights) * tokens.shape[1]))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        x = tokens[start : start + step].flatten(0, 1)
        logits = (x @ weights.T).view(-1, *grid, n_probes, classes).permute(3, 0, 4, 1, 2)
        losses, by_logits = loss_and_gradient(logits, masks[part], needs_grad)
        loss += losses.sum(1)
        if needs_grad:
            gradient += (by_logits.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1) @ x).view_as(
                points
            )
    return loss, gradient


class StrengthSearch(NamedTuple):
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


class Refinement:
    """R probes of a site on their way from the optimum with few nodes to that with many.

    The first step minimises a model of the objective f about the current point w_t,

        f_S(w) + <grad f(w_t) - grad f_S(w_t), w - w_t>

    where f_S is the objective with few nodes, and f the one with many. It has the right gradient, and nearly the right
    curvature, at a sixth of the cost. If f has risen, the step is taken back. The others minimise f itself.

    Args:
        problem: The site's states and masks.
        strengths: f64[R].
        points: f64[R, K, d + 1], where to start.
        pairs: What `minimise` has learned of the curvature, in the units of these strengths.
    """

    def __init__(
        self, problem: SiteProblem, strengths: Tensor, points: Tensor, pairs: deque | None = None
    ):
        self.problem = problem
        self.strengths = strengths
        self.points = points
        self.pairs = deque(maxlen=MEMORY) if pairs is None else pairs
        # with value and gradient
        self.kept = points, torch.full_like(strengths, torch.inf), torch.zeros_like(points)
        self.certificates: list[Certificate] = []
        start = problem.start.expand_as(points)
        at_zero = self._objective(LOOSE_NODES)(start, self._everything)[1]
        self.null = problem.whitened_norm(at_zero, strengths).clamp(min=1e-300)
        # for the norm of the gradient
        self.tolerance = min(TOLERANCE, (GRADIENT * self.null.min().item()) ** 2 / 8)

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
        decrease = self._step_with_few_nodes()
        self.accept(*exact(self.points, self._everything))
        self._certify(decrease)
        for _ in range(TIGHT_ROUNDS):
            points, value, gradient = self.kept
            found = self._minimise(exact, points, (value, gradient))
            self.points = found.points
            self.accept(found.value, found.gradient)
            self._certify(found.decrease)
            if self.converged:
                break
            self.tolerance /= 4  # else the next round would end where it begins

    def accept(self, value: Tensor, gradient: Tensor) -> None:
        """Take exact values f64[R] and gradients f64[R, K, d + 1] of the objective at `points`."""
        better = value <= self.kept[1] + ROUNDING

        def choose(new, old):
            return torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)

        self.kept = tuple(map(choose, (self.points, value, gradient), self.kept))
        self.points = self.kept[0]

    def _step_with_few_nodes(self) -> Tensor:
        """Move the accepted points to the minima of their models; return the decreases of these, f64[R]."""
        points, _, gradient = self.kept
        few = self._objective(LOOSE_NODES)
        value, of_few = few(points, self._everything)
        tilt = gradient - of_few

        def model(x: Tensor, problems: list[int]) -> tuple[Tensor, Tensor]:
            value, by_x = few(x, problems)
            apart = x - points[problems]
            return value + (tilt[problems] * apart).sum((1, 2)), by_x + tilt[problems]

        found = self._minimise(model, points, (value, gradient))
        self.points = found.points
        return value - found.value

    def _minimise(
        self,
        objective: Objective,
        points: Tensor,
        known: tuple[Tensor, Tensor],
    ) -> Minimum:
        scale = self.problem.scale(self.strengths)
        return minimise(objective, points, scale, self.tolerance, pairs=self.pairs, known=known)

    def _certify(self, decrease: Tensor) -> None:
        """Set the certificates of the accepted points, from the decreases f64[R] that are expected of another step."""
        gradient = self.problem.whitened_norm(self.kept[2], self.strengths) / self.null
        self.certificates = [
            Certificate(*pair) for pair in zip(gradient.tolist(), decrease.tolist(), strict=True)
        ]


class Path(NamedTuple):
    """A path of strengths on the images in memory, and the probes that it ends with.

    Args:
        path: The strengths and their cross-validated losses.
        folds: f64[F, K, d + 1], probes of the folds at the chosen strength.
        points: f64[R, K, d + 1], probes of all images at `path.solved`.
    """

    path: StrengthSearch
    folds: Tensor
    points: Tensor

    @property
    def strengths(self) -> Tensor:
        """Strengths of `points`, f64[R]."""
        return self.points.new_tensor([self.path.strengths[i] for i in self.path.solved])


def solve_site(
    problem: FoldProblem, strengths: Sequence[float] | None = None
) -> tuple[StrengthSearch, Refinement]:
    """Return the path of a site, with probes of all images in memory, and their exact refinement.

    Args:
        problem: The site's states and masks.
        strengths: Strengths to solve, all of them; None to search for the best one.
    """
    search = FoldSearch(problem)
    found = search.solve(strengths)
    return found.path, Refinement(problem, found.strengths, found.points, search.pairs)


def solve_path(problem: FoldProblem, strengths: Sequence[float] | None = None) -> Path:
    """Return the path of a site, and its probes; arguments as for :func:`solve_site`."""
    return FoldSearch(problem).solve(strengths)


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
        self.pairs: deque = deque(maxlen=MEMORY)
        self.learned_at: Tensor | None = None  # strengths f64[P] of the pairs

    def solve(self, strengths: Sequence[float] | None) -> Path:
        """Return the path, and the probes of all images at the strengths that are scored."""
        path = self.run(strengths)
        losses = [loss for _, loss, _ in path]
        chosen = losses.index(min(losses))
        solved = list(range(len(path)))
        if strengths is None:
            chosen = min(max(chosen, 1), len(path) - 2)
            solved = [chosen - 1, chosen, chosen + 1]
        found = StrengthSearch([strength for strength, _, _ in path], losses, chosen, solved)
        start = torch.stack([path[i][2].mean(0) for i in solved])
        at = start.new_tensor([found.strengths[i] for i in solved])
        self._keep_first_fold(len(solved))
        points = self._minimise(at, [None] * len(solved), start)
        return Path(found, path[chosen][2], points)

    def run(self, strengths: Sequence[float] | None) -> list[tuple[float, float, Tensor]]:
        """Return strength, loss of left-out images and points of the folds, f64[F, K, d + 1], from strong to weak."""
        start = self.problem.start.expand(self.folds, -1, -1)
        path: list[tuple[float, float, Tensor]] = []
        last = before = start
        for strength in sorted(strengths or STRENGTHS, reverse=True):
            guess = 2 * last - before if len(path) > 1 else last
            before = last
            path.append(self._solve(strength, guess))
            last = path[-1][2]
            losses = [loss for _, loss, _ in path]
            if strengths is None and len(path) > 2 and min(losses[-2:]) > min(losses[:-2]):
                break
        for strength in STRONGER if strengths is None else ():
            if min(path, key=lambda entry: entry[1])[0] < max(entry[0] for entry in path):
                break
            path.append(self._solve(strength, start))
        return sorted(path, key=lambda entry: -entry[0])

    def _solve(self, strength: float, start: Tensor) -> tuple[float, float, Tensor]:
        r = torch.full((self.folds,), strength, dtype=torch.float64, device=start.device)
        points = self._minimise(r, list(range(self.folds)), start)
        return strength, self.problem.held_out_loss(points), points

    def _minimise(self, strengths: Tensor, left_out: Sequence[int | None], start: Tensor) -> Tensor:
        """Return the minima f64[P, K, d + 1] at strengths f64[P], starting with the pairs that are known."""
        problem = self.problem
        scale = problem.scale(strengths)
        if self.learned_at is not None:
            added = problem.ridge(strengths) - problem.ridge(self.learned_at)
            change_units(self.pairs, problem.scale(self.learned_at), scale, added)
        self.learned_at = strengths
        objective = problem.objective(strengths, left_out, LOOSE_NODES)
        return minimise(objective, start, scale, PATH_TOLERANCE, pairs=self.pairs).points

    def _keep_first_fold(self, count: int) -> None:
        """Keep what is known of the first fold, for `count` problems: most of the images of all are its own."""
        self.learned_at = self.learned_at[:1].expand(count)
        for _ in range(len(self.pairs)):
            self.pairs.append(
                tuple(x[:1].expand(count, *x.shape[1:]) for x in self.pairs.popleft())
            )
