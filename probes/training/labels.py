"""Masks that probes are trained on: those of their images, or as a control those of other images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.ops.quadrature import PreparedMasks


def shuffle_masks(target: PreparedMasks | Tensor | list[Tensor]) -> PreparedMasks | list[Tensor]:
    """Return the masks rolled by one image, so that no image keeps its own.

    A probe can then learn position and class frequencies only. The pairs change each epoch with the order of images.
    Targets of other tasks are resized to the size of the image, by nearest pixel. A single image in a batch is ignored,
    because there is no other mask.

    Args:
        target: B prepared masks; for other tasks f[B, H, W] or f[B, H, W, 3], or a list of B targets.
    """
    if isinstance(target, PreparedMasks):
        return target[[-1, *range(len(target) - 1)]] if len(target) > 1 else target.without_labels()
    if len(target) == 1:
        return [torch.full_like(target[0], torch.nan)]
    return [_resize_mask(target[i - 1], mask.shape[:2]) for i, mask in enumerate(target)]


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    channels = mask[None] if mask.ndim == 2 else mask.movedim(-1, 0)  # vectors
    resized = F.interpolate(channels[None], size, mode="nearest-exact")[0]
    return resized[0] if mask.ndim == 2 else resized.movedim(0, -1)


# model.labels -> function of the masks of a batch
LABELS = {"true": lambda target: target, "shuffled": shuffle_masks}
