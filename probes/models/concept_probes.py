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

LOSS = TASKS[SEGMENTATION].loss
CONCEPT_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FOLDS = 5
# Predicted decrease in nats, of folds and of all patches. At 1e-5, weak strengths look better than they are.
PATH_TOLERANCE = 1e-6
TOLERANCE = 1e-7
MEMORY = 12  # pairs of L-BFGS; in the coordinates of the patches' axes, 40 take as many steps
# variance of a constant channel relative to its mean square, up to rounding of float32
DEAD = 1e-12
CHUNK_NUMEL = 2**25  # coordinates of the sites that are solved together


class Paint(NamedTuple):
    """Painted patches of photos.

    Args:
        concept: i64[N], 0 .. K-1, each at least once.
        photo: i64[N], 0 .. P-1.
        patch: i64[N], number of the patch in its photo.
    """

    concept: Tensor
    photo: Tensor
    patch: Tensor


class Folds(NamedTuple):
    """How painted patches are left out.

    Args:
        of: i64[N], fold of each patch; None if a concept has one patch only, so that none can be left out.
        by_photo: True if all patches of a photo are in one fold.
    """

    of: Tensor | None
    by_photo: bool


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
        return states.float() @ self.weights[site][-1].mT + self.bias[site][-1]

    def left_out(self, states: Tensor, site: str) -> Tensor:
        """Return the concept i64[N] of each painted patch by the probe that has not seen it, from states f[N, d]."""
        fold = self.folds.of
        weights = self.weights[site][fold]
        bias = self.bias[site][fold]
        return ((weights @ states.float()[..., None]).squeeze(-1) + bias).argmax(-1)


def make_folds(paint: Paint, photo_width: int) -> Folds:
    """Leave photos out if each concept is painted on several, else blocks of patches.

    Args:
        paint: The patches.
        photo_width: Columns of the grid.
    """
    by_photo = _folds_of_photos(paint)
    if by_photo is not None:
        return Folds(by_photo[paint.photo], True)
    return Folds(_folds_of_blocks(paint, photo_width), False)


def _folds_of_photos(paint: Paint) -> Tensor | None:
    """Return the fold i64[P] of each photo; None if a concept would be in no photo of the other folds."""
    photos = int(paint.photo.max()) + 1
    concepts = int(paint.concept.max()) + 1
    shown = torch.zeros(photos, concepts, dtype=torch.bool)
    shown[paint.photo, paint.concept] = True
    fold_of = torch.full((photos,), -1)
    count = min(FOLDS, photos)
    rarest_first = shown.sum(0).argsort(stable=True).tolist()
    # photos of the rarest concept go into different folds
    for concept in rarest_first:
        with_concept = shown[:, concept]
        for photo in (with_concept & (fold_of < 0)).nonzero().flatten().tolist():
            fullness = []
            for fold in range(count):
                in_fold = fold_of == fold
                fullness.append((int((with_concept & in_fold).sum()), int(in_fold.sum())))
            fold_of[photo] = fullness.index(min(fullness))
    for fold in range(count):
        left = shown[fold_of != fold]
        if not left.any(0).all():
            return None
    return fold_of


