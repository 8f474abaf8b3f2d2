"""Linear discriminants of a site at every strength of regularisation, in closed form from its moments.

With class means mu_k, overall mean mu and pooled within-class covariance W (`moments.py`), the discriminant of strength
r has the weights W_r^-1 (mu_k - mu) and the bias log(N_k / n) - 1/2 (mu_k - mu)^T W_r^-1 (mu_k - mu), where

    W_r = (1 - r) W + r D,        D = diag(W).

Shrinkage towards the diagonal leaves scores unchanged when a channel is rescaled. With D^-1/2 W D^-1/2 = V diag(s) V^T,

    W_r^-1 = D^-1/2 V diag(1 / ((1 - r) s + r)) V^T D^-1/2,

so that one eigendecomposition gives all r. W_r is also the metric in which `optimum.py` refines the discriminant, and
r/2 w^T D w the ridge that it adds: W_r^-1 (mu_k - mu) minimises w^T W w / 2 - w^T (mu_k - mu) plus this ridge, up to a
factor.

Source: linear discriminant analysis with shrinkage (Ledoit and Wolf 2004; Friedman 1989).
Legend: R strengths, K classes, d width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10 ** (-6 + i / 4) for i in range(25))  # 1e-6 to 1
# A channel whose variance is below this share of its mean square is constant up to rounding of float32 states.
DEAD = 1e-12


@dataclass
class ClosedForm:
    """The discriminants of a site for any strength.

    Args:
        mean: f64[d], mu; logits are linear in x - mean.
        scale: f64[d], D^-1/2; 0 for constant channels.
        basis: f64[d, d], V, one eigenvector per column.
        spectrum: f64[d], s.
        directions: f64[K, d], (mu_k - mu) D^-1/2 V.
        log_prior: f64[K], log(N_k / n). A class without pixels has half a pixel.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    spectrum: Tensor
    directions: Tensor
    log_prior: Tensor

    def metric(self, strength: float) -> Tensor:
        """Return the eigenvalues of W_r in units of D, f64[d]."""
        return (1 - strength) * self.spectrum + strength

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """Return weights f64[K, d] in the coordinates (x - mean) D^-1/2 V, and biases f64[K]."""
        weights = self.directions / self.metric(strength)
        return weights, self.log_prior - (weights * self.directions).sum(1) / 2

    def to_states(self, weights: Tensor) -> Tensor:
        """Return weights f[..., K, d] of the coordinates (x - mean) D^-1/2 V as weights of x - mean."""
        return (weights @ self.basis.T) * self.scale

    def coordinates(self, states: Tensor) -> Tensor:
        """Return states f[..., d] in the coordinates, f32[..., d + 1], with a last column of ones for biases."""
        x = (states.float() - self.mean.float()) * self.scale.float() @ self.basis.float()
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient f[..., K, d] by weights of x - mean as the gradient by weights of the coordinates."""
        return (gradient * self.scale) @ self.basis


def solve_moments(count: Tensor, first: Tensor, second: Tensor, pivot: Tensor) -> ClosedForm:
    """Return the discriminants that follow from moments.

    Args:
        count: f64[K], N.
        first: f64[K, d], S.
        second: f64[d, d], Q.
        pivot: f[d], what was subtracted from the states.
    """
    total = count.sum()
    seen = count > 0
    overall = first.sum(0) / total
    means = torch.where(seen[:, None], first / count.clamp(min=1e-30)[:, None], overall)
    within = second / total - (means * (count / total)[:, None]).T @ means
    square = second.diagonal() / total + (pivot.double() + overall).square()
    scale, spectrum, basis = standardise(within, square)
    directions = ((means - overall) * scale) @ basis
    log_prior = torch.where(seen, count, 0.5).log() - total.log()
    mean = pivot.double() + overall
    parts = (mean, scale, basis, spectrum, directions, log_prior)
    return ClosedForm(*(part.contiguous() for part in parts))  # eigh's basis is not, and is sent between processes


def standardise(covariance: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return D^-1/2 f64[d], and the eigenvalues f64[d] and eigenvectors f64[d, d] of D^-1/2 covariance D^-1/2.

    Args:
        covariance: f64[d, d].
        square: f64[d], mean square of each channel, which tells constant channels from small ones.
    """
    variance = covariance.diagonal()
    alive = variance > DEAD * square
    scale = torch.where(alive, variance.clamp(min=1e-300).rsqrt(), 0)
    spectrum, basis = torch.linalg.eigh(scale[:, None] * covariance * scale)
    return scale, spectrum.clamp(min=0), basis
