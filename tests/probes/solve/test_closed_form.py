"""Moments of states, and the coordinates that follow from them."""

import pytest
import torch

from probes.solve.space import SiteSpace

pytestmark = pytest.mark.numerics


def test_a_small_variance_is_not_lost():
    """A channel with mean 1,000 and deviation 0.05, as LLMs have: a plain float32 sum loses it."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(200, 2_000, 1, generator=generator, dtype=torch.float64)
    states = (1000 + noise).float()
    variance = states.double().var(correction=0).item()
    space = SiteSpace.of(states, torch.ones(200, 1, 40, 50))
    assert space.scale.item() ** -2 == pytest.approx(variance, rel=1e-4)


def test_constant_channels_and_absent_classes_have_finite_coordinates():
    states = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    states[..., 2], states[..., 4] = 1.7, states[..., 3]  # constant, and singular
    soft = torch.zeros(4, 3, 2, 3)
    soft[:, 0, 0], soft[:, 1, 1] = 1, 1  # the third class does not occur
    space = SiteSpace.of(states, soft)
    assert (space.scale > 0).tolist() == [True, True, False, True, True]
    assert space.coordinates(states).isfinite().all()
