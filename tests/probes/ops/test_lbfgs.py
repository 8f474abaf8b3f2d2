"""L-BFGS on problems whose minimum is known."""

import pytest
import torch

from probes.ops.lbfgs import Pair, minimise, quasi_newton

pytestmark = pytest.mark.numerics


def identity(points, gradient, problems):
    return lambda x: x


def test_minimise_stops_where_rounding_allows_no_step():
    start = torch.zeros((3, 1, 12), dtype=torch.float64)

    def flat(points, problems):
        return torch.ones(len(points)).double(), torch.ones_like(points)

    minimum, _, _, decrease = minimise(flat, points=start, first_guess=identity, tolerance=1e-12)
    assert torch.equal(minimum, start)
    assert (decrease > 1).all()


class Quadratic:
    """Two quadratic functions of six variables."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        root = torch.randn((2, 6, 6), generator=generator, dtype=torch.float64)
        self.hessian = root @ root.mT + torch.eye(6)
        self.evaluated = 0

    def __call__(self, points: torch.Tensor, problems: list[int]):
        self.evaluated += 1
        x = points.view(-1, 6, 1)
        by_point = self.hessian[problems] @ x - 1
        return (x * (by_point - 1)).sum((1, 2)) / 2, by_point.view(-1, 1, 6)

    @property
    def minimum(self) -> torch.Tensor:
        return torch.linalg.solve(self.hessian, torch.ones(2, 6, 1).double()).view(2, 1, 6)


def test_the_inverse_hessian_as_first_guess_leads_to_the_minimum_in_one_step():
    objective = Quadratic()
    seen = []

    def inverse(points, gradient, problems):
        seen.append((points.clone(), gradient.clone(), problems))
        return lambda x: torch.linalg.solve(objective.hessian[problems], x.double().mT).mT

    start = objective.minimum
    start[0] = 1  # the other one has nothing to do
    minimum = minimise(objective, points=start, first_guess=inverse, tolerance=1e-10)
    torch.testing.assert_close(minimum.points, objective.minimum, rtol=1e-5, atol=1e-5)
    assert objective.evaluated == 2
    assert [problems for *_, problems in seen] == [[0, 1], [0]]
    assert [points.tolist() for points, *_ in seen] == [start.tolist(), minimum.points[:1].tolist()]
    torch.testing.assert_close(seen[0][1], objective(start, [0, 1])[1])


def test_quasi_newton_satisfies_its_last_pair():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn((3, 2, 4, 5), generator=generator, dtype=torch.float64)
    changes = steps * torch.rand(steps.shape, generator=generator) + 0.1 * steps
    pairs = [Pair.of(*pair) for pair in zip(steps, changes, strict=True)]
    direction = quasi_newton(changes[-1], pairs, lambda x: x / 3)
    torch.testing.assert_close(direction, steps[-1], rtol=1e-4, atol=1e-4)


def test_pairs_whose_product_has_no_inverse_are_left_out():
    """The gradient has not grown along a step, or the product is a denormal number in float32."""
    small = 0.5 * torch.finfo(torch.float32).tiny ** 0.5
    step = torch.ones(3, 1, 3, dtype=torch.float64) * torch.tensor([1, 1, small])[:, None, None]
    pair = Pair.of(step, torch.stack([-step[0], step[1], step[2]]))
    assert pair.inverse.tolist() == pytest.approx([0, 1 / 3, 0])
    gradient = torch.randn(3, 1, 3, dtype=torch.float64)
    direction = quasi_newton(gradient, [pair], lambda x: x / 3)
    torch.testing.assert_close(direction[[0, 2]], gradient[[0, 2]] / 3, rtol=1e-6, atol=1e-6)
