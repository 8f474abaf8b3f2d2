"""Linear discriminants with a probe for each position, in closed form from moments of one pass.

A probe that all positions share reads states whose class means differ from position to position, as they do under a
causal mask: patch 0 has no context, the last patch has all of it. Here a class k has a mean and a frequency at each
position t,

    mu_tk = mu_k + a_tk (m_tk - mu_k),        a_tk = N_tk / (N_tk + c),        c = s / (1 - s) * n / T,
    pi_tk = (N_tk + c N_k / n) / (N_t + c),

with m_tk the mean of its tokens there, and mu_k the shared mean. This is empirical Bayes: mu_tk is the posterior mean
under mu_tk ~ N(mu_k, W / c). c is counted in pixels, n / T the pixels that a position has on average. The shrinkage s
is 0 for separate means and 1 for the shared probe of `closed_form.py`. The covariance W is that within the cells (t, k)
about the means mu_tk, pooled over all of them: one covariance per position would take T x d x d numbers, 77 GB for 24 x
24 tokens of width 4,096.

    It can express   a class that lies elsewhere at another position, or is more frequent there.
    It cannot        noise whose directions differ between positions: the metric W is shared.

Strength r and shrinkages s are chosen by cross-validated likelihood of the training tokens, each with its soft label:
one r for all positions, s for each position. The shared probe is chosen in the same way, with s = 1.

Legend: F folds, T positions, K classes, d width, B images, R strengths, S shrinkages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .closed_form import STRENGTHS as ALL_STRENGTHS
from .closed_form import ClosedForm, class_means, discriminants
from .moments import Moments, full_precision

STRENGTHS = ALL_STRENGTHS[::4]  # decades: each takes a product of all states of a pass with all S x T x K means
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # half decades, and both ends


@dataclass
class PositionMoments:
    """Moments of one site with class counts and sums per position.

    Args:
        pooled: Moments over all positions.
        count: f64[F, T, K].
        first: f64[F, T, K, d], sums of the states less the pivot of `pooled`.
    """

    pooled: Moments
    count: Tensor
    first: Tensor

    @classmethod
    def zeros(cls, pivot: Tensor, folds: int, positions: int, classes: int) -> "PositionMoments":
        """Return empty moments on the device of `pivot`."""
        new = lambda *shape: torch.zeros(folds, positions, classes, *shape, dtype=torch.float64, device=pivot.device)
        return cls(Moments.zeros(pivot, folds, classes), new(), new(len(pivot)))

    @torch.no_grad()
    def update(self, states: Tensor, labels: Tensor, fold: int) -> None:
        """Add images with states f[B, T, d] and soft labels f64[B, T, K] to a fold."""
        labels = labels.to(self.count.device)
        self.pooled.update(states.flatten(0, 1), labels.flatten(0, 1), fold)
        self.count[fold] += labels.sum(0)
        with full_precision():
            x = states.to(self.pooled.pivot) - self.pooled.pivot
            self.first[fold] += labels.permute(1, 2, 0).float() @ x.transpose(0, 1)

    def without(self, fold: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return N f64[T, K], S f64[T, K, d] and Q f64[d, d] of all folds but one; of all for None."""
        kept = [i for i in range(len(self.count)) if i != fold]
        return self.count[kept].sum(0), self.first[kept].sum(0), self.pooled.without(fold)[2]


def solve_positions(count: Tensor, first: Tensor, second: Tensor, pivot: Tensor, shrinkage: float) -> ClosedForm:
    """Return the discriminants of all positions; their T * K rows are sorted by position.

    Args:
        count: f64[T, K], N_tk.
        first: f64[T, K, d], sums of the states less the pivot.
        second: f64[d, d], Q.
        pivot: f[d].
        shrinkage: s in [0, 1].
    """
    total, class_count = count.sum(), count.sum(0)
    shared, within = class_means(class_count, first.sum(0), second)
    # A class that never occurs at a position is at its shared mean there.
    difference = torch.where((count > 0)[..., None], first / count.clamp(min=1e-30)[..., None] - shared, 0)
    prior = shrinkage * total / len(count)
    own = (1 - shrinkage) * count / ((1 - shrinkage) * count + prior).clamp(min=1e-30)
    # The sum of N_tk (m_tk - mu_k) over t is zero, so that W differs from the shared one by a sum of squares.
    explained = ((count / total * own * (2 - own))[..., None] * difference).flatten(0, 1)
    within = within - explained.T @ difference.flatten(0, 1)
    overall = first.sum((0, 1)) / total
    centred = shared - overall + own[..., None] * difference
    square = second.diagonal() / total + (pivot.double() + overall).square()
    pixels = (1 - shrinkage) * count + prior * torch.where(class_count > 0, class_count, 0.5) / total
    log_prior = (torch.where(pixels > 0, pixels, 0.5) / pixels.sum(1, keepdim=True).clamp(min=0.5)).log()
    return discriminants(centred.flatten(0, 1), log_prior.flatten(), within, square, pivot.double() + overall)


@torch.no_grad()
def token_losses(form: ClosedForm, strengths: Sequence[float], states: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the tokens at each position, f64[R, T], in nats.

    Args:
        form: From :func:`solve_positions`.
        strengths: R strengths.
        states: f[B, T, d].
        labels: Soft labels f64[B, T, K].
    """
    by_position = lambda x: x.unflatten(0, labels.shape[1:])
    x = (states.to(form.mean) - form.mean) * form.scale @ form.basis
    losses = []
    for strength in strengths:
        weights, bias = map(by_position, form.solve(strength))
        logits = torch.einsum("btd,tkd->btk", x, weights) + bias
        losses.append(-(labels * logits.log_softmax(-1)).sum((0, 2)))
    return torch.stack(losses)


def choose(losses: Tensor) -> tuple[int, Tensor]:
    """Return the index of the best strength for all positions, and of the best shrinkage of each position, i64[T].

    Args:
        losses: f64[S, R, T], cross-validated.
    """
    lowest, shrinkage = losses.min(0)
    strength = int(lowest.sum(1).argmin())
    return strength, shrinkage[strength]


@dataclass
class PositionProbes:
    """Linear probes of all positions of a site.

    Args:
        mean: f32[d], subtracted from the states.
        weights: f32[T, K, d].
        bias: f32[T, K].
    """

    mean: Tensor
    weights: Tensor
    bias: Tensor

    @classmethod
    def solve(
        cls, moments: PositionMoments, strength: float, shrinkages: Sequence[float], chosen: Tensor
    ) -> "PositionProbes":
        """Return the probes of one strength, with the shrinkage `shrinkages[chosen[t]]` at position t."""
        probes = None
        for i in chosen.unique().tolist():
            form = solve_positions(*moments.without(None), moments.pooled.pivot, shrinkages[i])
            weights, bias = (x[0].unflatten(0, moments.count.shape[1:]) for x in form.path([strength]))
            probes = probes or cls(form.mean.float(), torch.empty_like(weights), torch.empty_like(bias))
            probes.weights[chosen == i], probes.bias[chosen == i] = weights[chosen == i], bias[chosen == i]
        return probes

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits f32[B, T, K] of states f[B, T, d]."""
        return torch.einsum("btd,tkd->btk", states.float() - self.mean, self.weights) + self.bias
