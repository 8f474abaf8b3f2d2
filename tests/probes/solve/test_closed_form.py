"""Moments of states, and the coordinates that follow from them."""

import pytest
import torch

from probes.solve.space import SiteSpace

pytestmark = pytest.mark.numerics


def test_float32_sums_or_a_missing_pivot_lose_small_variances():
    """A channel with mean 1,000 and deviation 0.05, as LLMs have: a plain float32 sum loses it."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(200, 2_000, 1, generator=generator, dtype=torch.float64)
    batches = (1000 + noise).float()
    variance = batches.double().var(correction=0).item()
    plain_first = torch.zeros(1)
    plain_second = torch.zeros(1, 1)
    for x in batches:
        plain_first = plain_first + x.sum(0)
        plain_second = plain_second + x.T @ x
    space = SiteSpace.of(batches, torch.ones(200, 1, 40, 50))
    tokens = batches[..., 0].numel()
    plain = (plain_second / tokens - (plain_first / tokens) ** 2).item()
    assert space.scale.item() ** -2 == pytest.approx(variance, rel=1e-4)
    assert abs(plain / variance - 1) > 1, "else the pivot and the float64 sums would not be needed"


def test_constant_channels_and_absent_classes_have_finite_coordinates():
    states = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    states[..., 2], states[..., 4] = 1.7, states[..., 3]  # constant, and singular
    soft = torch.zeros(4, 3, 2, 3)
    soft[:, 0, 0], soft[:, 1, 1] = 1, 1  # the third class does not occur
    space = SiteSpace.of(states, soft)
    assert space.scale[2] == 0
    assert (space.scale > 0).sum() == 4
    assert space.coordinates(states).isfinite().all()
