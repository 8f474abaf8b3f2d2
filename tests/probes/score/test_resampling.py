"""Resampled and swapped scores against loops, and the error rates of the tests on them."""

import numpy as np
import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights, p_values, random_swaps
from probes.ops.pixel_counts import Counts
from probes.score.resampling import dataset_scores, resampled_scores, swapped_scores
from probes.tasks import TASKS

pytestmark = pytest.mark.numerics
TASK = TASKS["segmentation"]


def sums_of(counts: Counts) -> torch.Tensor:
    return TASK.sums(counts._asdict())


def random_counts(
    seed: int,
    images: int = 30,
    classes: int = 4,
    sites: int = 2,
) -> Counts:
    rng = np.random.default_rng(seed)
    labelled = rng.multinomial(100, [0.6, 0.25, 0.1, 0.05], images)
    intersection = rng.binomial(labelled, [0.8, 0.6, 0.4, 0.3], (sites, images, classes))
    wrong = labelled.sum(-1) - intersection.sum(-1)
    predicted = intersection + np.stack(
        [[rng.multinomial(n, [0.25] * 4) for n in site] for site in wrong]
    )
    tensors = [torch.from_numpy(x) for x in (intersection, predicted, labelled)]
    return Counts(*tensors, torch.zeros(sites, images, 1), torch.zeros(images, 1))


def test_resampled_scores_equal_a_loop_over_drawn_images():
    counts = random_counts(0)
    weights = bootstrap_weights(30, 20)
    ours = resampled_scores(TASK, sums_of(counts), weights)
    for r in range(20):
        drawn = torch.repeat_interleave(torch.arange(30), weights[r].long())
        again = Counts(*(x[:, drawn] for x in counts[:2]), counts.labelled[drawn], *counts[3:])
        again_scores = dataset_scores(TASK, sums_of(again))
        torch.testing.assert_close(ours["miou"][r], again_scores["miou"])
        torch.testing.assert_close(ours["pacc"][r], again_scores["pacc"])


def test_swapped_scores_equal_a_loop_over_swapped_images():
    a = random_counts(0)
    b = random_counts(1)
    swaps = random_swaps(30, 20, seed=5)
    b = b._replace(labelled=a.labelled)
    ours = swapped_scores(TASK, sums_of(a), sums_of(b), swaps)
    for r in range(21):
        mixed = []
        for first, second in ((a, b), (b, a)):

            def pick(x, y, r=r):
                return torch.stack([(y if swaps[r, n] else x)[:, n] for n in range(30)], 1)

            fields = (
                pick(first.intersection, second.intersection),
                pick(first.predicted, second.predicted),
            )
            counts = Counts(*fields, a.labelled, *a[3:])
            mixed.append(dataset_scores(TASK, sums_of(counts)))
        for scored, expected in zip(ours, mixed, strict=True):
            for name, values in scored.items():
                torch.testing.assert_close(values[r], expected[name])


def pair_of_counts(
    rng,
    images: int = 40,
    sites: int = 5,
    gain: float = 0.0,
) -> tuple[Counts, Counts]:
    """Return two conditions that are exchangeable by image, except for a gain of the second; sites are correlated."""
    labelled = rng.multinomial(200, [0.5, 0.3, 0.2], images)
    ease = rng.normal(0, 0.1, (images, 3))
    counts = []
    for shift in (0.0, gain):
        own = rng.normal(0, 0.1, (images, 3)) + rng.normal(0, 0.03, (sites, images, 3))
        intersection = rng.binomial(labelled, np.clip(0.6 + shift + ease + own, 0.02, 0.98))
        predicted = intersection + (labelled - intersection)[..., [1, 2, 0]]
        tensors = [torch.from_numpy(x) for x in (intersection, predicted, labelled)]
        counts.append(Counts(*tensors, torch.zeros(sites, images, 1), torch.zeros(images, 1)))
    return counts[0], counts[1]


def test_a_true_gain_is_found_at_every_site():
    a, b = pair_of_counts(np.random.default_rng(0), gain=0.1)
    swapped = swapped_scores(TASK, sums_of(a), sums_of(b), random_swaps(40, 500))
    raw, corrected = p_values(swapped[1]["miou"] - swapped[0]["miou"])
    assert (raw < 0.01).all()
    assert (corrected < 0.02).all()


def test_rejection_rate_without_a_difference_is_nominal():
    """600 studies without an effect at alpha 0.1: one site, and any of five after correction, reject in 6% to 14%."""
    rng = np.random.default_rng(1)
    studies = 600
    one = 0
    any_raw = 0
    any_corrected = 0
    for i in range(studies):
        a, b = pair_of_counts(rng)
        swapped = swapped_scores(TASK, sums_of(a), sums_of(b), random_swaps(40, 199, seed=i))
        raw, corrected = p_values(swapped[1]["miou"] - swapped[0]["miou"])
        one += bool(raw[0] <= 0.1)
        any_raw += bool((raw <= 0.1).any())
        any_corrected += bool((corrected <= 0.1).any())
    assert 0.06 < one / studies < 0.14
    assert 0.06 < any_corrected / studies < 0.14
    assert any_raw > any_corrected
