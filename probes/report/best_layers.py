"""Which of two runs reads better: from the scores of their layers to a finding.

The difference of the best layers has an interval that holds whichever are best, and the p-value is 1 minus the level of
the widest such interval without 0. The pairs of a report, of models and of masks, are a family of their own: findings
are corrected for their number (Holm), and no claim's correction counts them.

    better, worse   the second run, by the margin at least, with 0 outside the interval and p_holm below 5%
    no effect       the 90% interval is within the margin (two one-sided tests)
    negligible      the same, and it excludes 0
    undecided       all else; "detectable" is the smallest difference that 80% of such studies find

Shapes: R resamplings, A layers of the first run, B of the second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import holm, largest_distances
from probes.runs.formatting import Entry
from probes.score.estimate import Estimate, normal_quantile, widening_for
from probes.tasks import Task

from .verdicts import ALPHA, FEWEST_UNITS, POWER, UNDECIDED, equivalence

BEST_LAYER = "best layer"
BETTER = "better"
WORSE = "worse"
BAND = 2.6  # standard deviations that the half width of a band of all layers is about


@dataclass(frozen=True)
class BestDifference:
    """The difference of the best layers of two runs.

    Args:
        first_value: Best score of the first run.
        second_value: Of the second one.
        interval: At 95%.
        equivalence_interval: At 90%, as two one-sided tests at 5% use it.
        p: 1 minus the level of the widest interval without 0, widened for few photos.
        half_width: Of the 95% interval, widened for few photos.
    """

    first_value: float
    second_value: float
    interval: tuple[float, float]
    equivalence_interval: tuple[float, float]
    p: float
    half_width: float

    @property
    def value(self) -> float:
        """The second minus the first."""
        return self.second_value - self.first_value

    def row(self, task: Task, units: int) -> Entry:
        """Return its columns of the table of differences; the finding is not yet corrected for other pairs."""
        low, high = self.interval
        return {
            "first_value": self.first_value,
            "second_value": self.second_value,
            "difference": self.value,
            "low": low,
            "high": high,
            "p": self.p,
            "finding": self.finding(task, units),
            "detectable": detectable_difference(self.half_width, task.margin),
        }

    def finding(self, task: Task, units: int) -> str:
        """Return what the pair by itself says, from `units` photos or groups of these."""
        return find_difference(
            task,
            value=self.value,
            ci95=self.interval,
            ci90=self.equivalence_interval,
            p=self.p,
            units=units,
        )


def find_difference(
    task: Task,
    *,
    value: float,
    ci95: Sequence[float],
    ci90: Sequence[float],
    p: float | None,
    units: int,
) -> str:
    """Return what a difference from so many photos or groups of these says; without a test, none is better."""
    low, high = ci95
    if units < FEWEST_UNITS:
        return UNDECIDED
    is_clear = p is not None and p < ALPHA and (low > 0 or high < 0)
    if is_clear and abs(value) >= task.margin:
        if task.sign * value > 0:
            return BETTER
        return WORSE
    return equivalence(ci90, task.margin)


def difference_of_best(
    sign: int, first: Sequence[Estimate], second: Sequence[Estimate], counts: Sequence[float]
) -> BestDifference:
    """Return the difference of the best of the second scores and the best of the first.

    The interval holds whichever are best: with bounds on all differences D of one score and another together, the
    difference of maxima, max min D, is between the max min of the lower bounds and that of the upper ones. An interval
    of the two that are best on these images says of equal models up to twice too often that they differ, and one of
    layers that cross-validation has chosen up to six times (`experiments/statistics/model_pairs.py`).

    Args:
        sign: 1 if a higher score is better, else -1.
        first: Scores of one run's layers, from the same resamplings as those of the other's.
        second: Of the other's.
        counts: Photos, or groups of these, and those of a class (:meth:`Estimate.widened`).
    """
    scores_of_first = sign * torch.stack([score.vector for score in first], 1)  # [1 + R, A]
    scores_of_second = sign * torch.stack([score.vector for score in second], 1)
    differences = scores_of_second[:, :, None] - scores_of_first[:, None, :]  # [1 + R, B, A]
    observed = differences[0]
    sd, distances = largest_distances(differences[1:].flatten(1))
    sd = sd.view_as(observed)
    factor = distances.quantile(0.95)
    interval = _interval_of_maxima(sign, observed, half=factor * sd)
    widening = widening_for(counts[0])
    factor_of_equivalence = math.prod(map(widening_for, counts)) * distances.quantile(1 - 2 * ALPHA)
    return BestDifference(
        first_value=sign * scores_of_first[0].max().item(),
        second_value=sign * scores_of_second[0].max().item(),
        interval=interval,
        equivalence_interval=_interval_of_maxima(sign, observed, half=factor_of_equivalence * sd),
        p=_p_of_maxima(observed, sd=sd, distances=widening * distances),
        half_width=widening * (interval[1] - interval[0]) / 2,
    )


def detectable_difference(half_width: float, margin: float) -> float:
    """Return the smallest difference that is found in 80% of studies with intervals of this half width."""
    return max(half_width, margin) + normal_quantile(POWER) * half_width / BAND


def _interval_of_maxima(sign: int, differences: Tensor, half: Tensor) -> tuple[float, float]:
    """Return the bounds of the difference of maxima from bands around all differences f[B, A]."""
    bounds = []
    for band in (differences - half, differences + half):
        bounds.append(sign * band.amin(1).amax().item())
    return min(bounds), max(bounds)


def _p_of_maxima(differences: Tensor, sd: Tensor, distances: Tensor) -> float:
    """Return the share of resamplings with a largest distance as large as the widest band without 0 has.

    A band of q standard deviations excludes 0 on either side if q is below the absolute value of max min D / sd.
    """
    ratios = (differences / sd).nan_to_num(nan=0.0)  # 0 / 0: a layer that both runs have
    widest = ratios.amin(1).amax().abs()
    beyond = (distances >= widest).sum().item()
    return (1 + beyond) / (1 + len(distances))


def correct_for_pairs(rows: Sequence[Entry]) -> None:
    """Add "p_holm" to the rows of best layers of a report: "p" corrected for the pairs of the same task, data and seed.

    A finding that the correction undoes is undecided.
    """
    families: dict[tuple, list[Entry]] = {}
    for row in rows:
        if row["of"] == BEST_LAYER:
            family = row["task"], row["data"], row["seed"]
            families.setdefault(family, []).append(row)
    for family in families.values():
        corrected = holm([row["p"] for row in family])
        for row, p_holm in zip(family, corrected, strict=True):
            row["p_holm"] = p_holm
            if row["finding"] in (BETTER, WORSE) and p_holm >= ALPHA:
                row["finding"] = UNDECIDED
