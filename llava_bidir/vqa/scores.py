"""Scores of Table 1 from the items of a task, on the dataset, resampled, and with two models' answers exchanged.

A score is a sum of ratios over units. A unit is drawn and exchanged as a whole: an image with all its questions, or a
question with all orders of its options. result_files.py compares the score with the harness's own.

Shapes: R resamplings, U units, G groups.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_bidir.common.bootstrap import RESAMPLINGS, bootstrap_weights, p_values, random_swaps

SWAPS = 10_000
Item = dict[str, Any]  # as `harness.to_item` writes it


class ScoreTerms(NamedTuple):
    """Terms of a score, which is the sum over g of sum_u num[u, g] / sum_u den[u, g].

    Args:
        num: f[U, G].
        den: f[U, G].
        units: Names of the units.
        strata: i64[U]. A unit is resampled within its stratum.
    """

    num: np.ndarray
    den: np.ndarray
    units: list
    strata: np.ndarray

    def score(self) -> float:
        """Return the score on the dataset."""
        return float(sum_ratios(self.num.sum(0), self.den.sum(0)))

    def resampled_scores(self, resamplings: int = RESAMPLINGS, seed: int = 0) -> torch.Tensor:
        """Return scores f[R]. Two models with the same units and seed are resampled together."""
        weights = np.empty((resamplings, len(self.units)))
        for stratum in np.unique(self.strata):
            members = self.strata == stratum
            weights[:, members] = bootstrap_weights(
                int(members.sum()), resamplings, seed + int(stratum)
            )
        return torch.from_numpy(sum_ratios(weights @ self.num, weights @ self.den))


def swap_test(
    a: ScoreTerms,
    b: ScoreTerms,
    swaps: int = SWAPS,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of equal scores: the models' answers are exchanged, unit by unit, at random."""
    swapped = random_swaps(len(a.units), swaps, seed).double().numpy()
    num = swapped @ (b.num - a.num)
    den = swapped @ (b.den - a.den)
    scores_a = sum_ratios(a.num.sum(0) + num, a.den.sum(0) + den)
    scores_b = sum_ratios(b.num.sum(0) - num, b.den.sum(0) - den)
    return p_values(torch.from_numpy(scores_b - scores_a)[:, None])[0].item()


def sum_ratios(num: np.ndarray, den: np.ndarray) -> np.ndarray:
    """Return the sum of num / den over the last axis. 0 / 0 counts as 0, as in F1 without any positive."""
    return np.divide(num, den, out=np.zeros_like(num, dtype=float), where=den != 0).sum(-1)


def accuracy_terms(items: list[Item]) -> ScoreTerms:
    """Return the terms of the share of correct items."""
    return _terms(items, lambda unit: (sum(item["right"] for item in unit), len(unit)))


def circular_terms(items: list[Item]) -> ScoreTerms:
    """Return the terms of MMBench's CircularEval: all orders of a question's options must be answered correctly."""
    return _terms(items, lambda unit: (all(item["right"] for item in unit), 1))


def clean_answer(item: Item) -> str:
    """Return an answer as lmms-eval's pope compares it."""
    return item["answer"].strip().lower()


def f1_terms(items: list[Item]) -> ScoreTerms:
    """Return the terms of the F1 of "yes". Other answers than yes and no are left out, as in lmms-eval's pope."""
    return _terms(items, lambda unit: _count_f1(unit, ("yes", "no")))


def f1_of_all_terms(items: list[Item]) -> ScoreTerms:
    """Return the terms of the F1 of "yes" over all questions: other answers than yes and no miss a yes, too."""
    return _terms(items, lambda unit: _count_f1(unit, {clean_answer(item) for item in unit}))


def _count_f1(unit: list[Item], answers: Iterable[str]) -> tuple[int, int]:
    """Return the numerator and denominator of the F1 of "yes" over the items with one of the answers."""
    pairs = [(clean_answer(item), item["target"].strip().lower()) for item in unit]
    hits = pairs.count(("yes", "yes"))
    false_alarms = pairs.count(("yes", "no"))
    misses = sum(pairs.count((answer, "yes")) for answer in answers if answer != "yes")
    return 2 * hits, 2 * hits + false_alarms + misses


def yes_ratio_terms(items: list[Item]) -> ScoreTerms:
    """Return the terms of the share of "yes" among the answers; lmms-eval's yes ratio is that of the targets."""
    return _terms(
        items, lambda unit: ([clean_answer(item) for item in unit].count("yes"), len(unit))
    )


def mme_terms(categories: list[str]) -> Callable[[list[Item]], ScoreTerms]:
    """Return a function for the sum over categories of 100 * (accuracy + share of images with both items correct)."""

    def terms(items: list[Item]) -> ScoreTerms:
        units = {key: unit for key, unit in group_by_unit(items).items() if key[0] in categories}
        present = sorted({category for category, _ in units})
        num, den = np.zeros((2, len(units), len(present)))
        for row, ((category, _), unit) in enumerate(units.items()):
            right = [item["right"] for item in unit]
            column = present.index(category)
            num[row, column] = 100 * (sum(right) / len(right) + all(right))
            den[row, column] = 1
        return ScoreTerms(
            num, den, list(units), np.array([present.index(category) for category, _ in units])
        )

    return terms


def group_by_unit(items: Iterable[Item]) -> dict[Any, list[Item]]:
    """Return the items of each (group, unit)."""
    units = {}
    for item in items:
        units.setdefault((item["group"], item["unit"]), []).append(item)
    return units


def _terms(items: list[Item], count: Callable[[list[Item]], tuple[float, float]]) -> ScoreTerms:
    units = group_by_unit(items)
    num, den = np.array([count(unit) for unit in units.values()], float).T
    return ScoreTerms(num[:, None], den[:, None], list(units), np.zeros(len(units), int))
