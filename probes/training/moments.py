"""First and second moments of the states of a site, from which its linear discriminants follow in closed form.

With x the state of a token and t[k] the weight of class k at the token (U^T onehot(label), the adjoint of the bilinear
upsampling), a pass over the images sums, per site and per fold of images,

    N[k] = sum t[k]        S[k] = sum t[k] (x - pivot)        Q = sum (sum_k t[k]) (x - pivot) (x - pivot)^T.

The pivot, the mean state of the first batch, keeps Q small: LLMs have channels whose mean is a thousand times their
standard deviation, and Q would lose their variance to rounding. Products of a batch are float32, sums over batches
float64; `tests/probes/training/test_closed_form.py` shows why.

Legend: F folds, K classes, d width, n tokens of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 512  # rows of Q per product; Q is symmetric, so that blocks below the diagonal are neither computed nor stored


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
    def zeros(cls, pivot: Tensor, folds: int, classes: int) -> "Moments":
        """Return empty moments on the device of `pivot`."""
        new = lambda *shape: torch.zeros(folds, *shape, dtype=torch.float64, device=pivot.device)
        width = len(pivot)
        return cls(pivot, new(classes), new(classes, width), new(packed_size(width)))

    @torch.no_grad()
    def update(self, states: Tensor, labels: Tensor, fold: int) -> None:
        """Add the states f[n, d] of tokens with soft labels f64[n, K] to a fold."""
        labels = labels.to(self.count.device)
        x = states.to(self.pivot) - self.pivot
        self.count[fold] += labels.sum(0)
        with full_precision():
            self.first[fold] += labels.T.float() @ x
        self.add_products(x, x * labels.sum(1, keepdim=True).float(), fold)

    def add_products(self, x: Tensor, weighted: Tensor, fold: int) -> None:
        """Add x^T weighted, symmetric, to Q of a fold; both are f[n, d]."""
        with full_precision():
            for start, block in row_blocks(self.second[fold], x.shape[1]):
                block += x[:, start : start + BLOCK].T @ weighted[:, start:]

    def shift(self, pivot: Tensor) -> None:
        """Change the pivot to f32[d]; exact, since the sums are polynomials in it."""
        delta = self.pivot.double() - pivot.double()
        for count, first, second in zip(self.count.sum(1), self.first.sum(1), self.second, strict=True):
            for start, block in row_blocks(second, len(delta)):
                rows, columns = slice(start, start + BLOCK), slice(start, None)
                block += torch.outer(first[rows], delta[columns]) + torch.outer(delta[rows], first[columns])
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
        return {"count": self.count, "first": self.first, "second": self.second}

    def without(self, fold: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return N f64[K], S f64[K, d] and Q f64[d, d] of all folds but one; of all for None."""
        return self.sum_over([i for i in range(len(self.count)) if i != fold])

    def sum_over(self, folds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return N f64[K], S f64[K, d] and Q f64[d, d] of some folds."""
        count, first = self.count[folds].sum(0), self.first[folds].sum(0)
        packed, second = self.second[folds].sum(0), first.new_empty(first.shape[1], first.shape[1])
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
        rows, columns = min(BLOCK, width - start), width - start
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
