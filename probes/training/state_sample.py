"""The states of some training images in memory, for cross-validation and for the curvature of the loss."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from probes.data.batches import group_by_mask_size

IMAGES = 128  # about so many per chunk


class Chunk(NamedTuple):
    """Images of one fold and one mask size."""

    fold: int
    states: Tensor  # f[B, T, d], in the dtype of the model, on the CPU
    target: Tensor  # uint8[B, H, W]


@dataclass
class StateSample:
    """Chunks of images by site; this process holds its share of the images."""

    states: dict[str, list[Tensor]] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)
    folds: list[int] = field(default_factory=list)

    def add(self, states: dict[str, Tensor], target: Tensor | list[Tensor], fold: int) -> None:
        """Add the images of a batch, all of one fold."""
        for images, masks in group_by_mask_size(target):
            self.targets.append(masks.cpu())
            self.folds.append(fold)
            for site, x in states.items():
                self.states.setdefault(site, []).append(x[images].cpu())

    def chunks(self, site: str) -> Iterator[Chunk]:
        """Yield the chunks of a site; batches of the same fold and mask size are joined."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (fold, target) in enumerate(zip(self.folds, self.targets, strict=True)):
            alike.setdefault((fold, *target.shape[1:]), []).append(i)
        for (fold, *_), batches in alike.items():
            per_chunk = -(-IMAGES // len(self.targets[batches[0]]))
            for first in range(0, len(batches), per_chunk):
                chosen = batches[first : first + per_chunk]
                join = lambda parts, chosen=chosen: torch.cat([parts[i] for i in chosen])
                yield Chunk(fold, join(self.states[site]), join(self.targets))
