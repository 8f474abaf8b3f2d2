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
        parts.append(prepare_masks(target, num_classes=CLASSES, grid=grid, nodes=NODES))
    return join_masks(parts)


def plain_space(width: int) -> SiteSpace:
    """Return coordinates in which states are as they are."""
    zeros = torch.zeros(width, dtype=torch.float64)
    return SiteSpace(
        mean=zeros, scale=zeros + 1, basis=torch.eye(width), spectrum=zeros + 1, pixels=zeros
    )


def sample_of(
    states: torch.Tensor, masks: list[PreparedMasks], count: int, point: torch.Tensor
) -> SampledNodes:
    """Return a sample of nodes for a probe; each of the masks is those of a fold."""
    sizes = [len(of_fold.pixels) for of_fold in masks]
    problem = SimpleNamespace(
        loss=CROSS_ENTROPY,
        space=plain_space(states.shape[-1]),
        states=states,
        masks=join_masks(masks),
        folds=torch.arange(len(states)).split(sizes),
        pixels=torch.stack([of_fold.pixels.sum() for of_fold in masks]),
    )
    return sample_nodes(problem, count, point.double())


@pytest.mark.parametrize("count", [1, 300])
def test_a_fold_of_few_pixels_has_a_node(count):
    """Where one fold has nearly all pixels, the others are all that the probe without it has seen."""
    grid = (3, 3)
    many = masks_of(grid, [(240, 240)])
    target = torch.full((1, 240, 240), 255, dtype=torch.uint8)
    target[0, 0, :6] = 1
    few = prepare_masks(target, num_classes=CLASSES, grid=grid, nodes=NODES)
    unsure = torch.zeros(CLASSES, WIDTH + 1)
    sample = sample_of(torch.randn(3, 9, WIDTH), masks=[few, many, few], count=count, point=unsure)
    assert sample.folds.bincount(minlength=3).tolist() == [1, count, 1]
    expected = few.mass.clamp(min=0).sum().to(sample.weights.dtype)
    torch.testing.assert_close(sample.weights[sample.folds != 1], expected.expand(2))


@pytest.mark.parametrize("certainty", [0.0, 2.0])
def test_means_over_nodes_are_means_over_pixels(certainty):
    """Of a function of the upsampled states that is not linear, whichever nodes are preferred; sizes differ."""
    grid = (4, 4)
    sizes = [(64, 64), (80, 48)]
    masks = masks_of(grid, sizes)
    states = torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(1))
    point = certainty * torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    sample = sample_of(states, masks=[masks], count=20_000, point=point)
    total = labelled = 0.0
    for i, (x, size) in enumerate(zip(states, sizes, strict=True)):
        up = F.interpolate(x.T.unflatten(1, grid)[None], size, mode="bilinear")[0, 0]
        up[: i * size[0] // 5, : size[1] // 2] = torch.nan  # as masks_of
        total += up.square().nansum()
        labelled += up.isfinite().sum()
    found = (sample.inputs[:, 0].square() * sample.weights).sum() / sample.weights.sum()
    assert found.item() == pytest.approx((total / labelled).item(), rel=0.02)


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_gradient", [0.0, 0.2])
def test_sample_hessian_is_the_derivative_of_the_gradient(
    product_dtype, bias_gradient, monkeypatch
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
        problem=SimpleNamespace(loss=CROSS_ENTROPY, space=space),
        sample=sample,
        points=points,
        gradient=bias_gradient * direction,
        strengths=strengths,
        left_out=[1, None],
    )
    expected = (gradient(points + 1e-2 * direction) - gradient(points - 1e-2 * direction)) / 2e-2
    product = hessian.times(direction.float()) - hessian.pull * direction
    torch.testing.assert_close(product, expected, atol=2e-3, rtol=1e-2)
    solved = hessian.solve(direction)
    assert (hessian.times(solved) - direction).norm() < 0.1 * direction.norm()
    bias_pull = (bias_gradient * direction[..., -1:]).abs() * space.input_spectrum
    at_least = space.ridge(strengths) + bias_pull
    assert (hessian.pull > at_least).all(), "and the damping"
