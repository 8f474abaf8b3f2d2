"""Least squares in closed form against explicit upsampling, ignored pixels, several grids, sizes and views."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.ops.bilinear import bilinear_weights
from probes.ops.geometry import Geometry, ResizeRule
from probes.ops.normal_equations import normal_equations
from probes.solve.least_squares import LEAST_SQUARES_STRENGTHS, solve_values
from probes.solve.solution import Solution

pytestmark = pytest.mark.numerics

WIDTH = 7
CHANNELS = 3
IMAGES = 4


def draw(grid, size) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states f64[B, T, d] with correlated channels, and targets f64[B, H, W, K] of which a third is ignored."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = new(IMAGES, grid[0] * grid[1], WIDTH) @ new(WIDTH, WIDTH) + 5
    target = new(IMAGES, *size, CHANNELS)
    target[torch.rand(IMAGES, *size, generator=generator) < 1 / 3] = torch.nan
    target[0, : size[0] // 2] = torch.nan
    return states, target


def solve(states, target, grid, view) -> Solution:
    """Return the probes; image i is in fold i % 2."""
    fold_of = torch.arange(IMAGES) % 2
    return solve_values(
        states, equations=normal_equations(target, grid, view), grid=grid, fold_of=fold_of
    )


@pytest.mark.parametrize(
    ("grid", "size", "resize"),
    [((3, 4), (20, 30), "pad"), ((1, 5), (33, 17), "squash"), ((6, 6), (20, 30), "center_crop")],
)
def test_every_strength_and_its_cross_validation_equal_separate_ridge_regressions(
    grid, size, resize, monkeypatch
):
    monkeypatch.setattr("probes.solve.space.BLOCK", 5)  # of seven channels: products in two parts
    view = Geometry(grid=grid, image_px=48, covered_px=42, rule=ResizeRule(resize)).view(size)
    states, target = draw(grid, size)
    solved = solve(states, target=target, grid=grid, view=view)
    axes = (
        bilinear_weights(n, m, extent, dtype=torch.float64)
        for n, m, extent in zip(grid, size, view, strict=True)
    )
    up = torch.einsum("yi,xj->yxij", *axes).reshape(size[0] * size[1], -1)

    def pixels(images: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return upsampled states f64[n, d] and targets f64[n, K] of the labelled pixels."""
        flat = target[images].flatten(0, 2)
        labelled = flat.isfinite().all(-1)
        return (up @ states[images]).flatten(0, 1)[labelled], flat[labelled]

    def ridge(images: list[int], strength: float) -> Pipeline:
        x, y = pixels(images)
        alpha = len(x) * strength / max(1 - strength, 1e-12)
        return make_pipeline(StandardScaler(), Ridge(alpha)).fit(x, y)

    error = torch.zeros(len(LEAST_SQUARES_STRENGTHS), dtype=torch.float64)
    count = 0
    for held_out, others in ([0, 2], [1, 3]), ([1, 3], [0, 2]):
        x, y = pixels(held_out)
        count += len(x)
        for r, strength in enumerate(LEAST_SQUARES_STRENGTHS):
            error[r] += ((ridge(others, strength).predict(x) - y.numpy()) ** 2).sum()
    torch.testing.assert_close(solved.loss, error / count, rtol=1e-8, atol=0)
    for r, strength in enumerate(LEAST_SQUARES_STRENGTHS):
        scaler, ridge_head = ridge([*range(IMAGES)], strength)
        weights = ridge_head.coef_ / scaler.scale_
        np.testing.assert_allclose(solved.weights[r], weights, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(solved.mean, scaler.mean_)
        np.testing.assert_allclose(solved.bias[r], ridge_head.intercept_, rtol=1e-6)


@pytest.mark.parametrize("states_are", ["far from zero", "nearly singular"])
def test_float32_states_lose_nothing_that_matters(states_are):
    """A channel of an LLM has a mean of thousands of deviations, and variances span six decades in every direction."""
    grid = (6, 6)
    size = (20, 30)
    view = Geometry(grid=grid, image_px=48, covered_px=42, rule=ResizeRule("squash")).view(size)
    states, target = draw(grid, size)
    if states_are == "far from zero":
        states[..., 0] += 3000
    else:
        generator = torch.Generator().manual_seed(0)
        mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0]
        states = states @ (mix * torch.logspace(0, -3, WIDTH).double()) @ mix.T
    single = states.float()
    exact = solve(single.double(), target=target, grid=grid, view=view)
    ours = solve(single, target=target, grid=grid, view=view)
    torch.testing.assert_close(ours.loss, exact.loss, rtol=1e-5, atol=0)
    assert (ours.weights[-1] - exact.weights[-1]).norm() / exact.weights[-1].norm() < 1e-5
