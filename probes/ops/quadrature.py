"""Segmentation masks as weights on a few nodes in each cell of the token grid.

Between four neighbouring tokens the upsampled logits are bilinear in the position, so a smooth function of them needs
only a few Gauss-Legendre nodes in each cell instead of all pixels. The pixels of a cell give the nodes their weights,
by Lagrange interpolation along each axis:

    sum_px f(position of px)  ~  sum_nodes mass[node] f(position of node)

- The sum is exact if f is a polynomial of degree `nodes - 1` or less along each axis of a cell. A constant and the
  logits themselves are, whatever pixels are ignored.
- Beyond the outermost tokens the upsampling is constant, so one node there is exact.
- A weight can be negative where ignored pixels cut a cell. Clamping it would make the sum wrong.
- An axis with at most as many different pixel positions as nodes uses the positions as nodes; the sum is then exact.

Legend: B masks, K classes, h w token grid, H W pixels, My Mx nodes of all rows and columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .bilinear import bilinear_weights
from .geometry import AxisExtent, GridPlacement, label_tensor
from .kernels import sum_dtype

TENSORS = ("mass", "soft", "pixels")  # with a row for each mask


@dataclass(frozen=True)
class PreparedMasks:
    """B masks of any size, prepared for :func:`probes.upsampled_cross_entropy` on one token grid.

    Args:
        mass: f[B, My, Mx], weight of each node: the labelled pixels that it represents.
        soft: f[B, K, h, w], T = U^T onehot(labels): weight of each class at each token; see `cross_entropy.py`.
        pixels: f64[B], labelled pixels of each mask.
        rules: Interpolation from tokens to nodes, (f[My, h], f[Mx, w]), one for each kind of placement.
        rule_of: Index of each mask's entry in `rules`.
    """

    mass: Tensor
    soft: Tensor
    pixels: Tensor
    rules: tuple[tuple[Tensor, Tensor], ...]
    rule_of: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.mass)

    def __getitem__(self, images: slice | Sequence[int]) -> "PreparedMasks":
        """Return some of the masks, by slice or list of indices."""
        chosen = range(len(self))[images] if isinstance(images, slice) else images
        index = images if isinstance(images, slice) else list(images)
        rule_of = tuple(self.rule_of[i] for i in chosen)
        rows = {name: getattr(self, name)[index] for name in TENSORS}
        return replace(self, **rows, rule_of=rule_of)

    def to(self, device: torch.device | str) -> "PreparedMasks":
        """Return the masks on a device."""
        rules = tuple((rows.to(device), cols.to(device)) for rows, cols in self.rules)
        return replace(
            self,
            mass=self.mass.to(device),
            soft=self.soft.to(device),
            pixels=self.pixels.to(device, sum_dtype(device)),
            rules=rules,
        )

    def groups(self) -> list[tuple[slice | list[int], Tensor, Tensor]]:
        """Return (images, rows f[My, h], cols f[Mx, w]) for each rule in use."""
        if len(set(self.rule_of)) == 1:
            return [(slice(None), *self.rules[self.rule_of[0]])]
        used = sorted(set(self.rule_of))
        return [
            ([i for i, own in enumerate(self.rule_of) if own == rule], *self.rules[rule])
            for rule in used
        ]


def join_masks(parts: Iterable[PreparedMasks], images: int | None = None) -> PreparedMasks:
    """Return the masks of several objects as one; they must have the same grid, classes and number of nodes.

    Args:
        parts: The objects. Of an iterator, one is in memory at a time, as the masks of a data set can be gigabytes.
        images: Number of all masks; needed of an iterator.
    """
    if images is None:
        parts = list(parts)
        images = sum(map(len, parts))
    tensors: dict[str, Tensor] = {}
    rules: list[tuple[Tensor, Tensor]] = []
    rule_of: list[int] = []
    for part in parts:
        index = [_find_rule(rules, rule) for rule in part.rules]
        rows = slice(len(rule_of), len(rule_of) + len(part))
        rule_of += [index[own] for own in part.rule_of]
        for name in TENSORS:
            x = getattr(part, name)
            if name not in tensors:
                tensors[name] = x.new_empty(images, *x.shape[1:])
            tensors[name][rows] = x
    return PreparedMasks(**tensors, rules=tuple(rules), rule_of=tuple(rule_of))


def add_up_masks(
    parts: Iterable[PreparedMasks], group_of: Sequence[int]
) -> tuple[PreparedMasks, list[int]]:
    """Return the sums of masks of a group, one for each kind of placement, and the group of each sum.

    The loss of logits that are the same for all images of a group is that of their sum.

    Args:
        parts: One mask each.
        group_of: Group of each.
    """
    rules: list[tuple[Tensor, Tensor]] = []
    sums: dict[tuple[int, int], dict[str, Tensor]] = {}
    for group, part in zip(group_of, parts, strict=True):
        (rule,) = part.rules
        of_group = sums.setdefault((group, _find_rule(rules, rule)), {})
        for name in TENSORS:
            of_group[name] = of_group.get(name, 0) + getattr(part, name).double()
    joined = {name: torch.cat([x[name] for x in sums.values()]) for name in TENSORS}
    masks = PreparedMasks(
        mass=joined["mass"].float(),
        soft=joined["soft"].float(),
        pixels=joined["pixels"],
        rules=tuple(rules),
        rule_of=tuple(rule for _, rule in sums),
    )
    return masks, [group for group, _ in sums]


def _find_rule(rules: list[tuple[Tensor, Tensor]], rule: tuple[Tensor, Tensor]) -> int:
    """Return the index of a rule, which is appended if it is new."""
    for i, known in enumerate(rules):
        if all(a is b or torch.equal(a, b) for a, b in zip(known, rule, strict=True)):
            return i
    rules.append(rule)
    return len(rules) - 1


def prepare_masks(
    target: Tensor,
    num_classes: int,
    grid: tuple[int, int],
    nodes: int | None = 3,
    ignore_index: int = 255,
    *,
    view: GridPlacement | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreparedMasks:
    """Return masks as weights on the token grid. It costs about 10 ms a mask of 512 x 683, once for all probes.

    Args:
        target: Integer [B, H, W], classes 0 .. K-1 or `ignore_index`; or bool, classes 0 and 1.
        num_classes: K.
        grid: (h, w).
        nodes: Nodes per cell and axis, at least 2. None: the pixels are the nodes, so that the loss is exact.
        ignore_index: Label of the pixels that are excluded.
        view: Position of the grid on the pixels; None: the grid covers them exactly.
        dtype: Of the weights: float32, or float64 for logits in float64.

    Raises:
        ValueError: `target` is not an integer [B, H, W], `nodes` is below 2, or a label is neither a class nor
            `ignore_index`. Labels are checked on a CPU only, since that would synchronise a GPU.
    """
    target = label_tensor(target)
    if target.ndim != 3:
        raise ValueError(f"expected masks [B, H, W], got {list(target.shape)}")
    if nodes is not None and nodes < 2:
        raise ValueError(f"nodes must be at least 2, or None for all pixels; got {nodes}")
    if not (0 <= ignore_index <= 255 and num_classes <= 256):
        target = target.long()  # uint8 would wrap them
    size = target.shape[1:]
    labelled = target != ignore_index
    like = {"dtype": dtype, "device": target.device}
    view = view or GridPlacement.full(size)
    rows, cols = (
        _prepare_axis(n, pixels=pixels, extent=extent, nodes=nodes, like=like)
        for n, pixels, extent in zip(grid, size, view, strict=True)
    )
    with torch.autocast(target.device.type, enabled=False):
        mass = rows.to_pixels.T @ labelled.to(dtype) @ cols.to_pixels
        soft = torch.zeros(len(target), num_classes, *grid, **like)
        for k in _classes_in(target, num_classes, ignore_index):
            soft[:, k] = rows.bilinear.T @ (target == k).to(dtype) @ cols.bilinear
    return PreparedMasks(
        mass=mass,
        soft=soft,
        pixels=labelled.sum((1, 2)).to(sum_dtype(target.device)),
        rules=((rows.from_tokens, cols.from_tokens),),
        rule_of=(0,) * len(target),
    )


class _Axis(NamedTuple):
    """Weights of one axis: n tokens, m nodes, P pixels."""

    from_tokens: Tensor  # [m, n], of the nodes' logits
    to_pixels: Tensor  # [P, m]: how much of each pixel's loss is that of a node
    bilinear: Tensor  # [P, n]


def _prepare_axis(n: int, pixels: int, extent: AxisExtent, nodes: int | None, like: dict) -> _Axis:
    from_tokens, to_pixels = axis_rule(n, pixels=pixels, extent=extent, nodes=nodes)
    return _Axis(
        from_tokens=from_tokens.to(**like),
        to_pixels=to_pixels.to(**like),
        bilinear=bilinear_weights(n, n_out=pixels, extent=extent, **like),
    )


def _classes_in(target: Tensor, classes: int, ignore_index: int) -> list[int]:
    """Return the classes in the masks, or all classes where reading the labels would synchronise a GPU."""
    if target.device.type != "cpu":
        return [k for k in range(classes) if k != ignore_index]
    labels = target.flatten()
    found = (
        labels.bincount().nonzero().flatten() if target.dtype == torch.uint8 else labels.unique()
    )
    found = [label for label in found.tolist() if label != ignore_index]
    for label in found:
        if not 0 <= label < classes:
            raise ValueError(
                f"label {label} is neither a class in [0, K={classes}) nor ignore_index={ignore_index}"
            )
    return found


@lru_cache(maxsize=1024)
def axis_rule(
    tokens: int, pixels: int, extent: AxisExtent, nodes: int | None
) -> tuple[Tensor, Tensor]:
    """Return the nodes of an axis: interpolation from the tokens, f64[M, tokens], and to pixels, f64[pixels, M].

    M is 2 + nodes * (tokens - 1), or with `nodes=None` the number of different pixel positions. The tensors are cached;
    do not modify them.
    """
    # a tensor cached during validation must be usable in training
    with torch.inference_mode(False):
        at = extent.grid_coordinate(tokens, pixels).clamp(0, tokens - 1)
        places, place_of = at.unique(return_inverse=True)
        count = len(places) if nodes is None else 2 + nodes * (tokens - 1)
        if len(places) <= count:
            to_pixels = F.one_hot(place_of, count).double()
            return _from_tokens(F.pad(places, (0, count - len(places))), tokens), to_pixels
        gauss = torch.from_numpy((np.polynomial.legendre.leggauss(nodes)[0] + 1) / 2)
        inner = torch.arange(tokens - 1, dtype=torch.float64)[:, None] + gauss
        places = F.pad(F.pad(inner.flatten(), (1, 0)), (0, 1), value=tokens - 1)
        to_pixels = at.new_zeros(pixels, count)
        to_pixels[at <= 0, 0] = 1
        to_pixels[at >= tokens - 1, -1] = 1
        inside = ((at > 0) & (at < tokens - 1)).nonzero().flatten()
        cell = at[inside].long()
        column = 1 + cell[:, None] * nodes + torch.arange(nodes)
        to_pixels[inside[:, None], column] = _lagrange(at[inside] - cell, gauss)
        return _from_tokens(places, tokens), to_pixels


def _from_tokens(places: Tensor, tokens: int) -> Tensor:
    """Return the linear interpolation f64[M, tokens] of tokens at places f64[M] in 0 .. tokens - 1."""
    at = torch.arange(tokens, dtype=torch.float64)
    return (1 - (places[:, None] - at).abs()).clamp(min=0)


def _lagrange(x: Tensor, nodes: Tensor) -> Tensor:
    """Return the weights f64[N, n] by which a polynomial through n nodes is evaluated at x f64[N]."""
    apart = nodes[:, None] - nodes + torch.eye(len(nodes), dtype=nodes.dtype)
    from_others = x[:, None, None] - nodes  # [N, 1, n]; factor 1 in place of the node's own
    own = torch.eye(len(nodes), dtype=torch.bool)
    return torch.where(own, 1, from_others / apart).prod(-1)
