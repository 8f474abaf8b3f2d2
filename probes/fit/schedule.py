"""Learning rates of published protocols, as factors of the highest one."""

import math

WARMUP_RATIO = 1e-6  # of the first step; in the configs of DINOv2 and DINOv3


def rate_factor(step: int, steps: int, decay: str, warmup: int) -> float:
    """Return the factor of the learning rate at a step.

    While it warms up, it is a line from `WARMUP_RATIO` to 1, times a line from 1 to 0 over all steps. Then it is that
    line ("linear"), or half a cosine over all steps ("cosine").

    Source: mmcv's PolyLrUpdaterHook of power 1 with linear warm-up, which DINOv2's configs name; and WarmupOneCycleLR
    of DINOv3 (eval/segmentation/schedulers.py), whose training repeats the first rate, so that all later ones are a
    step late, and whose cosine is a step ahead.

    Args:
        step: From 0.
        steps: Number of all steps.
        decay: "linear" or "cosine".
        warmup: Steps that warm up.
    """
    if decay == "cosine":
        step = max(step - 1, 0)
    line = 1 - step / steps
    if step < warmup:
        return line * (1 - (1 - step / warmup) * (1 - WARMUP_RATIO))
    if decay == "linear":
        return line
    return (1 + math.cos(math.pi * (step + 1) / steps)) / 2
