"""Chance in Table 1: intervals over its questions, and tests of one model against another on the same questions.

What is drawn are units (see benchmarks.py), so that questions about one image stay together. Shapes: R resamplings, U
units, G groups.
"""

from collections.abc import Iterator

import numpy as np

from .benchmarks import Parts, ratios

RESAMPLINGS, SWAPS, CHUNK = 2000, 10_000, 250


def bootstrap(models: list[Parts], resamplings: int = RESAMPLINGS, seed: int = 0) -> np.ndarray:
    """f[M, R]: scores of M models on the same redrawn units, those of a stratum drawn from it."""
    scores = [
        [ratios(weights @ parts.num, weights @ parts.den) for parts in models]
        for weights in _weights(models[0].strata, resamplings, np.random.default_rng(seed))
    ]
    return np.concatenate([np.array(chunk) for chunk in scores], axis=1)


def _weights(strata: np.ndarray, resamplings: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """f[r, U] in chunks that add up to R rows: how often each unit is drawn."""
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    for start in range(0, resamplings, CHUNK):
        rows = min(CHUNK, resamplings - start)
        weights = np.empty((rows, len(strata)))
        for units in members:
            weights[:, units] = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), rows)
        yield weights


def interval(scores: np.ndarray) -> list[float]:
    """95%, by percentiles."""
    return np.percentile(scores, [2.5, 97.5]).tolist()


def swap_test(first: Parts, second: Parts, swaps: int = SWAPS, seed: int = 0) -> float:
    """p of "the two models are alike": each unit's answers change sides by a fair coin.

    Two-sided; the observed split is counted in, so that p is never 0.
    """
    observed = abs(second.score() - first.score())
    totals = [parts.sum(0) for parts in (first.num, first.den, second.num, second.den)]
    rng, as_far = np.random.default_rng(seed), 1
    for start in range(0, swaps, CHUNK):
        coins = rng.integers(0, 2, (min(CHUNK, swaps - start), len(first.num))).astype(float)
        num, den = coins @ (second.num - first.num), coins @ (second.den - first.den)
        difference = ratios(totals[2] - num, totals[3] - den) - ratios(totals[0] + num, totals[1] + den)
        as_far += int((abs(difference) >= observed - 1e-12).sum())
    return as_far / (swaps + 1)


def holm(p: list[float]) -> list[float]:
    """p values of several tests, so adjusted that one of them below 0.05 by chance has a chance of 5% (Holm 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    adjusted = np.empty(len(p))
    adjusted[order] = steps
    return adjusted.tolist()
