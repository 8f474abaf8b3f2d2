"""Normal equations of least squares between bilinearly upsampled maps and targets per pixel, on the token grid.

With X the states of an image's tokens, U the bilinear upsampling (`bilinear.py`), D the labelled pixels (1 or 0 on the
diagonal) and y the target, the squared error of a linear probe with weights W at the resolution of the target is

    sum_px D |(U X W - y)|^2   =   <W, X^T G X W> - 2 <W, X^T T> + sum_px D |y|^2        G = U^T D U,  T = U^T D y.

A pixel lies between at most two grid rows and two grid columns, so that G couples a token with its eight neighbours
only. A pixel couples the tokens (i, j) and (i + 1, j + 1) as much as (i, j + 1) and (i + 1, j): G has four different
diagonals. It is exact, for any placement of the grid, and takes no more memory than the target.

Legend: B images, K channels, d width, h w grid, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .bilinear import bilinear_weights
from .geometry import GridPlacement


@dataclass(frozen=True)
class NormalEquations:
    """The part of the normal equations of B images that does not depend on the states.

    Args:
        couplings: f64[B, h - i, w - j] by (i, j), i and j 0 or 1: entries of G for tokens i rows and j columns apart.
        weight: f64[B, h * w], row sums of G: how many labelled pixels each token has. The rows of U sum to 1, so that
            this is also U^T D 1, and the sum over tokens is the number of labelled pixels.
        projected: f64[B, h * w, K], T.
        square: f64[B, K], sum of the squared targets over the labelled pixels of each image.
    """

    couplings: dict[tuple[int, int], Tensor]
    weight: Tensor
    projected: Tensor
    square: Tensor

    def __getitem__(self, images: Sequence[int]) -> "NormalEquations":
        """Return those of some of the images, by index."""
        index = list(images)
        couplings = {apart: x[index] for apart, x in self.couplings.items()}
        others = self.weight[index], self.projected[index], self.square[index]
        return NormalEquations(couplings, *others)


def join_equations(parts: Sequence[NormalEquations]) -> NormalEquations:
    """Return the normal equations of the images of several objects, on one grid, as one."""
    couplings = {
        apart: torch.cat([part.couplings[apart] for part in parts]) for apart in parts[0].couplings
    }
    others = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("weight", "projected", "square")
    )
    return NormalEquations(couplings, *others)


def add_up_equations(equations: NormalEquations, group_of: Tensor) -> NormalEquations:
    """Return the sums of the normal equations of each group, from the group of each image, i64[B]."""
    groups = int(group_of.max()) + 1

    def add_up(x: Tensor) -> Tensor:
        return x.new_zeros(groups, *x.shape[1:]).index_add_(0, group_of, x)

    couplings = {apart: add_up(x) for apart, x in equations.couplings.items()}
    others = equations.weight, equations.projected, equations.square
    return NormalEquations(couplings, *map(add_up, others))


def normal_equations(target: Tensor, grid: tuple[int, int], view: GridPlacement) -> NormalEquations:
    """Return the normal equations of targets f[B, H, W, K]; a pixel with a NaN in any channel is not labelled.

    Args:
        target: f[B, H, W, K].
        grid: (h, w).
        view: Position of the grid on the pixels.
    """
    size = target.shape[1:3]
    like = {"dtype": torch.float64, "device": target.device}
    rows = bilinear_weights(grid[0], n_out=size[0], extent=view.rows, **like)
    cols = bilinear_weights(grid[1], n_out=size[1], extent=view.cols, **like)
    target = target.double()
    labelled = target.isfinite().all(-1)
    y = torch.where(labelled[..., None], target, 0)
    valid = labelled.double()

    def apart(axis, steps):
        return axis[:, : axis.shape[1] - steps] * axis[:, steps:]

    couplings = {}
    for i, j in product((0, 1), repeat=2):
        couplings[i, j] = apart(rows, i).T @ valid @ apart(cols, j)
    projected = rows.T @ y.permute(0, 3, 1, 2) @ cols  # [B, K, h, w]
    weight = rows.T @ valid @ cols
    return NormalEquations(
        couplings=couplings,
        weight=weight.flatten(1),
        projected=projected.flatten(2).mT,
        square=y.square().sum((1, 2)),
    )


def apply_gram(
    couplings: dict[tuple[int, int], Tensor], states: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Return G X, f[B, h * w, d], of states X f[B, h * w, d]."""
    h, w = grid
    x = states.unflatten(1, grid)
    total = torch.zeros_like(x)

    def part(steps, length):
        return slice(max(0, steps), length + min(0, steps))

    for i, j in product((-1, 0, 1), repeat=2):
        coupling = couplings[abs(i), abs(j)].to(x)[..., None]
        neighbour = x[:, part(i, h), part(j, w)]
        total[:, part(-i, h), part(-j, w)] += coupling * neighbour
    return total.flatten(1, 2)
