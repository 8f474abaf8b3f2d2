"""Bootstrap intervals and paired permutation tests over images or questions ("units").

Units of one group, such as the images of a city, resemble each other. They can be drawn and swapped together.

Shapes: R resamplings, N units, S statistics.
"""

import math

import torch
from torch import Tensor

RESAMPLINGS = 2000


def bootstrap_weights(
    units: int, resamplings: int = RESAMPLINGS, seed: int = 0, groups: Tensor | None = None
) -> Tensor:
    """Return f[R, N], the number of times each unit is drawn. Sharing the weights makes a comparison paired.

    Args:
        units: N.
        resamplings: R.
        seed: Seed of the draws.
        groups: long[N], the group of each unit. Groups are then drawn with all their units (cluster bootstrap). With
            None or a single group, units are drawn.
    """
    group_of, count = _group_indices(units, groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamplings, count), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.float32)
    times = torch.zeros(resamplings, count)
    times.scatter_add_(1, drawn, ones)
    return times[:, group_of]


def random_swaps(
    units: int, permutations: int = RESAMPLINGS, seed: int = 0, groups: Tensor | None = None
) -> Tensor:
    """Return f[1 + R, N], 1 where the two conditions of a pair exchange a unit. Row 0, the observed one, is zero.

    Args:
        units: N.
        permutations: R.
        seed: Seed of the draws.
        groups: long[N], as in :func:`bootstrap_weights`: units of a group are swapped together.
    """
    group_of, count = _group_indices(units, groups)
    generator = torch.Generator().manual_seed(seed)
    swaps = torch.randint(2, (permutations, count), generator=generator)
    observed = torch.zeros(1, count)
    of_groups = torch.cat([observed, swaps])
    return of_groups[:, group_of]


def _group_indices(units: int, groups: Tensor | None) -> tuple[Tensor, int]:
    """Return the index of each unit's group, long[N], and the number of groups."""
    if groups is not None:
        names, group_of = torch.unique(groups, return_inverse=True)
        if len(names) > 1:
            return group_of, len(names)
    return torch.arange(units), units


def interval(
    estimate: float,
    resampled: Tensor,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    level: float = 0.95,
) -> list[float]:
    """Return the interval of an estimate at a level, from its values f[R] under resampling.

    The half width is the quantile at this level of their distance from their mean, as in :func:`simultaneous_band`.
    So the interval contains its estimate. The mean of resampled mIoU is biased, since rare classes drop out of
    resamplings. The basic bootstrap subtracts this bias; of differences between sites it then covers 81% instead of
    91% where 24 images have 23 classes, and the same where classes are frequent
    (`experiments/statistics/intervals.py`). What is beyond the range of the estimate, `lowest` to `highest`, is cut
    off.
    """
    defined = resampled[~resampled.isnan()].double()
    if not len(defined):
        return [math.nan, math.nan]
    distance = (defined - defined.mean()).abs()
    half = distance.quantile(level).item()
    low = max(estimate - half, lowest)
    high = min(estimate + half, highest)
    return [low, high]


def simultaneous_band(values: Tensor, resampled: Tensor) -> tuple[Tensor, Tensor]:
    """Return low and high f[S] of a 95% band that covers all S values together (max-t).

    The half width at a value is its standard deviation over resamplings times one factor: the 95% quantile, over
    resamplings, of the largest distance from the mean in standard deviations.

    Args:
        values: f[S].
        resampled: f[R, S]. Resamplings with a value that is not defined are left out.
    """
    spread, largest = largest_distances(resampled)
    half = largest.quantile(0.95) * spread
    return values - half, values + half


def largest_distances(resampled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviations f[S] of values over resamplings f[R, S], and the largest distance f[R] in each.

    A distance is one from the mean, in standard deviations. Resamplings with a value that is not defined are left out.
    """
    is_undefined = resampled.isnan().any(1)
    resampled = resampled[~is_undefined].double()
    sd = resampled.std(0)
    distance = (resampled - resampled.mean(0)).abs()
    in_sds = torch.where(sd > 0, distance / sd, 0.0)
    return sd, in_sds.amax(1)


def p_values(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Return two-sided p-values of a permutation test: per statistic, and corrected for their number, f[S] each.

    The corrected values compare each statistic with the largest one of the same permutation, each divided by its own
    spread. Source: max-T, single step (Westfall and Young). They control the family-wise error rate under any
    dependence between the statistics.

    Args:
        differences: f[1 + R, S], observed in row 0 and permuted in the others. The observed row counts as a
            permutation, so that no p-value is below 1 / (1 + R).
    """
    size = differences.double().abs()
    spread = size.square().mean(0).sqrt()
    size = torch.where(spread > 0, size / spread, 0.0)
    threshold = size[0] * (1 - 1e-9)  # equal sums differ by rounding when added in another order
    is_reached = size >= threshold
    largest = size.amax(1, keepdim=True)
    is_reached_by_largest = largest >= threshold
    p = is_reached.double().mean(0)
    corrected = is_reached_by_largest.double().mean(0)
    return p, corrected


def holm(p: list[float]) -> list[float]:
    """Return p-values of several tests, adjusted to control the family-wise error rate (Holm 1979)."""
    tests = torch.tensor(p, dtype=torch.float64)
    ordered, rank = tests.sort()
    tests_left = torch.arange(len(p), 0, -1)
    products = ordered * tests_left
    steps = products.cummax(0).values.clamp(max=1)
    adjusted = torch.empty_like(steps)
    adjusted[rank] = steps
    return adjusted.tolist()
