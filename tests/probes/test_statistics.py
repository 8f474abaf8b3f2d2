"""Bootstrap against a loop, and intervals that cover."""

import numpy as np
import pytest
import torch

from probes.metrics import Counts
from probes.statistics import bootstrap_weights, dataset_scores, interval, resampled_scores


def random_counts(seed: int, images: int = 30, classes: int = 4, sites: int = 2) -> Counts:
    rng = np.random.default_rng(seed)
    labelled = rng.multinomial(100, [0.6, 0.25, 0.1, 0.05], images)
    intersection = rng.binomial(labelled, [0.8, 0.6, 0.4, 0.3], (sites, images, classes))
    wrong = labelled.sum(-1) - intersection.sum(-1)
    predicted = intersection + np.stack([[rng.multinomial(n, [0.25] * 4) for n in site] for site in wrong])
    tensors = [torch.from_numpy(x) for x in (intersection, predicted, labelled)]
    return Counts(*tensors, torch.zeros(sites, images, 1), torch.zeros(images, 1))


def test_resampled_scores_equal_a_loop_over_drawn_images():
    counts = random_counts(0)
    weights = bootstrap_weights(30, 20)
    ours = resampled_scores(counts, weights)
    for r in range(20):
        drawn = torch.repeat_interleave(torch.arange(30), weights[r].long())
        again = Counts(*(x[:, drawn] for x in counts[:2]), counts.labelled[drawn], *counts[3:])
        torch.testing.assert_close(ours.miou[r], dataset_scores(again).miou)
        torch.testing.assert_close(ours.pacc[r], dataset_scores(again).pacc)


def test_weights_draw_as_many_images_as_there_are():
    weights = bootstrap_weights(17, 50, seed=3)
    assert (weights.sum(1) == 17).all() and torch.equal(weights, bootstrap_weights(17, 50, seed=3))
    assert not torch.equal(weights, bootstrap_weights(17, 50, seed=4))


def test_interval_reflects_the_resampled_values():
    low, high = interval(10.0, torch.linspace(8, 11, 1001))
    assert low == pytest.approx(20 - 10.925) and high == pytest.approx(20 - 8.075)


def test_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = torch.from_numpy(rng.exponential(1.0, 60))
        low, high = interval(values.mean().item(), bootstrap_weights(60, 400).double() @ values / 60)
        covered += low <= 1.0 <= high
    assert 0.87 <= covered / 200 <= 0.98


def test_interval_of_miou_is_not_pulled_down_by_classes_that_drop_out():
    """Percentile intervals are; the reason why ours are reflected."""
    counts = random_counts(2, images=25)
    resampled = resampled_scores(counts, bootstrap_weights(25)).miou[:, 0]
    estimate = dataset_scores(counts).miou[0].item()
    low, high = interval(estimate, resampled)
    assert low < estimate < high
