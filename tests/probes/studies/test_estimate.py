"""The effect that `probes study --dry-run` says can be detected."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from probes.report.verdicts import judge_draws
from probes.score.estimate import Estimate
from probes.studies.estimate import TOY_WORLD, Spread, detectable_effect, own_spread

STUDIES = 1000


@pytest.mark.parametrize(
    ("images", "draws", "masks"),
    [
        (600, [2, 2], 2),  # the fewest draws, and the images' noise is small beside theirs
        pytest.param(60, [3, 2], 1, marks=pytest.mark.nightly),
        pytest.param(600, [3, 2], 2, marks=pytest.mark.nightly),
        pytest.param(60, [5, 2], 2, marks=pytest.mark.nightly),
    ],
)
def test_four_of_five_studies_find_the_detectable_effect(images, draws, masks):
    """As reports judge it, with draws of both controls under each mask; the toy world's spread."""
    rng = np.random.default_rng(images + sum(draws))
    found = 0
    effect = detectable_effect(images, draws, masks, TOY_WORLD)
    se = TOY_WORLD.images / images**0.5
    for _ in range(STUDIES):
        error = rng.normal(0, se)
        resampled = torch.tensor([-1.96 * se, 1.96 * se])  # whose interval has this half width
        cells = []
        for _, count in product(range(masks), draws):
            by_draw = rng.normal(0, TOY_WORLD.draws, count)
            about = {"trained": 0.0, "by_draw": by_draw.tolist()}
            cells.append(Estimate(effect + error - by_draw.mean(), resampled, about))
        own = cells[: len(draws)]  # of the first mask
        verdicts = [
            judge_draws(1, cell, [x for x in cells if x is not cell])["verdict"] for cell in own
        ]
        found += verdicts == ["holds"] * len(draws)
    assert 0.76 <= found / STUDIES <= 0.84
    assert detectable_effect(images, [draws[0], 1], masks, TOY_WORLD) is None


def test_the_spread_is_that_of_the_folders_own_report(tmp_path):
    """The mean variance of recovery over masks and seeds; other claims and those without two draws do not count."""
    assert own_spread(tmp_path) is None

    def column(half, by_draw):
        return {"beyond_random": {"ci95_without_draws": [-half, half], "by_draw": by_draw}}

    def claim(name, verdicts):
        return {
            "claim": name,
            "n": {"images": 100},
            "verdicts": verdicts,
        }

    first = [
        claim("recovery", column(0.0196, [0.01, 0.03])),
        claim("starvation", column(0.5, [0.5, 0.1])),
    ]
    second = [
        claim("recovery", column(0.0392, [0.02, 0.02])),
        claim("recovery", {"beyond_random": {}}),
    ]
    (tmp_path / "report").mkdir()
    file = tmp_path / "report/results.json"
    file.write_text(json.dumps({"claims": second[1:]}))
    assert own_spread(tmp_path) is None
    file.write_text(json.dumps({"studies": [{"claims": first}, {"claims": second}]}))
    of_images = (0.1**2 + 0.2**2) / 2
    of_draws = (0.0002 + 0.0) / 2
    found = own_spread(tmp_path)
    assert found == Spread(
        pytest.approx(of_images**0.5), pytest.approx(of_draws**0.5), f"the study in {tmp_path}"
    )
