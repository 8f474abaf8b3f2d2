"""The parts of a loss agree with one another, and with PyTorch's loss of upsampled logits."""

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY, LabelSmoothing

from probes.ops.quadrature import prepare_masks

pytestmark = pytest.mark.numerics

CLASSES = 4
SMOOTHED = LabelSmoothing(0.2)
LOSSES = pytest.mark.parametrize(
    ("loss", "share"), [(CROSS_ENTROPY, 0.0), (SMOOTHED, 0.2)], ids=["cross-entropy", "smoothed"]
)


@LOSSES
def test_images_have_the_loss_and_gradient_of_their_upsampled_logits(loss, share):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(
        2,
        3,
        CLASSES,
        4,
        4,
        generator=generator,
        dtype=torch.float64,
    )
    logits.requires_grad_()
    target = torch.randint(CLASSES, (3, 16, 16), generator=generator)
    target[:, :3] = 255
    masks = prepare_masks(
        target,
        CLASSES,
        (4, 4),
        nodes=None,
        dtype=torch.float64,
    )
    found, gradient = loss.of_images(logits.detach(), masks)
    for probe in range(2):
        for image in range(3):
            up = F.interpolate(logits[probe, image][None], (16, 16), mode="bilinear")
            options = {
                "ignore_index": 255,
                "reduction": "sum",
                "label_smoothing": share,
            }
            expected = F.cross_entropy(up, target[image][None], **options)
            torch.testing.assert_close(
                found[probe, image],
                expected,
                rtol=1e-6,
                atol=1e-6,
            )
            expected.backward()
    torch.testing.assert_close(
        gradient,
        logits.grad,
        rtol=1e-5,
        atol=1e-6,
    )
    assert loss.of_images(logits.detach(), masks, needs_grad=False)[1] is None


@LOSSES
def test_curvature_is_the_second_derivative_of_pytorchs_loss(loss, share):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(
        50,
        CLASSES,
        generator=generator,
        dtype=torch.float64,
    )
    labels = torch.randint(CLASSES, (50,), generator=generator)
    curvature = loss.curvature(logits)

    def total(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            x,
            labels,
            reduction="sum",
            label_smoothing=share,
        )

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
    F.cross_entropy(
        logits,
        labels,
        reduction="sum",
        label_smoothing=share,
    ).backward()
    torch.testing.assert_close(constant.grad, torch.zeros(CLASSES, dtype=torch.float64))
    assert loss.constant(torch.tensor([2.0, 0, 0, 1])).isfinite().all()
