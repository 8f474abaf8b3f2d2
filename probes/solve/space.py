"""Moments of the states of a site, and the coordinates in which `objective.py` solves its probes.

With x the state of a token and t[k] the weight of class k at the token (U^T onehot(label), the adjoint of the bilinear
upsampling), moments are, per fold of images,

    N[k] = sum t[k]        S[k] = sum t[k] (x - pivot)        Q = sum (sum_k t[k]) (x - pivot) (x - pivot)^T.

The pivot, the mean state of the first image, keeps Q small: LLMs have channels whose mean is a thousand times their
standard deviation, and Q would lose their variance to rounding. Products of some images are float32, sums over them
float64; `tests/probes/solve/test_closed_form.py` shows why.

With the pooled within-class covariance W and D = diag(W), D^-1/2 W D^-1/2 = V diag(s) V^T gives coordinates
(x - mean) D^-1/2 V in which D is the identity and W is diag(s).

Legend: F folds, B images, T tokens, K classes, d width, n tokens of some images, P problems solved together.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.ops.kernels import limit_on

# A channel whose variance is below this share of its mean square is constant up to rounding of float32 states.
DEAD = 1e-12
# Rows of Q per product; Q is symmetric, so that blocks below the diagonal are not computed.
BLOCK = 512
# Numbers of states, or of their logits, at a time: on a CPU 4 MB, which its cache holds between passes. But at least as
# many tokens as channels: adding up moments would take longer than their products.
CHUNK_NUMEL = {"cpu": 2**20, "cuda": 2**24}


class Moments(NamedTuple):
    """Moments of the tokens of some images.

    Args:
        count: f64[K], N.
        first: f64[K, d], S.
        second: f64[d, d], Q.
    """

    count: Tensor
    first: Tensor
    second: Tensor


def moments_of(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Moments:
    """Return the moments of tokens that come in parts.

    Args:
        parts: x f[n, d], states minus the pivot, in the dtype of the products; soft labels f64[n, K]; and weighted
            f[n, d], where x^T weighted is symmetric and goes into Q.
    """
    count = first = second = 0
    for x, labels, weighted in parts:
        count = count + labels.sum(0)
        first = first + (labels.T.to(x) @ x).double()
        blocks = [
            F.pad(x[:, start : start + BLOCK].T @ weighted[:, start:], (start, 0))
            for start in range(0, x.shape[1], BLOCK)
        ]
        second = second + torch.cat(blocks).double()
    upper = second.triu()
    return Moments(count, first, upper + upper.triu(1).T)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products in the dtype of their factors, whatever `trainer.precision` is, and float32 ones without TF32.

    The 10 bits of TF32 would limit the smallest eigenvalue that is found, and the gradients that certify an optimum.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def float_chunks(
    states: Tensor, images: Tensor, mean: Tensor, rows: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield some images after others, with x - mean of their tokens, f[n, d], on the device of the mean.

    Args:
        states: f[B, T, d], x, of any dtype, on any device.
        images: i64[n], on the CPU.
        mean: f64[d].
        rows: Of the matrix that they are multiplied with.
        dtype: Of what is returned.
    """
    _, tokens, width = states.shape
    mean = mean.to(dtype)
    most = max(width, limit_on(mean.device, CHUNK_NUMEL) // max(rows, width))
    for part in images.split(max(1, most // tokens)):
        x = states.index_select(0, part.to(states.device)).to(mean.device).to(dtype)
        yield part.tolist(), x.sub_(mean).flatten(0, 1)


@dataclass
class SiteSpace:
    """The coordinates of a site.

    Args:
        mean: f64[d]; logits are linear in x - mean.
        scale: f64[d], D^-1/2; 0 for constant channels.
        basis: f32[d, d], V, one eigenvector per column.
        spectrum: f64[d], s.
        pixels: f64[K], N of all images.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    spectrum: Tensor
    pixels: Tensor

    @classmethod
    @full_precision()
    def of(cls, states: Tensor, soft: Tensor) -> "SiteSpace":
        """Return the coordinates of states f[B, T, d], on the device of their soft labels f[B, K, h, w]."""
        pivot = states[0].to(soft.device).float().mean(0)

        def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for part, x in float_chunks(
                states, images=torch.arange(len(states)), mean=pivot, rows=0
            ):
                labels = soft[part].flatten(2).mT.flatten(0, 1).double()
                yield x, labels, x * labels.sum(1, keepdim=True).float()

        count, first, second = moments_of(parts())
        total = count.sum()
        overall = first.sum(0) / total
        means = torch.where((count > 0)[:, None], first / count.clamp(min=1e-30)[:, None], overall)
        within = second / total - (means * (count / total)[:, None]).T @ means
        mean = pivot.double() + overall
        scale, spectrum, basis = standardise(within, second.diagonal() / total + mean.square())
        return cls(mean, scale, basis.float().contiguous(), spectrum, count)

    @property
    def input_spectrum(self) -> Tensor:
        """The mean squares of the inputs of probes f64[d + 1]: s, and 1 for the ones of biases."""
        return torch.cat([self.spectrum, self.spectrum.new_ones(1)])

    def ridge(self, strengths: Tensor) -> Tensor:
        """Return the weights f64[P, 1, d + 1] of the squares of points at strengths f64[P]; 0 for biases."""
        ridge = strengths[:, None, None].repeat(1, 1, len(self.spectrum) + 1)
        ridge[..., -1] = 0
        return ridge

    def whitened_norm(self, gradient: Tensor, strengths: Tensor) -> Tensor:
        """Return the norms f64[P] of gradients f64[P, K, d + 1] in coordinates that whiten the states.

        Args:
            gradient: Gradients of P problems, by points.
            strengths: f64[P].
        """
        metric = self.input_spectrum + self.ridge(strengths)
        return (gradient / metric.sqrt()).flatten(1).norm(dim=1)

    @full_precision()
    def to_states(self, points: Tensor) -> Tensor:
        """Return points f64[..., K, d + 1] of the coordinates as weights of x - mean, and biases."""
        weights = (points[..., :-1].float() @ self.basis.T).double() * self.scale
        return torch.cat([weights, points[..., -1:]], -1)

    @full_precision()
    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient f64[..., K, d + 1] by weights of x - mean, and biases, as that by points."""
        weights = ((gradient[..., :-1] * self.scale).float() @ self.basis).double()
        return torch.cat([weights, gradient[..., -1:]], -1)

    @full_precision()
    def coordinates(self, states: Tensor) -> Tensor:
        """Return states f[..., d] in the coordinates, f32[..., d + 1], with a last column of ones for biases."""
        scaled = (states.float() - self.mean.float()) * self.scale.float()
        x = scaled @ self.basis
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)


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
