"""A number with its resamplings: from sums over images, and with the interval and the p-value that follow.

Shapes: R resamplings, N images, S sites, M sums per image of a task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from scipy import special
from torch import Tensor

from llava_bidir.common.bootstrap import interval
from probes.tasks import Task

SMALLEST_P = 1e-12


class EstimateEntry(TypedDict):
    """A number in a file."""

    value: float
    ci95: list[float]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its values under resampling.

    Two estimates from the same units, resampled with the same seed, are paired: their difference has the values of the
    differences. This is why a claim can be the difference of two of them.

    Args:
        value: The number.
        resampled: Its values under resampling, f[R].
        about: What else is known of it, as JSON: "n", what it is a mean over, and more.
    """

    value: float
    resampled: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_vector(cls, vector: Tensor, about: Mapping[str, Any] | None = None) -> "Estimate":
        """Return the estimate of a vector f[1 + R]."""
        return cls(vector[0].item(), vector[1:], about or {})

    @classmethod
    def mean(cls, estimates: Sequence["Estimate"]) -> "Estimate":
        """Return the mean of estimates from the same resamplings."""
        total = sum(estimate.value for estimate in estimates)
        resampled = torch.stack([estimate.resampled for estimate in estimates])
        mean_resampled = resampled.double().mean(0)
        return cls(total / len(estimates), mean_resampled)

    @property
    def vector(self) -> Tensor:
        """The value, then those under resampling, f64[1 + R]."""
        value = torch.tensor([self.value], dtype=torch.float64)
        return torch.cat([value, self.resampled.double()])

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference of two estimates from the same resamplings; it is about what the first one is."""
        difference = self.value - other.value
        resampled = self.resampled - other.resampled
        return Estimate(difference, resampled=resampled, about=self.about)

    @property
    def ci95(self) -> list[float]:
        """The 95% interval."""
        return interval(self.value, self.resampled)

    def widened(self, counts: Sequence[float], level: float = 0.9) -> list[float]:
        """Return an interval that can show that nothing is there, as two one-sided tests at 5% do.

        It is widened for each of the `counts` of images that it rests on: all, or groups of these, and those of a
        class, without which scores shrink (`experiments/statistics/equivalence.py`).
        """
        low, high = interval(self.value, self.resampled, level=level)
        half = math.prod(map(widening_for, counts)) * (high - low) / 2
        return [self.value - half, self.value + half]

    def json(self, *, lowest: float = -math.inf, highest: float = math.inf) -> EstimateEntry:
        """Return its entry; the interval is cut off at the range of the number."""
        bounds = interval(self.value, self.resampled, lowest=lowest, highest=highest)
        return {"value": self.value, "ci95": bounds}


def dataset_scores(task: Task, sums: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[S] of a task by name on the dataset, from sums f[S, N, M]."""
    return task.dataset_scores(sums.double().sum(1))


def resampled_scores(task: Task, sums: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[R, S] of a task by name for weights f[R, N]."""
    resampled_sums = torch.einsum("rn,snm->rsm", weights.double(), sums.double())
    return task.dataset_scores(resampled_sums)


def estimate_text(estimate: EstimateEntry, number: str = "+.3g") -> str:
    """Return the text of an entry in a format of numbers: "+0.12 [+0.1, +0.14]"."""
    value = estimate["value"]
    low, high = estimate["ci95"]
    return f"{value:{number}} [{low:{number}}, {high:{number}}]"


def standard_error(ci95: Sequence[float], df: float = math.inf) -> tuple[float, float]:
    """Return the standard error and the degrees of freedom of an interval of Student's t."""
    low, high = ci95
    half_width = (high - low) / 2
    return half_width / student_quantile(0.975, df), df


def p_value(sign: int, value: float, parts: Sequence[tuple[float, float]]) -> float:
    """Return 1 minus the level of the widest interval that excludes zero; 1 for a value on the other side.

    Args:
        sign: Of the claim.
        value: Centre of the interval.
        parts: Standard error and degrees of freedom of independent parts. Their half widths are added as the sides of
            a right angle.
    """
    from scipy.optimize import brentq  # a third of the time of importing torch

    def excess(p):
        half_widths = []
        for error, degrees in parts:
            quantile = -student_quantile(p / 2, degrees)
            half_widths.append(quantile * error)
        return math.hypot(*half_widths) - abs(value)

    if sign * value <= 0:
        return 1.0
    if excess(SMALLEST_P) <= 0:
        return SMALLEST_P
    return float(brentq(excess, SMALLEST_P, 1.0))


def widening_for(units: float) -> float:
    """Return how much wider than a bootstrap's an interval of so many photos has to be: Student's t, and its n - 1.

    Without it, of four equal models two are said to differ in 7% of studies of 20 photos
    (`experiments/statistics/which_is_better.py`). The 95% interval is that of all other differences, without it.
    """
    units = max(units, 2)
    quantile = student_quantile(0.975, units - 1) / normal_quantile(0.975)
    return quantile * math.sqrt(units / (units - 1))


# Quantiles are to the last bit those of scipy.stats, which takes two thirds of the time of importing torch;
# scipy.special takes a tenth.
def student_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution with so many degrees of freedom."""
    return float(special.stdtrit(degrees, probability))


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return float(special.ndtri(probability))
