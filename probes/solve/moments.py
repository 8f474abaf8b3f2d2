"""Moments of the states of a site, and the coordinates in which `objective.py` and `least_squares.py` solve its probes.

With x the state of a token and t[k] the weight of class k at the token (U^T onehot(label), the adjoint of the bilinear
upsampling), a pass over the images sums, per site and per fold of images,

    N[k] = sum t[k]        S[k] = sum t[k] (x - pivot)        Q = sum (sum_k t[k]) (x - pivot) (x - pivot)^T.

The pivot, the mean state of the first batch, keeps Q small: LLMs have channels whose mean is a thousand times their
standard deviation, and Q would lose their variance to rounding. Products of a batch are float32, sums over batches
float64; `tests/probes/solve/test_closed_form.py` shows why.

With the pooled within-class covariance W and D = diag(W), D^-1/2 W D^-1/2 = V diag(s) V^T gives coordinates
(x - mean) D^-1/2 V in which D is the identity and W is diag(s).

Legend: F folds, K classes, d width, n tokens of a batch, P problems solved together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# A channel whose variance is below this share of its mean square is constant up to rounding of float32 states.
DEAD = 1e-12
# rows of Q per product; Q is symmetric, so that blocks below the diagonal are neither computed nor stored
BLOCK = 512


@dataclass
class Moments:
    """Moments of one site, per fold of images.

    Args:
        pivot: f32[d], subtracted from the states.
        count: f64[F, K], N.
        first: f64[F, K, d], S.
        second: f64[F, packed_size(d)], Q: the blocks of rows from the diagonal on, one after the other.
    """

    pivot: Tensor
    count: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zeros(
        cls,
        pivot: Tensor,
        folds: int,
        classes: int,
    ) -> "Moments":
        """Return empty moments on the device of `pivot`."""

        def new(*shape):
            return torch.zeros(folds, *shape, dtype=torch.float64, device=pivot.device)

        width = len(pivot)
        return cls(pivot, new(classes), new(classes, width), new(packed_size(width)))

    @torch.no_grad()
    def update(
        self,
        states: Tensor,
        labels: Tensor,
        fold: int,
    ) -> None:
        """Add the states f[n, d] of tokens with soft labels f64[n, K] to a fold."""
        labels = labels.to(self.count.device)
        x = states.to(self.pivot) - self.pivot
        self.count[fold] += labels.sum(0)
        with full_precision():
            self.first[fold] += labels.T.float() @ x
        self.add_products(x, x * labels.sum(1, keepdim=True).float(), fold)

    def add_products(
        self,
        x: Tensor,
        weighted: Tensor,
        fold: int,
    ) -> None:
        """Add x^T weighted, symmetric, to Q of a fold; both are f[n, d]."""
        with full_precision():
            for start, block in row_blocks(self.second[fold], x.shape[1]):
                block += x[:, start : start + BLOCK].T @ weighted[:, start:]

    def shift(self, pivot: Tensor) -> None:
        """Change the pivot to f32[d]; exact, since the sums are polynomials in it."""
        delta = self.pivot.double() - pivot.double()
        for count, first, second in zip(
            self.count.sum(1), self.first.sum(1), self.second, strict=True
        ):
            for start, block in row_blocks(second, len(delta)):
                rows = slice(start, start + BLOCK)
                columns = slice(start, None)
                block += torch.outer(first[rows], delta[columns]) + torch.outer(
                    delta[rows], first[columns]
                )
                block += count * torch.outer(delta[rows], delta[columns])
        self.first += self.count[:, :, None] * delta
        self.pivot = pivot

    def add(self, other: "Moments") -> None:
        """Add the moments of other images."""
        other.shift(self.pivot)
        for name, value in other.sums().items():
            getattr(self, name).add_(value.to(self.count.device))

    def sums(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {
            "count": self.count,
            "first": self.first,
            "second": self.second,
        }

    def without(self, fold: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return N f64[K], S f64[K, d] and Q f64[d, d] of all folds but one; of all for None."""
        return self.sum_over([i for i in range(len(self.count)) if i != fold])

    def sum_over(self, folds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return N f64[K], S f64[K, d] and Q f64[d, d] of some folds."""
        count = self.count[folds].sum(0)
        first = self.first[folds].sum(0)
        packed = self.second[folds].sum(0)
        second = first.new_empty(first.shape[1], first.shape[1])
        for start, block in row_blocks(packed, first.shape[1]):
            second[start : start + BLOCK, start:] = block
        upper = second.triu_()
        return count, first, upper + upper.triu(1).T


def packed_size(width: int) -> int:
    """Return the number of elements of Q f64[d, d] that are stored."""
    return sum(min(BLOCK, width - start) * (width - start) for start in range(0, width, BLOCK))


def row_blocks(packed: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of each block, and a view of its rows from the diagonal on, f64[rows, d - first row]."""
    offset = 0
    for start in range(0, width, BLOCK):
        rows = min(BLOCK, width - start)
        columns = width - start
        yield start, packed[offset : offset + rows * columns].view(rows, columns)
        offset += rows * columns


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


@dataclass
class SiteSpace:
    """The coordinates of a site.

    Args:
        mean: f64[d]; logits are linear in x - mean.
        scale: f64[d], D^-1/2; 0 for constant channels.
        basis: f64[d, d], V, one eigenvector per column.
        spectrum: f64[d], s.
        pixels: f64[K], N of all images.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    spectrum: Tensor
    pixels: Tensor

    @classmethod
    def of(cls, states: Tensor, soft: Tensor) -> "SiteSpace":
        """Return the coordinates of states f[B, T, d] with soft labels f[B, K, h, w]."""
        moments = Moments.zeros(states[0].float().mean(0), 1, soft.shape[1])
        by_token = soft.flatten(2).mT
        for x, labels in zip(states.split(32), by_token.split(32), strict=True):
            moments.update(x.flatten(0, 1), labels.flatten(0, 1).double(), 0)
        return cls.of_moments(moments)

    @classmethod
    def of_moments(cls, moments: Moments) -> "SiteSpace":
        """Return the coordinates of the tokens of some moments."""
        count, first, second = moments.without(None)
        total = count.sum()
        seen = count > 0
        overall = first.sum(0) / count.sum()
        means = torch.where(seen[:, None], first / count.clamp(min=1e-30)[:, None], overall)
        within = second / total - (means * (count / total)[:, None]).T @ means
        mean = moments.pivot.double() + overall
        scale, spectrum, basis = standardise(within, second.diagonal() / total + mean.square())
        # basis is sent between processes
        return cls(
            mean,
            scale,
            basis.contiguous(),
            spectrum,
            count,
        )

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

    def to_states(self, weights: Tensor) -> Tensor:
        """Return weights f[..., K, d] of the coordinates as weights of x - mean."""
        return (weights @ self.basis.T) * self.scale

    def coordinates(self, states: Tensor) -> Tensor:
        """Return states f[..., d] in the coordinates, f32[..., d + 1], with a last column of ones for biases."""
        scaled = (states.float() - self.mean.float()) * self.scale.float()
        x = scaled @ self.basis.float()
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient f[..., K, d] by weights of x - mean as the gradient by weights of the coordinates."""
        return (gradient * self.scale) @ self.basis


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
