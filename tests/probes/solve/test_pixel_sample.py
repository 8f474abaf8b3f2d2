"""Pixels of a sample against F.interpolate, and states in a byte a channel."""

import pytest
import torch
import torch.nn.functional as F

from probes.ops.geometry import GridPlacement
from probes.solve.moments import SiteSpace
from probes.solve.pixel_sample import (
    CANDIDATES,
    AxisRange,
    ChannelRange,
    Pixels,
    choose_pixels,
    prefer_uncertain,
)

pytestmark = pytest.mark.numerics

GRID = (3, 4)
SIZE = (24, 40)


@pytest.fixture
def target() -> torch.Tensor:
    labels = torch.randint(0, 5, SIZE, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels[:, :25] = 255
    labels[:, 35:] = 255  # beyond the outermost tokens pixels have equal states
    labels[:4] = 255
    labels[20:] = 255
    return labels


def test_states_at_pixels_are_interpolated(target):
    states = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1))
    tokens, shares, labels, labelled = choose_pixels(
        target,
        50,
        7,
        GRID,
        GridPlacement.full(SIZE),
    )
    pixels = Pixels(
        tokens + 12,
        shares,
        labels,
        torch.ones(50).double(),
        torch.ones(50).long(),
    )  # of the second image
    up = F.interpolate(states[1:].mT.unflatten(2, GRID), SIZE, mode="bilinear")[0].flatten(1).T
    distance = (pixels.interpolate(states)[:, None] - up).norm(dim=2)
    nearest = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5
    assert labelled == (target != 255).sum() and not (labels == 255).any()
    assert torch.equal(target.flatten()[nearest].long(), labels)


def test_a_mask_without_labels_has_no_pixels():
    tokens, shares, labels, labelled = choose_pixels(
        torch.full(SIZE, 255, dtype=torch.uint8),
        5,
        0,
        GRID,
        GridPlacement.full(SIZE),
    )
    assert len(tokens) == len(shares) == len(labels) == labelled == 0


def test_a_byte_keeps_channels_of_any_mean_and_scale():
    """LLMs have channels whose mean is a thousand times their deviation."""
    states = torch.randn(4, 100, 3) * torch.tensor([1e-3, 1.0, 50.0]) + torch.tensor(
        [10.0, 0.0, -9e3]
    )
    states[0, 0] = 1e6
    kept = ChannelRange.of(states[1:])
    flat = states.flatten(0, 1)
    restored = kept.restore(kept.store(flat))
    error = ((restored - flat)[100:] / kept.deviation).abs()
    assert restored.isfinite().all() and error.max() < 0.25 and error.mean() < 0.03


@pytest.mark.parametrize("width", [4, 5])
def test_half_a_byte_adds_one_percent_to_the_variance_of_each_axis(width):
    generator = torch.Generator().manual_seed(2)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scale = torch.logspace(-3, 0, width)
    like = torch.ones(width, dtype=torch.float64)
    space = SiteSpace(
        like,
        like,
        axes.contiguous(),
        like,
        torch.zeros(3).double(),
    )
    states = (torch.randn(20_000, width, generator=generator) * scale) @ axes.T.float() + 1
    inputs = space.coordinates(states)
    kept = AxisRange.of(space, inputs)
    stored = kept.store(states)
    assert stored.dtype == torch.uint8
    assert stored.shape == (20_000, (width + 1) // 2)
    restored = kept.coordinates_of(stored)
    error = (restored - inputs)[:, :-1].square().mean(0) / inputs[:, :-1].var(0)
    assert torch.equal(restored[:, -1], torch.ones(20_000))
    assert error.max() < 0.013, "1.15% for a Gaussian, however small the axis"


def candidates(counts: list[int]) -> Pixels:
    """Return candidates of images, each with a number of its own as its label."""
    total = sum(counts)
    images = torch.repeat_interleave(torch.arange(len(counts)) * 3, torch.tensor(counts))
    weights = torch.full((total,), 5.0, dtype=torch.float64)
    return Pixels(
        torch.zeros(total, 4).long(),
        torch.ones(total, 4),
        torch.arange(total),
        weights,
        images,
    )


def test_uncertain_pixels_are_preferred_and_sums_are_kept():
    """Sums over all candidates of an image, by weights, stay what they are: of ones, and of what goes with doubt."""
    counts = [2000 * CANDIDATES, 0, 1000 * CANDIDATES]
    pixels = candidates(counts)
    doubt = torch.rand(len(pixels.labels), generator=torch.Generator().manual_seed(0)) ** 4
    kept = prefer_uncertain(pixels, doubt)
    assert len(kept.labels) == 3000
    assert kept.images.unique(return_counts=True)[1].tolist() == [2000, 1000]
    assert doubt[kept.labels].mean() > 1.5 * doubt.mean()
    assert kept.weights.max() <= 2 * CANDIDATES * 5 + 1e-6
    for image in (0, 6):
        before = pixels.images == image
        after = kept.images == image
        total = pixels.weights[before].sum()
        assert kept.weights[after].sum() == pytest.approx(total.item(), rel=0.05)
        expected = (pixels.weights * doubt)[before].sum().item()
        found = (kept.weights * doubt[kept.labels])[after].sum().item()
        assert found == pytest.approx(expected, rel=0.04)


def test_images_without_labels_have_no_uncertain_pixels():
    assert len(prefer_uncertain(candidates([0, 0]), torch.zeros(0)).labels) == 0
