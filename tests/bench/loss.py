"""Time, error and memory of the upsampled cross-entropy by number of nodes, beside F.interpolate + F.cross_entropy.

`bench.py --only loss` prints the table of probes/ops/README.md.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from memory import peak_mb
from torch import Tensor

from probes import prepare_masks, upsampled_cross_entropy

GRID = (24, 24)
NODES = (2, 3, 5)
CASES = {  # classes, images, (H, W)
    "ADE20K": (150, 2, (512, 683)),
    "Cityscapes": (19, 1, (1024, 2048)),
}
# noise of the logits at each token; that of trained probes is below the first
SMOOTH, ROUGH = 0.7, 3.0


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


def one_step(logits: Tensor, target: Tensor, ours: bool) -> Callable[[], object]:
    """Return a loss and its gradient, ours with masks that are prepared: they are the same at each step."""
    loss = partial(torch_loss, target=target)
    if ours:
        masks = prepare_masks(target, logits.shape[1], tuple(logits.shape[2:]))
        loss = partial(upsampled_cross_entropy, target=masks)
    return partial(with_gradient, loss, logits)


def bench_loss(paired: Callable, memory: Callable[[str], float], rounds: int) -> list[dict]:
    """Print the table of each case; return its ratios of time by number of nodes, and those of memory."""
    entries = []
    for case, (classes, images, size) in CASES.items():
        print(f"{case}: {classes} classes, {images} masks of {size}, {GRID} tokens")
        print("  nodes   loss and gradient   ratio   error (rough logits)   of the gradient")
        logits, target = loss_inputs(case)
        name = f"cross-entropy, torch's over ours, {case}"
        theirs = one_step(logits, target, ours=False)
        for nodes in NODES:
            masks = prepare_masks(target, classes, GRID, nodes)
            ours = partial(with_gradient, partial(upsampled_cross_entropy, target=masks), logits)
            timed = paired(ours, theirs, rounds, repeat=20)
            timed["errors"] = [errors(case, nodes, noise) for noise in (SMOOTH, ROUGH)]
            (smooth, gradient), (rough, rough_gradient) = timed["errors"]
            print(
                f"  {nodes:5d}   {1e3 * timed['ours_s']:9.2f} ms      {timed['ratio'][1]:5.0f}x   "
                f"{smooth:.0e} ({rough:.0e})        {gradient:.0e} ({rough_gradient:.0e})",
                flush=True,
            )
            entries.append({"name": f"{name}, {nodes} nodes, time"} | timed)
        print(f"  F.interpolate + F.cross_entropy {1e3 * timed['other_s']:.0f} ms\n")
        more = memory(f"{case}:theirs") / memory(f"{case}:ours")
        entries.append({"name": f"{name}, 3 nodes, peak memory", "ratio": [more] * 3})
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


def print_peak_memory(name: str) -> None:
    """Print how much more memory, in MB, this process holds at most for the second of two steps."""
    case, _, side = name.partition(":")
    logits, target = loss_inputs(case)
    step = one_step(logits, target, side == "ours")
    small = logits[:, :, :2, :2].detach().requires_grad_(), target[:, :8, :8]
    one_step(*small, side == "ours")()  # what the first call allocates for good
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would hide the peak
    print(peak_mb(step))
