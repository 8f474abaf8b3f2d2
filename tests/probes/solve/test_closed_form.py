"""Moments of states, and the coordinates that follow from them."""

import pytest
import torch

from probes.solve.moments import Moments, SiteSpace

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


def test_moments_stored_in_blocks_equal_whole_matrices(monkeypatch):
    """A width of several blocks, the last one smaller; two folds, a shift, and the sum with other images."""
    monkeypatch.setattr("probes.solve.moments.BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 13, generator=generator) + 3
    labels = torch.nn.functional.one_hot(torch.randint(3, (80,), generator=generator), 3).double()
    pivot = x[:40].mean(0)
    one = Moments.zeros(pivot, 2, 3)
    other = Moments.zeros(pivot + 1, 2, 3)
    assert one.second.shape == (2, 5 * 13 + 5 * 8 + 3 * 3)
    one.update(x[:30], labels[:30], 0)
    one.update(x[30:40], labels[30:40], 1)
    other.update(x[40:], labels[40:], 1)
    one.add(other)
    one.shift(torch.zeros(13))
    for fold, kept in ((None, x), (0, x[30:]), (1, x[:30])):
        count, first, second = one.without(fold)
        of = slice(None) if fold is None else slice(30, None) if fold == 0 else slice(30)
        torch.testing.assert_close(count, labels[of].sum(0))
        torch.testing.assert_close(first, labels[of].T @ x[of].double(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(second, kept.double().T @ kept.double(), rtol=1e-5, atol=1e-3)


def test_constant_channels_and_absent_classes_have_finite_coordinates():
    states = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    states[..., 2], states[..., 4] = 1.7, states[..., 3]  # constant, and singular
    soft = torch.zeros(4, 3, 2, 3)
    soft[:, 0, 0], soft[:, 1, 1] = 1, 1  # the third class does not occur
    space = SiteSpace.of(states, soft)
    assert space.scale[2] == 0
    assert (space.scale > 0).sum() == 4
    assert space.coordinates(states).isfinite().all()
