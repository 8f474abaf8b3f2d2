"""Time, error and memory of the upsampled cross-entropy by number of nodes, beside F.interpolate + F.cross_entropy.

`bench.py --only loss` prints the table of probes/ops/README.md.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from memory import peak_mb
from torch import Tensor

from probes import prepare_masks, upsampled_cross_entropy

GRID = (24, 24)
NODES = (2, 3, 4, 5, 8)
CASES = {  # classes, images, (H, W)
    "ADE20K": (150, 2, (512, 683)),
    "Cityscapes": (19, 1, (1024, 2048)),
}
SMOOTH, ROUGH = (
    0.7,
    3.0,
)  # noise of the logits at each token; that of trained probes is below the first


def loss_inputs(case: str, noise: float = SMOOTH) -> tuple[Tensor, Tensor]:
    """Logits that follow the regions of the masks, with noise; stripes of ignored pixels cut cells of the grid."""
    classes, images, (height, width) = CASES[case]
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(images, classes, 6, 8, generator=generator)
    target = F.interpolate(fields, size=(height, width), mode="bilinear").argmax(1)
    target[:, : height // 12] = target[:, :, width // 3 : width // 3 + width // 20] = 255
    logits = 2 * F.interpolate(fields, size=GRID, mode="bilinear")
    logits += noise * torch.randn(logits.shape, generator=generator)
    return logits.requires_grad_(), target.to(torch.uint8)


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    up = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(up, target.long(), ignore_index=255)


def with_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def one_step(case: str, ours: bool) -> Callable[[], None]:
    """Return a loss and its gradient, ours with masks that are prepared: they are the same at each step."""
    return _step(*loss_inputs(case), ours)


def _step(logits: Tensor, target: Tensor, ours: bool) -> Callable[[], None]:
    masks = prepare_masks(target, logits.shape[1], tuple(logits.shape[2:])) if ours else target
    loss = upsampled_cross_entropy if ours else torch_loss
    return lambda: with_gradient(lambda z: loss(z, masks), logits)


def bench_loss(paired: Callable, memory: Callable[[str], float], rounds: int) -> list[dict]:
    """Print the table of each case; return its ratios of time by number of nodes, and those of memory."""
    entries = []
    for case, (classes, images, size) in CASES.items():
        print(
            f"{case}: {classes} classes, {images} masks of {size[0]} x {size[1]}, {GRID[0]} x {GRID[1]} tokens"
        )
        print(
            "  nodes   loss and gradient   ratio   error (rough logits)   of the gradient   once a mask"
        )
        logits, target = loss_inputs(case)
        peak = memory(f"{case}:theirs"), memory(f"{case}:ours")
        for nodes in NODES:
            masks = prepare_masks(target, classes, GRID, nodes)
            timed = paired(
                partial(with_gradient, partial(upsampled_cross_entropy, target=masks), logits),
                partial(with_gradient, partial(torch_loss, target=target), logits),
                rounds,
                repeat=20,
            )
            timed["once_a_mask_s"] = (
                median_seconds(partial(prepare_masks, target, classes, GRID, nodes)) / images
            )
            timed["errors"] = [errors(case, nodes, noise) for noise in (SMOOTH, ROUGH)]
            (smooth, gradient), (rough, rough_gradient) = timed["errors"]
            print(
                f"  {nodes:5d}   {1e3 * timed['ours_s']:9.2f} ms      {timed['ratio'][1]:5.0f}x   "
                f"{smooth:.0e} ({rough:.0e})        {gradient:.0e} ({rough_gradient:.0e})   "
                f"{1e3 * timed['once_a_mask_s']:6.1f} ms",
                flush=True,
            )
            entries.append(
                {"name": f"cross-entropy, torch's over ours, {case}, {nodes} nodes, time"} | timed
            )
        print(f"  F.interpolate + F.cross_entropy {1e3 * timed['other_s']:.0f} ms\n")
        entries.append(
            {
                "name": f"cross-entropy, torch's over ours, {case}, 3 nodes, peak memory",
                "other_mb": peak[0],
                "ours_mb": peak[1],
                "ratio": [peak[0] / peak[1]] * 3,
            }
        )
    return entries


def errors(case: str, nodes: int, noise: float) -> tuple[float, float]:
    """Return the error of the loss in nats, and that of the gradient over its norm, against torch in float64."""
    logits, target = loss_inputs(case, noise)
    exact, gradient = with_gradient(
        lambda z: torch_loss(z, target), logits.detach().double().requires_grad_()
    )
    masks = prepare_masks(target, logits.shape[1], GRID, nodes)
    value, ours = with_gradient(lambda z: upsampled_cross_entropy(z, masks), logits)
    return (value - exact).abs().item(), ((ours - gradient).norm() / gradient.norm()).item()


def median_seconds(function: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def print_peak_memory(name: str) -> None:
    """Print how much more memory, in MB, this process holds at most for the second of two steps."""
    case, _, side = name.partition(":")
    step = one_step(case, side == "ours")
    logits, target = loss_inputs(case)
    small = logits[:, :, :2, :2].detach().requires_grad_(), target[:, :8, :8]
    _step(*small, side == "ours")()  # what the first call allocates for good
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would hide the peak
    print(peak_mb(step))
