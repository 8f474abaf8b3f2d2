"""The states of some training images in memory, for cross-validation and for the curvature of the loss.

Legend: F folds, R strengths, B images, T tokens, d width, K classes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from probes.data.batches import group_by_mask_size
from probes.evaluation.metrics import IGNORE_INDEX
from probes.ops.cross_entropy import subsample, upsampled_cross_entropy

from .distributed import all_reduce

if TYPE_CHECKING:
    from probes.models.frozen_mllm import FrozenMLLM

IMAGES = 128  # about so many per chunk


class Chunk(NamedTuple):
    """Images of one fold and one mask size, on the CPU."""

    fold: int
    states: Tensor  # f[B, T, d], in the dtype of the model
    target: Tensor  # uint8[B, H, W]


def centre(states: Tensor, mean: Tensor) -> Tensor:
    """Return x - mean, f32[B, T, d], on the device of the mean f[d]."""
    return states.to(mean.device, torch.float32) - mean.float()


class StateSample:
    """States and masks of images with their folds; this process holds its share of the images.

    Args:
        mllm: The model, for grid and geometry.
        label_stride: As for `ProbeModule`.
        folds: F.
    """

    def __init__(self, mllm: "FrozenMLLM", label_stride: int, folds: int):
        self.mllm, self.label_stride, self.fold_count = mllm, label_stride, folds
        self.clear()

    def clear(self) -> None:
        """Remove all images."""
        self.states: dict[str, list[Tensor]] = {}
        self.targets: list[Tensor] = []
        self.folds: list[int] = []

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

    def loss_options(self, masks: Tensor) -> dict[str, Any]:
        """Return `view` and `label_stride` of the loss and of soft labels for masks [B, H, W]."""
        return {"view": self.mllm.geometry.view(tuple(masks.shape[-2:])), "label_stride": self.label_stride}

    def count_labelled(self, masks: Tensor) -> Tensor:
        """Return the number of labelled pixels that the loss uses."""
        return (subsample(masks, self.label_stride) != IGNORE_INDEX).sum()

    def labelled(self) -> Tensor:
        """Return the labelled pixels in each fold, of all processes, f64[F]."""
        pixels = torch.zeros(self.fold_count, dtype=torch.float64, device=self.mllm.device)
        for fold, masks in zip(self.folds, self.targets, strict=True):
            pixels[fold] += self.count_labelled(masks)
        return all_reduce(pixels)

    def held_out_loss(self, site: str, probes: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Return the mean cross-entropy f64[R] of all images, each under the probes solved without its fold.

        Args:
            site: The site.
            probes: For each fold the mean f[d], weights f[R, K, d] of x - mean, and biases f[R, K].
        """
        total = torch.zeros(len(probes[0][1]), dtype=torch.float64, device=self.mllm.device)
        for fold, states, masks in self.chunks(site):
            mean, weights, bias = probes[fold]
            logits = torch.einsum("btd,rkd->rbkt", centre(states, mean), weights) + bias[:, None, :, None]
            logits, masks = logits.unflatten(-1, self.mllm.grid), masks.to(logits.device)
            total += upsampled_cross_entropy(logits, masks, reduction="sum", **self.loss_options(masks))
        return (all_reduce(total) / self.labelled().sum()).cpu()
