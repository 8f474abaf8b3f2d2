"""Linear probes of concepts painted on a few patches, at all sites together.

The objective of a site is multinomial logistic regression with a ridge and equal weight for each concept,

    f(w, b) = sum_i v_i CE(w x_i + b, y_i) + r/2 |w|^2        v_i = 1 / (K n_y): n_y patches are painted as concept y

x are the states, each channel divided by its standard deviation over the painted patches and by sqrt(d). One strength r
then means about the same at every width. The problem is solved along the principal axes of the patches, in which the
curvature is nearly diagonal and |w| is unchanged: those of R, with X^T = Q R, if there are fewer patches than channels.

The strength of a site is the one with the lowest cross-entropy on patches that were left out: those of the photos of a
fold, or blocks of patches if a concept is painted on a single photo. The probe that scores a fold has the strength that
is best on the other folds.

Legend: S sites, F folds, N painted patches, m their coordinates, P photos, K concepts, d width.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.lbfgs import minimise
from probes.tasks import SEGMENTATION, TASKS

from .concept_folds import Folds, Paint

LOSS = TASKS[SEGMENTATION].loss
CONCEPT_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Predicted decrease in nats, of folds and of all patches. At 1e-5, weak strengths look better than they are.
PATH_TOLERANCE = 1e-6
TOLERANCE = 1e-7
MEMORY = 12  # pairs of L-BFGS; in the coordinates of the patches' axes, 40 take as many steps
# variance of a constant channel relative to its mean square, up to rounding of float32
DEAD = 1e-12
CHUNK_NUMEL = 2**25  # coordinates of the sites that are solved together


@dataclass
class ConceptProbes:
    """Probes of a set of painted patches; of each site, one without each fold and the last one of all patches.

    Args:
        paint: The patches.
        folds: How they were left out.
        weights: f32[F + 1, K, d] by site.
        bias: f32[F + 1, K] by site.
        strengths: Strength of the probe of all patches by site.
    """

    paint: Paint
    folds: Folds
    weights: dict[str, Tensor]
    bias: dict[str, Tensor]
    strengths: dict[str, float]

    def logits(self, states: Tensor, site: str) -> Tensor:
        """Return the logits f32[..., K] of states f[..., d]."""
        weights = self.weights[site][-1]
        bias = self.bias[site][-1]
        return states.float() @ weights.mT + bias

    def left_out(self, states: Tensor, site: str) -> Tensor:
        """Return the concept i64[N] of each painted patch by the probe that has not seen it, from states f[N, d]."""
        fold = self.folds.of
        weights = self.weights[site][fold]  # [N, K, d]
        bias = self.bias[site][fold]
        columns = states.float().unsqueeze(-1)
        products = weights @ columns
        logits = products.squeeze(-1) + bias
        return logits.argmax(-1)


def solve_concepts(
    states: Mapping[str, Tensor],
    paint: Paint,
    folds: Folds,
    check: Callable[[], None] = lambda: None,
) -> ConceptProbes:
    """Return the probes of all sites.

    Args:
        states: f[N, d] of the painted patches by site.
        paint: The patches.
        folds: See :func:`probes.models.concept_folds.make_folds`. Without folds, the middle strength is taken.
        check: Called before each strength of a group of sites; an exception there ends the work.
    """
    result = ConceptProbes(
        paint,
        folds,
        weights={},
        bias={},
        strengths={},
    )
    patches = len(paint.concept)
    width = max(x.shape[1] for x in states.values())
    site_numel = patches * min(patches, width)
    step = max(1, CHUNK_NUMEL // site_numel)
    names = list(states)
    for start in range(0, len(names), step):
        together = names[start : start + step]
        chunk = {site: states[site] for site in together}
        _solve_sites(chunk, result, check)
    return result


class _FoldSolutions(NamedTuple):
    """Probes of sites without each fold, and what they tell about the probe of all patches.

    Args:
        points: f32[S, F, K, m + 1], of each fold at the strength that is best on the other folds.
        best: i64[S], the number of the strength that is best on all folds.
        mean: f32[S, K, m + 1], mean over the folds' probes at that strength.
    """

    points: Tensor
    best: Tensor
    mean: Tensor


def _solve_sites(
    states: Mapping[str, Tensor],
    result: ConceptProbes,
    check: Callable[[], None],
) -> None:
    """Add the probes of sites to the result."""
    y = result.paint.concept
    scaled = [_Channels(x) for x in states.values()]
    tokens, to_weights = _coordinates([site.x for site in scaled])
    of_folds = _solve_folds(
        tokens,
        y,
        result.folds.of,
        check,
    )
    all_strengths = torch.tensor(CONCEPT_STRENGTHS)
    seen = torch.ones(1, len(y), dtype=torch.bool)
    problem = _Problem(
        tokens,
        y,
        seen,
        all_strengths[of_folds.best],
    )
    of_all = problem.solve(of_folds.mean, TOLERANCE)
    points = torch.cat([of_folds.points, of_all[:, None]], 1).double()
    for s, name in enumerate(states):
        channels = scaled[s]
        scaled_weights = to_weights(s, points[s, ..., :-1])
        weights = scaled_weights * channels.scale.double()
        at_mean = weights @ channels.mean.double()
        bias = points[s, ..., -1] - at_mean
        result.weights[name] = weights.float()
        result.bias[name] = bias.float()
        result.strengths[name] = CONCEPT_STRENGTHS[of_folds.best[s]]


def _solve_folds(
    tokens: Tensor,
    y: Tensor,
    fold_of: Tensor | None,
    check: Callable[[], None],
) -> _FoldSolutions:
    """Return the probes of left-out folds; without folds, none, the middle strength and zeros."""
    sites = len(tokens)
    concepts = int(y.max()) + 1
    if fold_of is None:
        size = tokens.shape[2]
        return _FoldSolutions(
            points=torch.zeros(sites, 0, concepts, size),
            best=torch.full((sites,), len(CONCEPT_STRENGTHS) // 2),
            mean=torch.zeros(sites, concepts, size),
        )
    folds = torch.arange(int(fold_of.max()) + 1)
    held = fold_of == folds[:, None]
    paths, losses = _solve_path(
        tokens,
        y,
        held,
        check,
    )
    total = losses.sum(2)
    of_others = total[..., None] - losses
    of_others = of_others.nan_to_num(torch.inf)  # where not solved
    best_of_others = of_others.argmin(0)
    best = total.argmin(0)
    site = torch.arange(sites)
    return _FoldSolutions(
        points=paths[best_of_others, site[:, None], folds],
        best=best,
        mean=paths[best, site].mean(1),
    )


class _Channels:
    """States f[N, d] with standardised channels, divided by sqrt(d)."""

    def __init__(self, states: Tensor):
        states = states.float()
        self.mean = states.mean(0)
        centred = states - self.mean
        variance = centred.square().mean(0)
        mean_square = states.square().mean(0)
        alive = variance > DEAD * mean_square
        norms = variance.clamp(min=1e-30) * len(variance)
        self.scale = torch.where(alive, norms.rsqrt(), 0)
        self.x = centred * self.scale


def _coordinates(inputs: list[Tensor]) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
    """Return coordinates f32[S, N, m + 1] along principal axes, the last one 1, and what maps weights of them to x."""
    bases = []
    coordinates = []
    for x in inputs:
        # x = r^T basis^T
        patches, channels = x.shape
        if patches < channels:
            basis, r = torch.linalg.qr(x.T)
        else:
            basis = torch.eye(channels)
            r = x.T
        _, axes = torch.linalg.eigh(r @ r.T)
        bases.append(basis @ axes)
        coordinates.append(r.T @ axes)
    most = max(x.shape[1] for x in coordinates)
    padded = []
    for x in coordinates:
        missing = most - x.shape[1]
        padded.append(torch.nn.functional.pad(x, (0, missing)))
    ones = torch.ones(len(inputs), len(inputs[0]), 1)
    tokens = torch.cat([torch.stack(padded), ones], -1)

    def to_weights(site: int, weights: Tensor) -> Tensor:
        basis = bases[site].to(weights)
        unpadded = weights[..., : basis.shape[1]]
        return unpadded @ basis.T

    return tokens, to_weights


def _concept_weights(y: Tensor, used: Tensor) -> Tensor:
    """Return the weights f32[..., N] of patches, of equal sum for each concept and 1 in all, 0 where not `used`."""
    one_hot = torch.nn.functional.one_hot(y)
    of_concept = one_hot.T * used[..., None, :]  # [..., K, N]
    counts = of_concept.sum(-1, keepdim=True)
    shares = of_concept / counts.clamp(min=1)
    return shares.mean(-2)


def _solve_path(
    tokens: Tensor,
    y: Tensor,
    held: Tensor,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Return points f32[R, S, F, K, m + 1] by strength, and the losses f32[R, S, F] of left-out patches.

    A site ends at the first strength that is worse than the one before; later losses are infinite. Each problem starts
    from its own points at the two strengths before, extrapolated, never from a solution of all patches, which has seen
    what the fold leaves out.
    """
    sites, patches, size = tokens.shape
    folds = len(held)
    concepts = int(y.max()) + 1
    all_patches = torch.ones_like(y, dtype=torch.bool)
    weights = held * _concept_weights(y, all_patches)  # [F, N]
    paths = tokens.new_zeros(
        len(CONCEPT_STRENGTHS),
        sites,
        folds,
        concepts,
        size,
    )
    losses = tokens.new_full((len(CONCEPT_STRENGTHS), sites, folds), torch.inf)
    left = torch.arange(sites)
    for r, strength in enumerate(CONCEPT_STRENGTHS):
        check()
        last = max(r - 1, 0)
        x = tokens[left]
        problem = _Problem(
            x,
            y,
            seen=~held,
            strengths=torch.full((len(left) * folds,), strength),
        )
        start = paths[last, left].flatten(0, 1)
        if r > 1:
            before = paths[r - 2, left].flatten(0, 1)
            start = 2 * start - before
        points = problem.solve(start, PATH_TOLERANCE)
        of_site = points.view(len(left), folds * concepts, size)
        logits = x @ of_site.mT
        by_fold = logits.view(
            len(left),
            patches,
            folds,
            concepts,
        )
        of_labels, _ = LOSS.of_pixels(by_fold, y[:, None], needs_grad=False)
        losses[r, left] = (of_labels * weights.T).sum(1)
        paths[r, left] = points.view(
            len(left),
            folds,
            concepts,
            size,
        )
        totals = losses[:, left].sum(2)
        continues = totals[r] <= totals[last]
        left = left[continues]
        if not len(left):
            break
    return paths, losses


