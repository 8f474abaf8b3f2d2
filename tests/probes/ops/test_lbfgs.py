"""L-BFGS on problems whose minimum is known."""

from collections import deque

import pytest
import torch

from probes.ops.lbfgs import MEMORY, change_units, minimise

pytestmark = pytest.mark.numerics


def test_minimise_stops_where_rounding_allows_no_step():
    start = torch.zeros(3, 1, 12, dtype=torch.float64)

    def flat(points, problems):
        return (torch.ones(len(points)).double(), torch.ones_like(points))

    found, _, _, decrease = minimise(flat, start, torch.ones_like(start), 1e-12)
    assert torch.equal(found, start)
    assert (decrease > 1).all()


def test_pairs_in_other_units_describe_the_objective_with_its_new_penalty():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    hessian = root @ root.mT + torch.eye(6)

    def quadratic(points: torch.Tensor, problems: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        x = points.view(-1, 6, 1)
        by_point = hessian[problems] @ x - 1
        return (x * (by_point - 1)).sum((1, 2)) / 2, by_point.view(-1, 1, 6)

    before, after = 0.5 + torch.rand(2, 2, 1, 6, generator=generator, dtype=torch.float64)
    added = torch.tensor([0.7, -0.3]).double()[:, None, None].expand(2, 1, 6)
    pairs = deque(maxlen=MEMORY)
    minimise(
        quadratic,
        torch.zeros(2, 1, 6).double(),
        before,
        1e-3,
        pairs=pairs,
    )
    assert len(pairs) > 2
    change_units(pairs, before, after, added)
    changed = hessian + torch.diag_embed(added[:, 0])
    for step, change, *_ in pairs:
        expected = after[:, 0] * (changed @ (after[:, 0] * step)[..., None])[..., 0]
        torch.testing.assert_close(change, expected)
