"""Logits of windows of a photo, composed crop by crop."""

import torch
from torch.nn import functional as F


def compose(outputs: torch.Tensor, size: tuple[int, int], px: int, stride: int) -> torch.Tensor:
    """Return logits f[K, H, W] of windows f[windows, K, h, w], as a loop over crops makes them.

    Source: slide_inference and make_inference, facebookresearch/dinov3 at 6876159, eval/segmentation/inference.py.
    """
    height, width = (int(px * side / min(size) + 0.5) for side in size)
    total = torch.zeros(outputs.shape[1], height, width, dtype=outputs.dtype)
    seen = torch.zeros(height, width)
    windows = iter(outputs)
    for row in range(max(height - px + stride - 1, 0) // stride + 1):
        for column in range(max(width - px + stride - 1, 0) // stride + 1):
            bottom = min(row * stride + px, height)
            right = min(column * stride + px, width)
            place = (..., slice(bottom - px, bottom), slice(right - px, right))
            logits = F.interpolate(next(windows)[None], (px, px), mode="bilinear")
            total[place] += logits[0]
            seen[place] += 1
    assert next(windows, None) is None
    return F.interpolate((total / seen)[None], size, mode="bilinear")[0]
