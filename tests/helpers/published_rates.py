"""Learning rates of published protocols, update by update."""

import math


def rates_of_dinov3(steps: int, warmup: int) -> list[float]:
    """Return the rates of all updates, as train.py of DINOv3 steps its WarmupOneCycleLR (eval/segmentation)."""
    rates = []
    counter = 0  # of the scheduler
    for update in range(steps):
        if counter < warmup:
            missing = (1 - counter / warmup) * (1 - 1e-6)
            rate = (1 - missing) * (1 - counter / steps)
        else:
            rate = (math.cos(math.pi * (counter + 1) / steps) + 1) / 2
        rates.append(rate)
        counter += update > 0  # "inheritance from old mmcv code"
    return rates


def rates_of_mmcv(steps: int, warmup: int) -> list[float]:
    """Return the rates of all updates of mmcv's PolyLrUpdaterHook with power 1, min_lr 0 and linear warm-up."""
    rates = []
    for update in range(steps):
        regular = (1 - update / steps) ** 1.0
        if update < warmup:
            regular *= 1 - (1 - update / warmup) * (1 - 1e-6)
        rates.append(regular)
    return rates
