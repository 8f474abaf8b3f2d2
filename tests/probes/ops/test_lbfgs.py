"""L-BFGS on problems whose minimum is known."""

import pytest
import torch

from probes.ops.lbfgs import minimise

pytestmark = pytest.mark.numerics


def test_minimise_solves_quadratics_in_a_few_steps_and_stops_where_rounding_allows_no_step():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    hessian = root @ root.mT + torch.eye(12)
    goal = torch.randn(3, 12, 1, generator=generator, dtype=torch.float64)
    calls = []

    def quadratic(points: torch.Tensor, problems: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(problems)
        apart = points.view(-1, 12, 1) - goal[problems]
        by_point = hessian[problems] @ apart
        return (apart * by_point).sum((1, 2)) / 2, by_point.view(-1, 1, 12)

    start = torch.zeros(3, 1, 12, dtype=torch.float64)
    scale = torch.ones(3, 1, 12, dtype=torch.float64)
    found, _, decrease = minimise(quadratic, start, scale, 1e-12)
    torch.testing.assert_close(found.view(3, 12, 1), goal, rtol=1e-4, atol=1e-4)
    assert (decrease < 1e-12).all()
    assert len(calls) < 100

    def flat(points, problems):
        return (torch.ones(len(points)).double(), torch.ones_like(points))

    stuck, _, decrease = minimise(flat, start, scale, 1e-12)
    assert torch.equal(stuck, start)
    assert (decrease > 1).all()
