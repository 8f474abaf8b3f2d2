"""The effect that `probes study --dry-run` says can be detected."""

import re
from itertools import product

import numpy as np
import pytest
import torch

from probes.report.verdicts import judge_draws
from probes.score.estimate import Estimate
from probes.studies.estimate import OF_AN_IMAGE, OF_DRAWS, describe_comparison, detectable_effect

STUDIES = 1000


@pytest.mark.parametrize(
    ("images", "draws", "masks"),
    [
        (600, [2, 2], 2),  # the fewest draws, and the images' noise is small beside theirs
        pytest.param(60, [5, 2], 1, marks=pytest.mark.nightly),
    ],
)
def test_four_of_five_studies_find_the_detectable_effect(images, draws, masks):
    """As reports judge it, with draws of both controls under each mask; the toy world's spread."""
    rng = np.random.default_rng(images + sum(draws))
    successes = 0
    effect = detectable_effect(images, draws, masks)
    se = OF_AN_IMAGE / images**0.5
    for _ in range(STUDIES):
        error = rng.normal(0, se)
        resampled = torch.tensor([-1.96 * se, 1.96 * se])  # whose interval has this half width
        cells = []
        for _, count in product(range(masks), draws):
            by_draw = rng.normal(0, OF_DRAWS, count)
            about = {"trained": 0.0, "by_draw": by_draw.tolist()}
            cells.append(Estimate(effect + error - by_draw.mean(), resampled, about))
        own = cells[: len(draws)]  # of the first mask
        verdicts = [
            judge_draws(1, cell, [x for x in cells if x is not cell], counts=(100,))["verdict"]
            for cell in own
        ]
        successes += verdicts == ["holds"] * len(draws)
    assert 0.76 <= successes / STUDIES <= 0.84
    assert detectable_effect(images, [draws[0], 1], masks) is None


def test_four_times_the_photos_show_half_the_difference_of_two_models():
    few, many = (float(re.search(r"([\d.]+) points", describe_comparison(n))[1]) for n in (20, 80))
    assert few == pytest.approx(2 * many, abs=0.11) and few > 4
