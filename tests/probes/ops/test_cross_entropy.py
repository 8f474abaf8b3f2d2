"""Upsampled cross-entropy against its definition, `F.interpolate` then `F.cross_entropy`."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import IGNORED, make_case, value_and_gradient
from torch.utils._python_dispatch import TorchDispatchMode

from probes.ops import bilinear
from probes.ops import cross_entropy as loss_module
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.geometry import AxisExtent, GridPlacement
from probes.ops.quadrature import axis_rule, join_masks, prepare_masks

pytestmark = pytest.mark.numerics

LABEL_DTYPES = [torch.bool, torch.int8, torch.uint16, torch.uint64]


def torch_losses(logits, target, ignore_index=IGNORED):
    """The definition, probe by probe, f[P]."""
    ups = [F.interpolate(z, target.shape[-2:], mode="bilinear") for z in logits]
    return torch.stack(
        [F.cross_entropy(up, target.long(), ignore_index=ignore_index) for up in ups]
    )


SHAPE = st.tuples(*(st.integers(1, most) for most in (3, 3, 6, 7, 7)))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    shape=SHAPE,
    size=st.tuples(st.integers(1, 20), st.one_of(st.integers(1, 20), st.integers(60, 100))),
    scale=st.sampled_from([3.0, 300.0]),
    numel=st.sampled_from([1, 3000, 2**20]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_with_all_pixels_as_nodes_it_is_exact(shape, size, scale, numel, double, seed):
    logits, target = make_case(shape, size, scale=scale, seed=seed)
    # from upstream, probes get different gradients
    weights = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).double()
    expected, expected_gradient = value_and_gradient(
        lambda z: torch_losses(z, target), logits, weights
    )
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 2e-5)
    # small chunks: of rows, images and probes
    with mock.patch.dict(loss_module.CHUNK_NUMEL, cpu=numel):
        losses, gradient = value_and_gradient(
            lambda z: upsampled_cross_entropy(z, target, nodes=None), logits.to(dtype), weights
        )
    assert losses.dtype == gradient.dtype == dtype
    torch.testing.assert_close(
        losses.double(), expected, rtol=tolerance, atol=tolerance * scale / 10
    )
    size_of_gradient = expected_gradient.abs().max().item() + 0.01 * weights.abs().max().item()
    atol = tolerance * size_of_gradient * scale / 3  # logits of 300 are themselves rounded to 1e-5
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=atol)


def test_pixels_that_a_crop_leaves_outside_count_as_one_position():
    """200 columns, of which a grid of 8 tokens covers 20: their positions fit into 2 + 3 * 7 nodes."""
    view = GridPlacement(AxisExtent(0.0, 20.0), AxisExtent(90.0, 20.0))
    logits, target = make_case((1, 2, 5, 8, 8), (20, 200), scale=30.0)
    exact, few = (
        upsampled_cross_entropy(logits, target, nodes=nodes, view=view) for nodes in (None, 3)
    )
    torch.testing.assert_close(few, exact, rtol=1e-12, atol=0)


def test_the_default_is_within_1e_5_nats_on_noise():
    logits, target = make_case((1, 2, 20, 24, 24), (240, 320))
    losses = upsampled_cross_entropy(logits.float(), target).double()
    torch.testing.assert_close(losses, torch_losses(logits, target), rtol=0, atol=1e-5)


def test_joined_masks_of_different_sizes_equal_each_alone():
    logits, _ = make_case((2, 3, 4, 5, 5), (9, 9))
    targets = [
        make_case((1, 1, 4, 5, 5), size, seed=i)[1]
        for i, size in enumerate([(60, 80), (7, 90), (60, 80)])
    ]
    alone = [prepare_masks(target, 4, (5, 5), dtype=torch.float64) for target in targets]
    masks = join_masks(alone)
    assert len(masks) == 3 and len(masks.rules) == 2, "few rows have a rule of their own"
    expected = torch.stack(
        [upsampled_cross_entropy(logits[:, [i]], alone[i]) * alone[i].pixels for i in range(3)], 1
    )
    by_image, _ = loss_module.loss_and_gradient(logits, masks)
    torch.testing.assert_close(by_image, expected)
    for images in (slice(1, 3), [2, 0]):
        losses = upsampled_cross_entropy(logits[:, images], masks[images])
        total = expected[:, images].sum(1)
        torch.testing.assert_close(losses * masks[images].pixels.sum(), total)


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_labels_of_any_integer_type_and_truth_values_are_classes(dtype):
    """One probe may leave out its axis."""
    logits, target = make_case((1, 2, 2, 3, 3), (9, 11), ignored=0)
    loss = upsampled_cross_entropy(logits[0], target.to(dtype))
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch_losses(logits, target)[0])


def test_an_ignored_batch_gives_zero_and_no_gradient():
    logits, target = make_case((2, 2, 4, 3, 3), (9, 11), scale=300.0)
    target[:] = IGNORED
    losses, gradient = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert losses.tolist() == [0, 0]
    assert not gradient.any()


@pytest.mark.parametrize(
    ("ignore_index", "label", "dtype"),
    [(3, 3, torch.int64), (-100, 156, torch.uint8), (256, 0, torch.uint8)],
)
def test_ignore_index_may_be_a_class_negative_or_of_another_type(ignore_index, label, dtype):
    """In uint8, -100 would be 156, and 256 be 0."""
    logits, target = make_case((2, 2, 200, 3, 3), (9, 11), ignored=0)
    target[:, :4] = label
    expected = value_and_gradient(lambda z: torch_losses(z, target, ignore_index), logits, 1.0)
    found = value_and_gradient(
        lambda z: upsampled_cross_entropy(z, target.to(dtype), ignore_index), logits, 1.0
    )
    torch.testing.assert_close(found, expected)


def test_small_float32_losses_keep_their_digits():
    """The loss is a difference of two sums. Were they large, little would be left of a small one."""
    logits, target = make_case((1, 1, 6, 4, 4), (64, 64), scale=60.0)
    target[:] = bilinear.upsampled_argmax(logits[0], (64, 64))
    expected = torch_losses(logits, target)
    losses = upsampled_cross_entropy(logits.float() + 100, target, nodes=None)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)


def test_half_precision_is_computed_in_float32_also_under_autocast():
    logits, target = make_case((2, 2, 5, 3, 3), (19, 21), dtype=torch.bfloat16)

    def loss(z):
        return upsampled_cross_entropy(z, target)

    expected, gradient = value_and_gradient(loss, logits.float(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses, found = value_and_gradient(loss, logits, 1.0)
    assert losses.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, gradient.bfloat16(), rtol=0.02, atol=1e-6)


def test_training_after_validation_in_inference_mode():
    logits, target = make_case((1, 2, 5, 3, 3), (19, 23))
    axis_rule.cache_clear()
    bilinear.bilinear_weights.cache_clear()
    with torch.inference_mode():
        expected = upsampled_cross_entropy(logits, target).clone()
    losses, gradient = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert torch.equal(losses, expected)
    assert gradient.any()


def test_full_resolution_logits_never_exist():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
            return out

    logits, target = make_case((2, 2, 60, 6, 6), (640, 640), dtype=torch.float32)
    for nodes, most in ((None, 6 * loss_module.CHUNK_NUMEL["cpu"]), (3, 2 * target.numel())):
        with Largest() as largest:
            upsampled_cross_entropy(logits.requires_grad_(), target, nodes=nodes).sum().backward()
        assert 0 < largest.numel <= most < 60 * 640 * 640 / 3


def test_off_the_cpu_no_value_is_read():
    """Reading one stalls a GPU. Meta tensors, which have none, refuse it, and refuse to meet tensors on the CPU."""
    case = make_case((3, 2, 5, 3, 3), (40, 23), dtype=torch.float32)
    logits, target = (x.to("meta") for x in case)
    logits.requires_grad_()
    with mock.patch.object(
        torch, "autocast", lambda *_, **__: nullcontext()
    ):  # knows no meta device
        upsampled_cross_entropy(logits, target).sum().backward()
        predicted = bilinear.upsampled_argmax(logits, (40, 23))
    assert logits.grad.shape == logits.shape
    assert predicted.shape == (3, 2, 40, 23)


@pytest.mark.parametrize("label", [-1, 5, 254])
def test_a_label_that_is_no_class_is_named(label):
    logits, target = make_case((1, 2, 5, 3, 3), (9, 11))
    target[1, 4, 5] = label
    with pytest.raises(ValueError, match=rf"label {label} .*K=5.*ignore_index=255"):
        upsampled_cross_entropy(logits, target)
