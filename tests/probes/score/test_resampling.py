"""Resampled scores against a loop."""

import numpy as np
import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.ops.pixel_counts import Counts
from probes.score.resampling import dataset_scores, resampled_scores
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
