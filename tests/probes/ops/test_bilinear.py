"""Resampling weights, chunk plans and argmax, against `F.interpolate`."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.ops import bilinear
from probes.ops.bilinear import bilinear_weights, make_plan, upsampled_argmax

pytestmark = pytest.mark.numerics

SIZE = st.integers(1, 40)


def interpolate(logits, size):
    """F.interpolate for any leading axes."""
    up = F.interpolate(logits.flatten(0, -4), size, mode="bilinear")
    return up.unflatten(0, logits.shape[:-3])


@settings(deadline=None, derandomize=True)
@given(SIZE, SIZE)
def test_weights_equal_interpolate_at_any_ratio(n_in, n_out):
    identity = torch.eye(n_in, dtype=torch.float64)[:, None, :, None]  # one basis vector an image
    expected = interpolate(identity, (n_out, 1))[:, 0, :, 0].T
    weights = bilinear_weights(n_in, n_out, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-13)
    ones = torch.ones(n_out, dtype=torch.float64)
    torch.testing.assert_close(weights.sum(1), ones, rtol=0, atol=1e-15)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 3)]),
    classes=st.sampled_from([1, 2, 5, 17]),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size=st.tuples(SIZE, SIZE),
    numel=st.sampled_from([1, 700, 2**19]),
    seed=st.integers(0, 1000),
)
def test_argmax_equals_torch_but_for_ties(leading, classes, grid, size, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn((*leading, classes, *grid), generator=generator)
    make_plan.cache_clear()
    with mock.patch.dict(bilinear.CHUNK_NUMEL, cpu=numel):
        predicted = upsampled_argmax(logits, size)
    make_plan.cache_clear()
    up = interpolate(logits[None], size)[0]
    assert predicted.dtype == torch.uint8
    assert predicted.shape == (*leading, *size)
    chosen = up.gather(-3, predicted.long().unsqueeze(-3)).squeeze(-3)
    # elsewhere than at a tie a wrong class is visibly worse
    assert (up.amax(-3) - chosen).max() < 1e-5
    clear = up.topk(min(2, classes), -3).values.diff(dim=-3).abs().squeeze(-3) > 1e-5
    if classes > 1:
        assert torch.equal(predicted[clear].long(), up.argmax(-3)[clear])


@pytest.mark.parametrize(
    ("classes", "dtype"), [(255, torch.uint8), (256, torch.int16), (300, torch.int16)]
)
def test_argmax_reaches_the_last_class(classes, dtype):
    """And where two classes tie, the first."""
    logits = torch.zeros(classes, 2, 4)
    logits[-1] = 1
    logits[1:, :, 2:] = 1
    predicted = upsampled_argmax(logits, (6, 12))
    assert predicted.dtype == dtype
    assert (predicted[:, :4] == classes - 1).all()
    assert (predicted[:, -4:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_argmax_is_not_rounded_to_the_dtype_of_the_logits(dtype):
    logits = torch.randn((5, 4, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = upsampled_argmax(logits, (33, 21))
    assert torch.equal(predicted.long(), interpolate(logits.double()[None], (33, 21))[0].argmax(0))


def test_argmax_of_no_images_is_empty():
    assert upsampled_argmax(torch.zeros((0, 4, 3, 3)), (8, 9)).shape == (0, 8, 9)
