"""Intervals and tests against brute force and scipy."""

import numpy as np
import pytest
from scipy import stats

from llava_bidir.vqa.benchmarks import Parts, mean, mme
from llava_bidir.vqa.bootstrap import bootstrap, holm, interval, swap_test


def items(right, units=None, group=None) -> list[dict]:
    units = range(len(right)) if units is None else units
    return [{"unit": unit, "group": group, "right": float(r)} for unit, r in zip(units, right, strict=True)]


def test_interval_of_a_mean_is_that_of_scipy():
    right = np.random.default_rng(0).random(300) < 0.7
    ours = interval(bootstrap([mean(items(right))], 4000)[0])
    theirs = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx(list(theirs), abs=0.005)
    assert len(bootstrap([mean(items(right))], 333)[0]) == 333


def test_questions_of_one_image_are_drawn_together():
    """Ten questions an image, all right or all wrong: as uncertain as the images, not as the questions."""
    right = np.repeat(np.random.default_rng(1).random(40) < 0.5, 10)
    images = np.repeat(np.arange(40), 10)
    ours = bootstrap([mean(items(right, images))], 4000)[0]
    assert ours.std() == pytest.approx(right.std() / 40**0.5, rel=0.05)
    alone = bootstrap([mean(items(right))], 4000)[0]
    assert alone.std() == pytest.approx(right.std() / 400**0.5, rel=0.05)


def test_mme_categories_keep_their_images():
    """Brute force: images redrawn within each category, the score computed from scratch each time."""
    rng = np.random.default_rng(2)
    sizes = {"existence": 5, "count": 30}
    found = [i for c, n in sizes.items() for i in items(rng.random(2 * n) < 0.6, np.repeat(np.arange(n), 2), c)]
    parts = mme(["existence", "count"])(found)
    pairs = {c: np.array([i["right"] for i in found if i["group"] == c]).reshape(-1, 2) for c in sizes}

    def score(drawn):
        return sum(100 * (p.mean() + p.all(1).mean()) for p in drawn.values())

    assert parts.score() == pytest.approx(score(pairs))
    brute = [score({c: p[rng.integers(len(p), size=len(p))] for c, p in pairs.items()}) for _ in range(4000)]
    ours = bootstrap([parts], 4000)[0]
    assert (ours.mean(), ours.std()) == pytest.approx((np.mean(brute), np.std(brute)), rel=0.05)


def test_models_are_redrawn_together():
    """Of two models with the same answers every resampling has the same score."""
    parts = mean(items(np.arange(50) % 3 == 0))
    first, second = bootstrap([parts, parts], 500)
    assert (first == second).all() and first.std() > 0


def test_swapping_right_and_wrong_answers_is_mcnemars_exact_test():
    first, second = np.zeros(60), np.zeros(60)
    first[:9], second[9:30] = 1, 1  # 9 only the first has right, 21 only the second
    exact = stats.binomtest(9, 30).pvalue
    assert swap_test(mean(items(first)), mean(items(second)), 40_000) == pytest.approx(exact, abs=0.005)
    assert swap_test(mean(items(first)), mean(items(first))) == 1.0


def test_swapping_images_is_scipys_paired_permutation_test():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(25), 3)
    first = rng.random(75) < 0.5
    second = first ^ (np.repeat(rng.random(25) < 0.2, 3))
    sums = [right.reshape(25, 3).sum(1) for right in (first, second)]
    theirs = stats.permutation_test(
        sums, lambda a, b, axis: a.sum(axis) - b.sum(axis), permutation_type="samples", n_resamples=40_000, rng=4
    )
    ours = swap_test(mean(items(first, images)), mean(items(second, images)), 40_000)
    assert ours == pytest.approx(theirs.pvalue, abs=0.01)


def test_ratios_swap_their_denominators_too():
    """F1-like parts: swapping all units is the other model, so the two ends of the distribution are the observed."""
    rng = np.random.default_rng(5)
    num = [rng.integers(0, 5, (4, 1)).astype(float) for _ in range(2)]
    den = [rng.integers(5, 9, (4, 1)).astype(float) for _ in range(2)]
    parts = [Parts(n, d, list(range(4)), np.zeros(4, int)) for n, d in zip(num, den, strict=True)]
    differences = []
    for sides in range(16):
        coin = np.array([sides >> u & 1 for u in range(4)])[:, None]
        n = [np.where(coin, num[1 - k], num[k]).sum() for k in range(2)]
        d = [np.where(coin, den[1 - k], den[k]).sum() for k in range(2)]
        differences.append(n[1] / d[1] - n[0] / d[0])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    assert swap_test(*parts, 40_000) == pytest.approx(exact, abs=0.01)


def test_holm_steps_down_and_never_crosses():
    p = [0.01, 0.04, 0.03, 0.005, 0.6]
    rejected, adjusted = 0, {}
    for rank, k in enumerate(np.argsort(p)):  # Holm's own words: p_(k) * (m - k + 1), made monotone
        rejected = max(rejected, min(1, p[k] * (len(p) - rank)))
        adjusted[k] = rejected
    assert holm(p) == pytest.approx([adjusted[k] for k in range(5)])
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
