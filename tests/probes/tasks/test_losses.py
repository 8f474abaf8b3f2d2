"""Parts of a loss agree with PyTorch's; value and gradient are compared in tests/probes/ops/test_cross_entropy.py."""

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY, LabelSmoothing

pytestmark = pytest.mark.numerics

CLASSES = 4
SMOOTHED = LabelSmoothing(0.2)
LOSSES = pytest.mark.parametrize(
    ("loss", "share"), [(CROSS_ENTROPY, 0.0), (SMOOTHED, 0.2)], ids=["cross-entropy", "smoothed"]
)


@LOSSES
def test_curvature_is_the_second_derivative_of_pytorchs_loss(loss, share):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((50, CLASSES), generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (50,), generator=generator)
    curvature = loss.curvature(logits)

    def total(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, labels, reduction="sum", label_smoothing=share)

    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.functional.hvp(total, logits, direction)[1]
    torch.testing.assert_close(curvature.times(direction), expected)
    units = torch.eye(CLASSES, dtype=torch.float64)
    columns = [curvature.times(unit.expand_as(logits))[:, k] for k, unit in enumerate(units)]
    torch.testing.assert_close(curvature.diagonal(), torch.stack(columns, 1))
    torch.testing.assert_close(curvature.trace(), curvature.diagonal().sum(1))


@LOSSES
def test_the_constant_has_no_gradient(loss, share):
    counts = torch.tensor([5.0, 1, 3, 2], dtype=torch.float64)
    labels = torch.arange(CLASSES).repeat_interleave(counts.long())
    constant = loss.constant(counts).requires_grad_()
    logits = constant.expand(len(labels), -1)
    F.cross_entropy(logits, labels, reduction="sum", label_smoothing=share).backward()
    torch.testing.assert_close(constant.grad, torch.zeros(CLASSES, dtype=torch.float64))
    assert loss.constant(torch.tensor([2.0, 0, 0, 1])).isfinite().all()
