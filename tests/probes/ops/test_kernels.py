"""The Triton kernels of argmax and counts against the chunked forms: compiled on a GPU, else in its interpreter."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import HANGING_S

from probes.ops import bilinear, kernels, pixel_counts
from probes.ops.bilinear import upsampled_argmax
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.geometry import Geometry, ResizeRule
from probes.ops.pixel_counts import count
from probes.ops.quadrature import prepare_masks

pytest.importorskip("triton", reason="triton is not installed (it is made for Linux alone)")

pytestmark = pytest.mark.numerics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def through_triton():
    """Everything goes to the kernels, save what is in float64: that is the reference."""

    def choose(logits):
        return logits.dtype != torch.float64

    with pytest.MonkeyPatch.context() as patch:
        for module in (bilinear, pixel_counts):
            patch.setattr(module, "use_triton", choose)
        yield


def make_case(*shape_and_size, **settings):
    """Logits f64[P, B, K, h, w] that float32 holds exactly, and labels uint8[B, H, W]."""
    logits, target = reference.make_case(*shape_and_size, **settings, dtype=torch.float32)
    return logits.double().to(DEVICE), target.to(DEVICE, torch.uint8)


# number of classes, input side, its part that the tokens cover, how images become squares, size of the mask
PADDED = (4, 56, 56, "pad", (9, 6))
MANY = (255, 56, 56, "squash", (3, 4))
SLOW = [
    (150, 64, 40, "squash", (7, 8)),
    (4, 64, 50, "pad", (8, 5)),
    (1, 56, 56, "center_crop", (5, 9)),
    (1, 56, 56, "squash", (1, 2)),
]


@pytest.mark.parametrize(
    "case", [PADDED, MANY, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_any_number_of_classes_on_grids_that_do_not_lie_flush_with_the_mask(case):
    classes, image_px, covered_px, resize, size = case
    geometry = Geometry(
        grid=(2, 3), image_px=image_px, covered_px=covered_px, rule=ResizeRule(resize)
    )
    logits, target = make_case((1, 2, classes, 2, 3), size)
    assert_same_counts(logits, target, geometry.view(size))


def test_logits_as_a_linear_layer_gives_them_and_bfloat16():
    logits, target = make_case((2, 2, 5, 2, 2), (5, 6))
    logits = logits.bfloat16().double()
    classes_last = logits.movedim(2, -1).contiguous().movedim(-1, 2)
    assert_same_counts(classes_last, target)
    assert torch.equal(
        upsampled_argmax(logits[0].bfloat16(), (5, 6)), upsampled_argmax(logits[0], (5, 6))
    )


def assert_same_counts(logits, target, view=None):
    """Every integer is that of the chunked form in float64, and so is the map."""
    counts, expected = (count(z, target, view) for z in (logits.float(), logits))
    assert all(a.dtype == b.dtype for a, b in zip(counts, expected, strict=True))
    assert all(map(torch.equal, counts, expected))
    maps = [upsampled_argmax(z, target.shape[1:], view) for z in (logits.float(), logits)]
    assert maps[0].dtype == maps[1].dtype == torch.uint8
    assert torch.equal(*maps)


@pytest.mark.nightly
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 2, 6, 4, 4))),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_counts_equal_the_chunked_form(shape, size, seed):
    assert_same_counts(*make_case(shape, size, seed=seed))


def test_argmax_of_a_tie_is_the_first_class():
    logits = torch.zeros(4, 2, 2, device=DEVICE)
    logits[1:3] = 1
    assert (upsampled_argmax(logits, (6, 6)) == 1).all()


def on_gpu(shape=(5, 3, 3), dtype=torch.float32, is_cuda=True):
    """What is asked of logits before kernels are chosen."""
    return types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=shape)


def test_kernels_are_for_gpus_float32_and_as_many_classes_as_labels_can_name():
    assert kernels.use_triton(on_gpu())
    assert kernels.use_triton(on_gpu((2, 255, 3, 3), torch.bfloat16))
    assert not kernels.use_triton(on_gpu(is_cuda=False))
    assert not kernels.use_triton(on_gpu(dtype=torch.float64))
    assert not kernels.use_triton(on_gpu((256, 3, 3)))


def test_without_triton_a_gpu_gets_the_chunked_form_and_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._installed.cache_clear()
    with pytest.warns(UserWarning, match="triton is not installed") as caught:
        assert not kernels.use_triton(on_gpu())
        assert not kernels.use_triton(on_gpu())
    kernels._installed.cache_clear()
    assert len(caught) == 1


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here():
    """What the interpreter runs need not compile. For H100 and H200, K = 150: no register may spill."""
    command = [sys.executable, Path(__file__).parent / "compile_kernels.py"]
    compiling = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=os.environ | compiling, capture_output=True, text=True, timeout=HANGING_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"count_cell": 0, "argmax_cell": 0}


@pytest.mark.gpu
def test_real_size_on_the_gpu_equals_float64_repeats_bit_by_bit_and_is_fast():
    logits, target = make_case((4, 2, 150, 24, 24), (512, 683))
    masks = prepare_masks(target, 150, (24, 24))
    exact = prepare_masks(target, 150, (24, 24), dtype=torch.float64)
    expected = upsampled_cross_entropy(logits, exact)
    found = upsampled_cross_entropy(logits.float(), masks).double()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
    logits = logits.float().requires_grad_()
    runs = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad(upsampled_cross_entropy(logits, masks).sum(), logits)
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - start, gradient, count(logits, target)))
    print(f"loss and gradient of 8 grids, K = 150, 512 x 683: {1e3 * runs[-1][0]:.2f} ms")
    assert torch.equal(runs[1][1], runs[2][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[1][2], runs[2][2], strict=True))
    assert runs[-1][0] < 0.1


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    logits, target = make_case((2, 2, 5, 3, 3), (9, 11))
    logits = logits.float().requires_grad_()
    masks = prepare_masks(target, 5, (3, 3))
    upsampled_cross_entropy(
        logits, masks
    ).sum().backward()  # compiles, and fills the caches of tables
    count(logits, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        upsampled_cross_entropy(logits, masks).sum().backward()
        count(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
