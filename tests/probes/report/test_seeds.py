"""Claims of several seeds jointly: the seed is the unit; images that seeds share count once."""

import numpy as np
import pytest
import scipy.stats
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.claims import join_column, mean_over_seeds
from probes.report.verdicts import compare_to_draws, judge_draws
from probes.score.estimate import Estimate

STUDIES = 500


def test_interval_equals_scipys_t_and_is_never_shorter_than_that_over_images():
    """Seeds that agree say nothing of other images: all of them have the same, or each one has its own."""
    values = [0.1, 0.3, 0.2, 0.25]

    def joint(numbers, half, shared_images):
        found = [(value, [value - half, value + half]) for value in numbers]
        return mean_over_seeds(found, shared_images=shared_images)

    value, ci95 = joint(values, 0.001, shared_images=False)
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert value == pytest.approx(np.mean(values))
    assert ci95 == pytest.approx(expected)
    assert joint([0.2] * 4, 0.1, shared_images=True)[1] == pytest.approx([0.1, 0.3])
    assert joint([0.2] * 4, 0.1, shared_images=False)[1] == pytest.approx([0.15, 0.25])
    low, high = joint(values, 0.1, shared_images=True)[1]
    assert (high - low) / 2 == pytest.approx(np.hypot(0.1, (ci95[1] - ci95[0]) / 2), rel=1e-6)


def nightly(*case):
    """A case of the nightly job; the fast one has few seeds that differ most, on images that they share."""
    return pytest.param(*case, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("seeds", "spread", "shared_images"),
    [(3, 0.3, True), nightly(3, 0.3, False), nightly(5, 0.1, True), nightly(5, 0.1, False)],
)
def test_interval_beyond_draws_covers_the_mean_over_seeds_images_and_draws(
    seeds, spread, shared_images
):
    """Each seed has two random draws of its own, which differ by `spread`; images differ by 0.5."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    lengths = []
    weights = bootstrap_weights(50, 400)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def effect(x):
        return Estimate(x.mean().item(), weights @ x / weights.sum(1))

    for _ in range(STUDIES):
        shared = 0.5 * draw(50)
        columns = {}
        for seed in range(seeds):
            noise = shared if shared_images else 0.5 * draw(50)
            trained = effect(0.03 * draw(1) + noise + 0.1 * draw(50))
            draws = [effect(spread * draw(1) + 0.2 * noise + 0.1 * draw(50)) for _ in range(2)]
            columns[seed] = judge_draws(1, compare_to_draws(trained, draws), counts=(50,))
        low, high = join_column(1, columns, shared_images)["ci95"]
        covered += low <= 0 <= high
        of_one = np.mean([np.ptp(entry["ci95"]) for entry in columns.values()])
        lengths.append((high - low) / of_one)
    assert covered >= 0.93 * STUDIES
    assert np.median(lengths) < 1, "several seeds say more than one of them"
