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

pytestmark = pytest.mark.numerics


def torch_losses(logits, target, ignore_index=IGNORED, stride=1):
    """The definition, probe by probe, f[P]."""
    pixels = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))
    ups = [F.interpolate(z, target.shape[-2:], mode="bilinear", align_corners=False)[pixels] for z in logits]
    return torch.stack([F.cross_entropy(up, target[pixels].long(), ignore_index=ignore_index) for up in ups])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 3, 6, 7, 7))),
    size=st.tuples(st.integers(2, 20), st.one_of(st.integers(2, 20), st.integers(60, 100))),
    scale=st.sampled_from([3.0, 300.0]),
    stride=st.integers(1, 3),
    numel=st.sampled_from([1, 3000, 2**19]),
    double=st.booleans(),
    classes_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_equal_torch(shape, size, scale, stride, numel, double, classes_last, seed):
    logits, target = make_case(shape, size, scale=scale, seed=seed)
    target[:, stride // 2, stride // 2] = 0  # a valid pixel that every stride takes
    weights = torch.randn(shape[0], dtype=torch.float64)  # probes differ in what comes from upstream
    expected, expected_gradient = value_and_gradient(lambda z: torch_losses(z, target, stride=stride), logits, weights)
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 2e-5)
    given_logits = logits.to(dtype)
    if classes_last:  # as a Linear gives them
        given_logits = given_logits.movedim(2, -1).contiguous().movedim(-1, 2)
    bilinear.make_plan.cache_clear()
    with mock.patch.dict(bilinear.CHUNK_NUMEL, cpu=numel):  # small chunks: several tiles, image and probe chunks
        losses, gradient = value_and_gradient(
            lambda z: upsampled_cross_entropy(z, target, label_stride=stride), given_logits, weights
        )
    bilinear.make_plan.cache_clear()
    assert losses.dtype == gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance * scale / 10)
    size_of_gradient = expected_gradient.abs().max().item() + 0.01 * weights.abs().max().item()
    atol = tolerance * size_of_gradient * scale / 3  # logits of 300 are themselves rounded to 1e-5
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("side", [24, 27])
def test_real_size_equals_torch(side):
    """ADE20K's classes under the grids of CLIP and SigLIP, a third of the pixels and a whole image ignored."""
    logits, target = make_case((1, 2, 150, side, side), (512, 683), ignored=0.3, dtype=torch.float32)
    target[1] = IGNORED
    expected, expected_gradient = value_and_gradient(lambda z: torch_losses(z, target), logits, 1.0)
    losses, gradient = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5 * expected_gradient.abs().max().item())
    assert not gradient[:, 1].any() and gradient[:, 0].any()


def test_one_probe_may_leave_out_its_axis_and_labels_may_be_uint8():
    logits, target = make_case((1, 2, 4, 3, 3), (9, 11))
    loss = upsampled_cross_entropy(logits[0], target.to(torch.uint8))
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch_losses(logits, target)[0])


def test_sums_over_unequal_batches_make_the_mean():
    logits, target = make_case((2, 3, 4, 3, 3), (9, 11))
    target[1, :6] = IGNORED
    total = sum(upsampled_cross_entropy(logits[:, i : i + 1], target[i : i + 1], reduction="sum") for i in range(3))
    torch.testing.assert_close(total / (target != IGNORED).sum(), upsampled_cross_entropy(logits, target))


def test_an_ignored_image_counts_for_nothing():
    logits, target = make_case((2, 3, 4, 3, 3), (9, 11))
    target[1] = IGNORED
    losses, gradient = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert not gradient[:, 1].any() and gradient[:, 0].any()
    torch.testing.assert_close(losses, torch_losses(logits[:, [0, 2]], target[[0, 2]]))


@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ignored_batch_gives_zero_and_no_gradient(reduction, scale):
    logits, target = make_case((2, 2, 4, 3, 3), (9, 11), scale=scale)
    target[:] = IGNORED
    losses, gradient = value_and_gradient(
        lambda z: upsampled_cross_entropy(z, target, reduction=reduction), logits, 1.0
    )
    assert losses.tolist() == [0, 0] and not gradient.any()


@pytest.mark.parametrize("ignore_index", [0, 3, -100])
def test_ignore_index_may_be_a_class_or_negative(ignore_index):
    logits, target = make_case((2, 2, 5, 3, 3), (9, 11), ignored=0)
    target[:, :4] = ignore_index
    expected = value_and_gradient(lambda z: torch_losses(z, target, ignore_index), logits, 1.0)
    found = value_and_gradient(lambda z: upsampled_cross_entropy(z, target, ignore_index), logits, 1.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1.0, 40.0, 1e4])
