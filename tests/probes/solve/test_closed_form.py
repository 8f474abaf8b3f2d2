"""Moments of states, and the coordinates that follow from them."""

import pytest
import torch

from probes.solve.solution import Solution
from probes.solve.space import SiteSpace
from probes.tasks import TASKS

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


def test_the_strength_of_the_lowest_loss_is_told_from_the_chosen_one():
    """At an end of the grid, the chosen one is beside it, and the report says so."""
    others = ("mean", "scale", "weights", "bias", "certificates")
    solution = Solution(
        strengths=torch.tensor([100.0, 10.0, 1.0]),
        loss=torch.tensor([1.0, 2.0, 3.0]),
        chosen=torch.tensor(1),
        solved=torch.arange(3),
        **dict.fromkeys(others, torch.zeros(0)),
    )
    entry = solution.entry("adapter", {}, TASKS["segmentation"])
    assert (entry["chosen"], entry["lowest"]) == (10, 100)
