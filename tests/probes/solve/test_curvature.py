"""Nodes that show the curvature of the loss of all images."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY

from probes.ops.quadrature import PreparedMasks, join_masks, prepare_masks
from probes.solve import curvature
from probes.solve.curvature import SampledNodes, SampleHessian, sample_nodes
from probes.solve.objective import NODES
from probes.solve.space import SiteSpace

pytestmark = pytest.mark.numerics

CLASSES = 3
WIDTH = 4


def masks_of(grid: tuple[int, int], sizes: list[tuple[int, int]]) -> PreparedMasks:
    """Return masks of random labels, each with an unlabelled corner of its own size."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i, size in enumerate(sizes):
        target = torch.randint(0, CLASSES, (1, *size), generator=generator).to(torch.uint8)
        target[:, : i * size[0] // 5, : size[1] // 2] = 255
        parts.append(prepare_masks(target, CLASSES, grid, NODES))
    return join_masks(parts)


def plain_space(width: int) -> SiteSpace:
    """Return coordinates in which states are as they are."""
    zeros = torch.zeros(width, dtype=torch.float64)
    return SiteSpace(zeros, zeros + 1, torch.eye(width), zeros + 1, zeros)


def sample_of(
    states: list[torch.Tensor],
    masks: list[PreparedMasks],
    count: int,
    point: torch.Tensor | None = None,
) -> SampledNodes:
    """Return a sample of nodes of some folds, by default for a probe that is unsure of all alike."""
    width = states[0].shape[-1]
    if point is None:
        point = torch.zeros(CLASSES, width + 1)
    sizes = [len(x) for x in states]
    problem = SimpleNamespace(
        loss=CROSS_ENTROPY,
        space=plain_space(width),
        states=torch.cat(states),
        masks=join_masks(masks),
        folds=torch.arange(sum(sizes)).split(sizes),
        pixels=torch.stack([of_fold.pixels.sum() for of_fold in masks]),
    )
    return sample_nodes(problem, count, point.double())


def node_states(states: torch.Tensor, masks: PreparedMasks, grid) -> torch.Tensor:
    """Return the states f[B, My, Mx, d] at all nodes, by products with the rules."""
    found = []
    for x, rule in zip(states, masks.rule_of, strict=True):
        rows, cols = masks.rules[rule]
        found.append(torch.einsum("mh,nw,hwd->mnd", rows, cols, x.unflatten(0, grid)))
    return torch.stack(found)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1)])
def test_states_are_those_at_nodes_that_have_pixels(grid):
    """Photos of several sizes have nodes of their own."""
    masks = masks_of(grid, [(24, 32), (40, 30), (24, 32)])
    states = torch.randn(3, grid[0] * grid[1], WIDTH)
    sample = sample_of([states], [masks], 200)
    assert len(sample.weights) == 200
    at_all = node_states(states, masks, grid).flatten(0, 2)
    nearest, node = (sample.inputs[:, None, :-1] - at_all).norm(dim=2).min(1)
    torch.testing.assert_close(nearest, torch.zeros(200), atol=1e-5, rtol=0)
    if grid != (1, 1):  # where all nodes of an image have the same state
        assert (masks.mass.flatten()[node] > 0).all()


@pytest.mark.parametrize("count", [1, 300])
def test_a_fold_of_few_pixels_has_a_node(count):
    """Where one fold has nearly all pixels, the others are all that the probe without it has seen."""
    grid = (3, 3)
    many = masks_of(grid, [(240, 240)])
    target = torch.full((1, 240, 240), 255, dtype=torch.uint8)
    target[0, 0, :6] = 1
    few = prepare_masks(target, CLASSES, grid, NODES)
    states = torch.randn(1, 9, WIDTH)
    sample = sample_of([states, states, states], [few, many, few], count)
    counts = sample.folds.bincount(minlength=3).tolist()
    assert counts == [1, count, 1]
    weights = sample.weights
    expected = weights.new_tensor([few.mass.clamp(min=0).sum(), few.mass.clamp(min=0).sum()])
    torch.testing.assert_close(weights[sample.folds != 1], expected)


@pytest.mark.parametrize("certainty", [0.0, 2.0])
def test_means_over_nodes_are_means_over_pixels(certainty):
    """Of a function of the upsampled states that is not linear, whichever nodes are preferred."""
    grid = (4, 4)
    size = (64, 64)
    masks = masks_of(grid, [size, size])
    states = torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(1))
    point = certainty * torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    sample = sample_of([states], [masks], 20_000, point)
    up = F.interpolate(states.mT.unflatten(2, grid), size, mode="bilinear")[:, 0]
    labelled = torch.ones(2, *size)
    labelled[1, : size[0] // 5, : size[1] // 2] = 0
    expected = (up.square() * labelled).sum() / labelled.sum()
    found = (sample.inputs[:, 0].square() * sample.weights).sum() / sample.weights.sum()
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_gradient", [0.0, 0.2])
def test_sample_hessian_is_the_derivative_of_the_gradient(
    product_dtype,
    bias_gradient,
    monkeypatch,
):
    """Of the mean loss of the nodes, for a probe that leaves a fold out and for one that does not."""
    monkeypatch.setattr(curvature, "fast_dtype", lambda device: product_dtype)
    monkeypatch.setattr(curvature, "SAMPLE_RESIDUAL", 0.03)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(400, WIDTH + 1, generator=generator)
    inputs[:, -1] = 1
    weights = torch.rand(400, generator=generator)
    sample = SampledNodes(inputs, weights, torch.arange(400) % 3)
    points = 0.3 * torch.randn(2, CLASSES, WIDTH + 1, generator=generator).double()
    direction = torch.randn(points.shape, generator=generator).double()
    used = torch.stack([weights * (sample.folds != 1), weights], 1).double()
    used /= used.sum(0)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        """Without the labels, on which the second derivative does not depend."""
        probability = torch.einsum("nc,pkc->npk", inputs.double(), x).softmax(-1)
        return torch.einsum("np,npk,nc->pkc", used, probability, inputs.double())

    space = plain_space(WIDTH)
    strengths = torch.tensor([1e-2, 1e-3]).double()
    hessian = SampleHessian(
        SimpleNamespace(loss=CROSS_ENTROPY, space=space),
        sample,
        points,
        bias_gradient * direction,
        strengths,
        [1, None],
    )
    expected = (gradient(points + 1e-2 * direction) - gradient(points - 1e-2 * direction)) / 2e-2
    product = hessian.times(direction.float()) - hessian.pull * direction
    torch.testing.assert_close(product, expected, atol=2e-3, rtol=1e-2)
    solved = hessian.solve(direction)
    assert (hessian.times(solved) - direction).norm() < 0.1 * direction.norm()
    bias_pull = (bias_gradient * direction[..., -1:]).abs() * space.input_spectrum
    at_least = space.ridge(strengths) + bias_pull
    assert (hessian.pull > at_least).all(), "and the damping"