def test_a_common_shift_of_a_nodes_logits_changes_nothing(scale):
    logits, target = make_case((1, 2, 5, 3, 3), (9, 11), scale=scale)
    shifted = logits + 1e5 * torch.randn(1, 2, 1, 3, 3, dtype=torch.float64)
    expected = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    found = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), shifted, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_small_float32_losses_keep_their_digits():
    """The loss is a difference of two sums. Were they large, little would be left of a small one."""
    logits, target = make_case((1, 1, 6, 4, 4), (64, 64), scale=60.0)
    target[:] = bilinear.upsampled_argmax(logits[0], (64, 64))
    expected = torch_losses(logits, target)
    found = upsampled_cross_entropy(logits.float() + 100, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, target = make_case((2, 2, 5, 3, 3), (19, 21), dtype=dtype)
    expected, gradient = value_and_gradient(lambda z: torch_losses(z, target), logits.float(), 1.0)
    losses, found = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert losses.dtype == torch.float32 and found.dtype == dtype
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, gradient.to(dtype), rtol=0.02, atol=1e-6)


def test_autocast_changes_nothing():
    logits, target = make_case((2, 2, 5, 3, 3), (19, 21), dtype=torch.float32)
    expected = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert all(map(torch.equal, found, expected))


def test_no_gradient_no_work():
    logits, target = make_case((2, 2, 5, 3, 3), (19, 21))
    leaf = logits.clone().requires_grad_()
    with mock.patch.object(loss_module, "_logsumexp_sum", wraps=loss_module._logsumexp_sum) as inner:
        expected = upsampled_cross_entropy(leaf, target)
        with torch.no_grad():
            quiet = upsampled_cross_entropy(leaf, target)
        frozen = upsampled_cross_entropy(logits, target)
    assert [call.args[-1] for call in inner.call_args_list] == [True, False, False]
    assert expected.requires_grad and not quiet.requires_grad and not frozen.requires_grad
    assert torch.equal(quiet, expected) and torch.equal(frozen, expected)


def test_training_after_validation_in_inference_mode():
    logits, target = make_case((1, 2, 5, 3, 3), (19, 23))
    bilinear.make_plan.cache_clear()
    bilinear.bilinear_weights.cache_clear()
    with torch.inference_mode():
        expected = upsampled_cross_entropy(logits, target).clone()
    losses, gradient = value_and_gradient(lambda z: upsampled_cross_entropy(z, target), logits, 1.0)
    assert torch.equal(losses, expected) and gradient.any()


def test_inputs_are_left_as_they_were_and_backward_may_be_repeated():
    logits, target = make_case((1, 2, 5, 3, 4), (9, 11))
    logits = logits.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()  # the layout used inside
    before, labels = logits.detach().clone(), target.clone()
    loss = upsampled_cross_entropy(logits, target)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits, before) and torch.equal(target, labels)


def test_full_resolution_logits_never_exist():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
            return out

    logits, target = make_case((2, 2, 60, 6, 6), (320, 320), dtype=torch.float32)
    with Largest() as largest:
        upsampled_cross_entropy(logits.requires_grad_(), target).sum().backward()
    assert 0 < largest.numel <= bilinear.CHUNK_NUMEL["cpu"] * 1.5 < 60 * 320 * 320 / 7


def test_off_the_cpu_no_value_is_read():
    """Reading one stalls a GPU. Meta tensors, which have none, refuse it, and refuse to meet tensors on the CPU."""
    logits = torch.empty(3, 2, 5, 3, 3, device="meta", requires_grad=True)
    target = torch.empty(2, 40, 23, device="meta", dtype=torch.long)
    with mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):  # knows no meta device
        upsampled_cross_entropy(logits, target).sum().backward()
        predicted = bilinear.upsampled_argmax(logits, (40, 23))
    assert logits.grad.shape == logits.shape and predicted.shape == (3, 2, 40, 23)


@pytest.mark.parametrize("label", [-1, 5, 254])
def test_a_label_that_is_no_class_is_named(label):
    logits, target = make_case((1, 2, 5, 3, 3), (9, 11))
    target[1, 4, 5] = label
    with pytest.raises(ValueError, match=rf"label {label} .*K=5.*ignore_index=255"):
        upsampled_cross_entropy(logits, target)


def test_what_does_not_fit_is_refused():
    logits, target = make_case((1, 2, 5, 3, 3), (9, 11))
    for bad_logits in (logits[0, 0], logits[:, :0], logits.long()):
        with pytest.raises(ValueError, match=r"expected logits f\[B, K, h, w\] or f\[P, B, K, h, w\], got"):
            upsampled_cross_entropy(bad_logits, target)
    for bad_target in (target[:1], target[0], target.float(), target[:, :0]):
        with pytest.raises(ValueError, match=r"expected an integer target \[B=2, H, W\]"):
            upsampled_cross_entropy(logits, bad_target)
    for options, message in (
        ({"label_stride": 0}, "label_stride=0"),
        ({"label_stride": 18}, r"label_stride=18 leaves no pixel of \[9, 11\]"),
        ({"reduction": "none"}, '"mean" or "sum", got \'none\''),
    ):
        with pytest.raises(ValueError, match=message):
            upsampled_cross_entropy(logits, target, **options)
