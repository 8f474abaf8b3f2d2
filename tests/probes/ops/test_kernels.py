"""The Triton kernels against torch and the chunked forms: compiled where there is a GPU, else in its interpreter."""

import json
import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import HANGING_S

from probes.evaluation import metrics
from probes.evaluation.metrics import count
from probes.ops import bilinear, cross_entropy, kernels
from probes.ops.bilinear import upsampled_argmax
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.geometry import Geometry, GridPlacement

pytest.importorskip("triton", reason="triton is not installed (it is made for Linux alone)")

pytestmark = pytest.mark.numerics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def through_triton():
    """Everything goes to the kernels, save what is in float64: that is the reference."""
    choose = lambda logits: logits.dtype != torch.float64
    with pytest.MonkeyPatch.context() as patch:
        for module in (cross_entropy, bilinear, metrics):
            patch.setattr(module, "use_triton", choose)
        yield


def make_case(*shape_and_size, **settings):
    """Logits f64[P, B, K, h, w] that float32 holds exactly, and labels uint8[B, H, W]."""
    logits, target = reference.make_case(*shape_and_size, **settings, dtype=torch.float32)
    return logits.double().to(DEVICE), target.to(DEVICE, torch.uint8)


def value_and_gradient(function, logits, weights):
    """In float64, to compare kinds of numbers."""
    return tuple(x.double() for x in reference.value_and_gradient(function, logits, weights.to(DEVICE)))


def assert_same_loss(logits, target, *, scale=3.0, dtype=torch.float32, **options):
    """Value and gradient through the kernel equal those of the chunked form in float64."""
    weights = torch.linspace(-1, 2, len(logits), device=logits.device)
    function = lambda z: upsampled_cross_entropy(z, target, **options)
    expected, expected_gradient = value_and_gradient(function, logits, weights)
    found, gradient = value_and_gradient(function, logits.to(dtype), weights)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6 * scale)
    largest = expected_gradient.abs().max().item() + 0.01 * weights.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=7e-6 * largest * scale)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 2, 6, 4, 4))),
    size=st.tuples(st.integers(2, 9), st.integers(2, 12)),
    scale=st.sampled_from([3.0, 300.0]),
    stride=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_equal_the_chunked_form(shape, size, scale, stride, seed):
    logits, target = make_case(shape, size, scale=scale, seed=seed)
    target[:, stride // 2, stride // 2] = 0  # a valid pixel that every stride takes
    assert_same_loss(logits, target, scale=scale, label_stride=stride)


@pytest.mark.parametrize("classes", [1, pytest.param(16, marks=pytest.mark.slow), 150, 255])
def test_any_number_of_classes(classes):
    logits, target = make_case((2, 1, classes, 1, 2), (3, 9))
    assert_same_loss(logits, target)
    assert_same_counts(logits, target)


VIEWS = [
    (Geometry((2, 3), 56, 56, "pad").view((9, 6)), (9, 6)),
    (Geometry((2, 3), 56, 56, "pad").view((5, 9)), (5, 9)),
    (Geometry((2, 3), 64, 40).view((7, 8)), (7, 8)),
    (Geometry((2, 3), 64, 50, "pad").view((8, 5)), (8, 5)),
    (Geometry((2, 3), 56, 56, "center_crop").view((5, 9)), (5, 9)),
    (Geometry((2, 3), 56, 56).view((1, 2)), (1, 2)),
]


@pytest.mark.parametrize(
    ("view", "size"), [VIEWS[0], *(pytest.param(*view, marks=pytest.mark.slow) for view in VIEWS[1:])]
)
def test_grids_that_do_not_lie_flush_with_the_mask(view, size):
    logits, target = make_case((1, 2, 4, 2, 3), size)
    assert_same_loss(logits, target, view=view)
    assert_same_counts(logits, target, view)


def test_logits_as_a_linear_layer_gives_them_and_bfloat16():
    logits, target = make_case((2, 2, 5, 2, 2), (5, 6))
    logits = logits.bfloat16().double()
    classes_last = logits.movedim(2, -1).contiguous().movedim(-1, 2)
    assert_same_loss(classes_last, target)
    assert_same_counts(classes_last, target)
    expected = upsampled_cross_entropy(logits, target).float()
    torch.testing.assert_close(upsampled_cross_entropy(logits.bfloat16(), target), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ignore_index", [0, 3, -100])
def test_ignore_index_may_be_a_class_or_negative(ignore_index):
    logits, target = make_case((1, 2, 5, 3, 3), (9, 11), ignored=0)
    target = target.long()
    target[:, :4] = ignore_index
    assert_same_loss(logits, target, ignore_index=ignore_index)


def test_ignored_images_and_batches_give_zero_and_no_gradient():
    logits, target = make_case((2, 2, 5, 2, 2), (4, 5))
    target[0] = 255
    function = lambda z: upsampled_cross_entropy(z, target)
    _, gradient = value_and_gradient(function, logits.float(), torch.ones(2))
    assert not gradient[:, 0].any() and gradient[:, 1].any()
    target[1] = 255
    losses, gradient = value_and_gradient(function, logits.float(), torch.ones(2))
    assert losses.tolist() == [0, 0] and not gradient.any()


def test_a_label_that_is_no_class_makes_the_loss_nan():
    logits, target = make_case((1, 2, 5, 2, 2), (5, 6), ignored=0)
    from probes.ops.kernels.cross_entropy import cross_entropy_sum
    from probes.ops.kernels.grid_cells import cells

    axes = cells((2, 2), (5, 6), GridPlacement.full((5, 6)), 1, torch.device(DEVICE))
    assert cross_entropy_sum(logits.float(), target, *axes, 255, False)[0].isfinite().all()
    target[1, 4, 5] = 5
    assert cross_entropy_sum(logits.float(), target, *axes, 255, False)[0].isnan().all()


@pytest.mark.slow
def test_small_losses_keep_their_digits():
    logits, target = make_case((1, 1, 6, 2, 2), (12, 12), ignored=0, scale=60.0)
    target[:] = upsampled_argmax(logits[0], (12, 12))
    expected = upsampled_cross_entropy(logits, target)
    found = upsampled_cross_entropy(logits.float() + 100, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def assert_same_counts(logits, target, view=None):
    """Every integer is that of the chunked form in float64, and so is the map."""
    found, expected = (count(z, target, view, confusion=True) for z in (logits.float(), logits))
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    maps = [upsampled_argmax(z, target.shape[1:], view) for z in (logits.float(), logits)]
    assert maps[0].dtype == maps[1].dtype == torch.uint8 and torch.equal(*maps)


@pytest.mark.slow
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 2, 6, 4, 4))),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_counts_equal_the_chunked_form(shape, size, seed):
    assert_same_counts(*make_case(shape, size, seed=seed))


