"""Nodes that show the curvature of the loss of images in memory."""

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY

from probes.ops.quadrature import PreparedMasks, join_masks, prepare_masks
from probes.solve.curvature import SampledPixels, sample_nodes
from probes.solve.objective import LOOSE_NODES

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
        parts.append(prepare_masks(target, CLASSES, grid, LOOSE_NODES))
    return join_masks(parts)


def sample_of(
    states: list[torch.Tensor],
    masks: list[PreparedMasks],
    count: int,
    point: torch.Tensor | None = None,
) -> SampledPixels:
    """Return a sample of nodes, by default for a probe that is unsure of all alike."""
    if point is None:
        point = torch.zeros(CLASSES, states[0].shape[-1])
    return sample_nodes(
        CROSS_ENTROPY,
        states,
        masks,
        count,
        point,
    )


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
    nearest, node = (sample.inputs[:, None] - at_all).norm(dim=2).min(1)
    torch.testing.assert_close(nearest, torch.zeros(200), atol=1e-5, rtol=0)
    if grid != (1, 1):  # where all nodes of an image have the same state
        assert (masks.mass.flatten()[node] > 0).all()


def test_folds_have_nodes_by_their_pixels_and_one_without_labels_has_none():
    grid = (3, 3)
    few = masks_of(grid, [(24, 24)])
    many = masks_of(grid, [(24, 24), (30, 30), (24, 24)])
    none = prepare_masks(torch.full((1, 24, 24), 255, dtype=torch.uint8), CLASSES, grid)
    states = [torch.randn(len(mask), 9, WIDTH) for mask in (few, none, many)]
    sample = sample_of(states, [few, none, many], 300)
    counts = sample.folds.bincount(minlength=3).tolist()
    assert counts[1] == 0 and sum(counts) == 300
    expected = 300 * few.pixels.sum() / (few.pixels.sum() + many.pixels.sum())
    assert counts[0] == pytest.approx(expected.item(), abs=1)


@pytest.mark.parametrize("count", [1, 300])
def test_a_fold_of_few_pixels_has_a_node(count):
    """Where one fold has nearly all pixels, the others are all that the probe without it has seen."""
    grid = (3, 3)
    many = masks_of(grid, [(240, 240)])
    target = torch.full((1, 240, 240), 255, dtype=torch.uint8)
    target[0, 0, :6] = 1
    few = prepare_masks(target, CLASSES, grid, LOOSE_NODES)
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
    point = certainty * torch.tensor([[-1.0], [0.0], [1.0]])
    sample = sample_of([states], [masks], 20_000, point)
    up = F.interpolate(states.mT.unflatten(2, grid), size, mode="bilinear")[:, 0]
    labelled = torch.ones(2, *size)
    labelled[1, : size[0] // 5, : size[1] // 2] = 0
    expected = (up.square() * labelled).sum() / labelled.sum()
    found = (sample.inputs[:, 0].square() * sample.weights).sum() / sample.weights.sum()
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
