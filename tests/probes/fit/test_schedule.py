"""Learning rates are those of the published protocols, step by step."""

import pytest
from published_rates import rates_of_dinov3, rates_of_mmcv

from probes.fit.schedule import rate_factor

STEPS, WARMUP = 40_000, 1_500
WATCHED = [0, 1, 2, 700, 1_499, 1_500, 1_501, 1_502, 20_000, 39_998, 39_999]


@pytest.mark.parametrize(
    ("decay", "reference"), [("cosine", rates_of_dinov3), ("linear", rates_of_mmcv)]
)
def test_rates_are_the_publishers(decay, reference):
    expected = reference(STEPS, WARMUP)
    for step in WATCHED:
        factor = rate_factor(step, steps=STEPS, decay=decay, warmup=WARMUP)
        assert factor == pytest.approx(expected[step], abs=1e-12)
    without = reference(10, 0)
    assert [rate_factor(i, steps=10, decay=decay, warmup=0) for i in range(10)] == pytest.approx(
        without
    )