def test_confusion_is_counted_only_where_asked_for():
    assert count(*make_case((1, 1, 3, 2, 2), (4, 4)), confusion=False).confusion is None


def test_argmax_of_a_tie_is_the_first_class():
    logits = torch.zeros(4, 2, 2, device=DEVICE)
    logits[1:3] = 1
    assert (upsampled_argmax(logits, (6, 6)) == 1).all()


def test_kernels_are_for_gpus_float32_and_as_many_classes_as_labels_can_name():
    logits = lambda **kind: types.SimpleNamespace(
        **({"is_cuda": True, "dtype": torch.float32, "shape": (5, 3, 3)} | kind)
    )
    assert kernels.use_triton(logits()) and kernels.use_triton(logits(dtype=torch.bfloat16, shape=(2, 255, 3, 3)))
    for kind in ({"is_cuda": False}, {"dtype": torch.float64}, {"shape": (256, 3, 3)}):
        assert not kernels.use_triton(logits(**kind))


def test_without_triton_a_gpu_gets_the_chunked_form_and_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._installed.cache_clear()
    logits = types.SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(5, 3, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not kernels.use_triton(logits) and not kernels.use_triton(logits)
    kernels._installed.cache_clear()
    assert len(caught) == 1 and "triton is not installed" in str(caught[0].message)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here():
    """What the interpreter runs need not compile. For H100 and H200, K = 150: no register may spill."""
    command = [sys.executable, Path(__file__).parent / "compile_kernels.py"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert set(found) == {"cross_entropy_cell", "count_cell", "argmax_cell"}
    assert all(kernel["spilled_bytes"] == 0 and kernel["registers"] > 0 for kernel in found.values())


@pytest.mark.gpu
def test_real_size_on_the_gpu_equals_float64_repeats_bit_by_bit_and_is_fast():
    logits, target = make_case((4, 2, 150, 24, 24), (512, 683))
    assert_same_loss(logits, target)
    logits = logits.float().requires_grad_()
    runs = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad(upsampled_cross_entropy(logits, target).sum(), logits)
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - start, gradient, count(logits, target, confusion=True)))
    print(f"loss and gradient of 8 grids, K = 150, 512 x 683: {1e3 * runs[-1][0]:.2f} ms")
    assert torch.equal(runs[1][1], runs[2][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[1][2], runs[2][2], strict=True))
    assert runs[-1][0] < 0.1


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    logits, target = make_case((2, 2, 5, 3, 3), (9, 11))
    logits = logits.float().requires_grad_()
    upsampled_cross_entropy(logits, target).sum().backward()  # compiles, and fills the caches of tables
    count(logits, target, confusion=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        upsampled_cross_entropy(logits, target).sum().backward()
        count(logits, target, confusion=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