class _Problem:
    """The objectives of P = S F problems, those of a site side by side.

    Args:
        tokens: f32[S, N, m + 1], coordinates with a last column of ones.
        y: i64[N], concepts.
        seen: bool[F, N], patches of each problem of a site.
        strengths: f32[P].
    """

    def __init__(
        self,
        tokens: Tensor,
        y: Tensor,
        seen: Tensor,
        strengths: Tensor,
    ):
        self.tokens = tokens
        self.v = _concept_weights(y, seen)
        self.y = y
        self.ridge = strengths[:, None, None].repeat(1, 1, tokens.shape[2])
        self.ridge[..., -1] = 0  # of biases

    def solve(self, start: Tensor, tolerance: float) -> Tensor:
        """Return the minima f32[P, K, m + 1]."""
        concepts = start.shape[1]
        squares = self.v @ self.tokens.square()  # [S, F, m + 1]
        of_problem = squares.flatten(0, 1).unsqueeze(1)
        # at w = 0
        curvature = (concepts - 1) / concepts**2 * of_problem + self.ridge
        diagonal = 1 / curvature.clamp(min=1e-12)
        minimum = minimise(
            self._value_and_gradient,
            start,
            diagonal.expand_as(start),
            tolerance,
            pairs=deque(maxlen=MEMORY),
        )
        return minimum.points

    def _value_and_gradient(self, points: Tensor, which: list[int]) -> tuple[Tensor, Tensor]:
        """Return value f32[p] and gradient of some of the problems at given points, for :func:`minimise`."""
        folds = len(self.v)
        sites = sorted({p // folds for p in which})
        # where the problems are among all of these sites
        at = []
        for p in which:
            site = sites.index(p // folds)
            fold = p % folds
            at.append(site * folds + fold)
        is_all = len(sites) == len(self.tokens)
        x = self.tokens if is_all else self.tokens[sites]
        w = points.new_zeros(len(sites) * folds, *points.shape[1:])
        w[at] = points
        of_site = w.view(len(sites), -1, w.shape[2])
        products = x @ of_site.mT
        logits = products.view(*x.shape[:2], folds, -1)  # [S, N, F, K]
        of_label, error = LOSS.of_pixels(logits, self.y[:, None])
        value = (of_label * self.v.T).sum(1).flatten()
        error *= self.v.T[..., None]
        gradient = error.flatten(2).mT @ x
        gradient = gradient.view_as(w)
        penalty = self.ridge[which] * points
        penalty_value = (penalty * points).sum((1, 2)) / 2
        return value[at] + penalty_value, gradient[at] + penalty