def _folds_of_blocks(paint: Paint, photo_width: int) -> Tensor | None:
    """Return the fold i64[N] of each patch: the patches of a concept, cut along their longer side.

    None if a concept has one patch only.
    """
    sizes = paint.concept.bincount()
    count = min(FOLDS, int(sizes.min()))
    if count < 2:
        return None
    fold = torch.empty_like(paint.concept)
    row = paint.patch // photo_width
    column = paint.patch % photo_width
    for concept, size in enumerate(sizes.tolist()):
        mine = (paint.concept == concept).nonzero().flatten()
        sides = [row[mine], column[mine]]
        longer, shorter = sorted(sides, key=lambda side: -int(side.max() - side.min()))
        photo = paint.photo[mine]
        place = photo * photo_width**2 * 4 + longer * photo_width * 2 + shorter
        order = mine[place.argsort()]
        fold[order] = torch.arange(size) * count // size
    return fold


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
        folds: See :func:`make_folds`. Without folds, the middle one of the strengths is taken.
        check: Called before each strength of a group of sites; an exception there ends the work.
    """
    result = ConceptProbes(paint, folds, {}, {}, {})
    patches = len(paint.concept)
    width = max(x.shape[1] for x in states.values())
    step = max(1, CHUNK_NUMEL // (patches * min(patches, width)))
    names = list(states)
    for start in range(0, len(names), step):
        _solve_sites({site: states[site] for site in names[start : start + step]}, result, check)
    return result


def _solve_sites(
    states: Mapping[str, Tensor], result: ConceptProbes, check: Callable[[], None]
) -> None:
    """Add the probes of sites to the result."""
    y = result.paint.concept
    fold_of = result.folds.of
    sites = len(states)
    scaled = [_Channels(x) for x in states.values()]
    tokens, to_weights = _coordinates([site.x for site in scaled])
    points = torch.zeros(sites, 0, int(y.max()) + 1, tokens.shape[2])  # [S, F, K, m + 1]
    # [S, F + 1], the last one of all patches
    best = torch.full((sites, 1), len(CONCEPT_STRENGTHS) // 2)
    start = points.new_zeros(sites, *points.shape[2:])
    if fold_of is not None:
        folds = torch.arange(int(fold_of.max()) + 1)
        held = fold_of == folds[:, None]
        paths, losses = _solve_path(tokens, y, held, check)
        total = losses.sum(2, keepdim=True)
        of_others = (total - losses).nan_to_num(torch.inf)  # infinite where not solved
        best = torch.cat([of_others, total], 2).argmin(0)
        site = torch.arange(sites)
        points = paths[best[:, :-1], site[:, None], folds]
        start = paths[best[:, -1], site].mean(1)
    seen = torch.ones(1, len(y), dtype=torch.bool)
    strengths = torch.tensor(CONCEPT_STRENGTHS)[best[:, -1]]
    of_all = _Problem(tokens, y, seen, strengths).solve(start, TOLERANCE)
    points = torch.cat([points, of_all[:, None]], 1)
    for s, (name, site) in enumerate(zip(states, scaled, strict=True)):
        weights = to_weights(s, points[s, ..., :-1].double()) * site.scale.double()
        result.weights[name] = weights.float()
        at_mean = weights @ site.mean.double()
        result.bias[name] = (points[s, ..., -1].double() - at_mean).float()
        result.strengths[name] = CONCEPT_STRENGTHS[best[s, -1]]


class _Channels:
    """States f[N, d] with standardised channels, divided by sqrt(d)."""

    def __init__(self, states: Tensor):
        states = states.float()
        self.mean = states.mean(0)
        variance = (states - self.mean).square().mean(0)
        alive = variance > DEAD * states.square().mean(0)
        norms = variance.clamp(min=1e-30) * len(variance)
        self.scale = torch.where(alive, norms.rsqrt(), 0)
        self.x = (states - self.mean) * self.scale


def _coordinates(inputs: list[Tensor]) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
    """Return coordinates f32[S, N, m + 1] along principal axes, the last one 1, and what maps weights of them to x."""
    bases = []
    coordinates = []
    for x in inputs:
        # x = r^T basis^T
        if len(x) < x.shape[1]:
            basis, r = torch.linalg.qr(x.T)
        else:
            basis = torch.eye(x.shape[1])
            r = x.T
        axes = torch.linalg.eigh(r @ r.T)[1]
        bases.append(basis @ axes)
        coordinates.append(r.T @ axes)
    width = max(x.shape[1] for x in coordinates)
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in coordinates]
    ones = torch.ones(len(inputs), len(inputs[0]), 1)

    def to_weights(site: int, weights: Tensor) -> Tensor:
        basis = bases[site].to(weights)
        return weights[..., : basis.shape[1]] @ basis.T

    return torch.cat([torch.stack(padded), ones], -1), to_weights


def _concept_weights(y: Tensor, used: Tensor) -> Tensor:
    """Return the weights f32[..., N] of patches, of equal sum for each concept and 1 in all, 0 where not `used`."""
    of_concept = torch.nn.functional.one_hot(y).T * used[..., None, :]  # [..., K, N]
    return (of_concept / of_concept.sum(-1, keepdim=True).clamp(min=1)).mean(-2)


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
    sites, patches, _ = tokens.shape
    folds = len(held)
    concepts = int(y.max()) + 1
    weights = held * _concept_weights(y, torch.ones_like(y, dtype=torch.bool))  # [F, N]
    paths = tokens.new_zeros(
        len(CONCEPT_STRENGTHS),
        sites,
        folds,
        concepts,
        tokens.shape[2],
    )
    losses = tokens.new_full((len(CONCEPT_STRENGTHS), sites, folds), torch.inf)
    left = torch.arange(sites)
    for r, strength in enumerate(CONCEPT_STRENGTHS):
        check()
        problem = _Problem(tokens[left], y, ~held, torch.full((len(left) * folds,), strength))
        start = paths[max(r - 1, 0), left].flatten(0, 1)
        if r > 1:
            before = paths[r - 2, left].flatten(0, 1)
            start = 2 * start - before
        points = problem.solve(start, PATH_TOLERANCE)
        logits = tokens[left] @ points.view(len(left), folds * concepts, -1).mT
        logits = logits.view(len(left), patches, folds, concepts)
        of_labels, _ = LOSS.of_pixels(logits, y[:, None], needs_grad=False)
        losses[r, left] = (of_labels * weights.T).sum(1)
        paths[r, left] = points.view(len(left), folds, concepts, -1)
        totals = losses[:, left].sum(2)
        left = left[totals[r] <= totals[max(r - 1, 0)]]
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
        # at w = 0
        curvature = (concepts - 1) / concepts**2 * squares.flatten(0, 1)[:, None] + self.ridge
        diagonal = (1 / curvature.clamp(min=1e-12)).expand_as(start)
        return minimise(
            self._value_and_gradient,
            start,
            diagonal,
            tolerance,
            pairs=deque(maxlen=MEMORY),
        ).points

    def _value_and_gradient(self, points: Tensor, which: list[int]) -> tuple[Tensor, Tensor]:
        """Return value f32[p] and gradient of some of the problems at given points, for :func:`minimise`."""
        folds = len(self.v)
        rows = sorted({p // folds for p in which})
        at = torch.tensor([rows.index(p // folds) * folds + p % folds for p in which])
        x = self.tokens if len(rows) == len(self.tokens) else self.tokens[rows]
        w = points.new_zeros(len(rows) * folds, *points.shape[1:])
        w[at] = points
        of_site = w.view(len(rows), -1, w.shape[2])
        logits = (x @ of_site.mT).view(*x.shape[:2], folds, -1)  # [S, N, F, K]
        of_label, error = LOSS.of_pixels(logits, self.y[:, None])
        value = (of_label * self.v.T).sum(1).flatten()
        error *= self.v.T[..., None]
        gradient = (error.flatten(2).mT @ x).view_as(w)
        penalty = self.ridge[which] * points
        return value[at] + (penalty * points).sum((1, 2)) / 2, gradient[at] + penalty
