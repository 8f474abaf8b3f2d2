"""CPU-seconds and memory of `probes.solve_features` in another checkout and in this one, side by side.

    python tests/bench/extract_states.py DINOV2S CAMVID STATES.pt
    git worktree add --detach OTHER bab5bafd
    python tests/bench/solver.py STATES.pt --other OTHER [--rounds 3]

Each solve is a process of one thread; imports, and loading compiled code, are not counted. Checkouts take turns.
Medians are printed, and strength, certificate, loss and mIoU of both. Cases are the states of every fourth photo of
STATES.pt with its own 11 classes, and with 44: each class split by the quarter of the photo where a pixel is.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import last_line
from memory import forget_peak, memory_mb
from torch import Tensor

import probes

EVERY = 4
CASES = ("own", "quarters")
FACTS = ("peak_mb", "strength", "converged", "loss", "miou")
HERE = Path(__file__).resolve().parents[2]


def split_by_quarter(mask: Tensor) -> Tensor:
    """Return a mask uint8[H, W] whose classes are 4 x class + the quarter of the photo."""
    rows, columns = (torch.arange(size) * 2 // size for size in mask.shape)
    quarter = 2 * rows[:, None] + columns
    return torch.where(mask == 255, mask, 4 * mask + quarter).byte()


def mean_iou(probe, states: Tensor, masks: list[Tensor], classes: int) -> float:
    """Return the mIoU in percent over the classes that occur; states are f[N, h, w, d]."""
    confusion = torch.zeros(classes * classes)
    for state, mask in zip(states, masks, strict=True):
        predicted = torch.as_tensor(probe.predict(state[None], tuple(mask.shape)))[0].long()
        pairs = (classes * mask.long() + predicted)[mask != 255]
        confusion += pairs.bincount(minlength=classes * classes)
    confusion = confusion.view(classes, classes)
    either = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (confusion.diagonal() / either)[either > 0].mean().item()


def solve_case(name: str, file: str) -> None:
    """Solve a case with the checkout on PYTHONPATH, and print what it took and found as JSON."""
    torch.set_num_threads(1)
    data = torch.load(file)
    training, training_masks = (x[::EVERY] for x in data["training"])
    others, other_masks = data["validation"]
    classes = data["classes"]
    if name == "quarters":
        classes *= 4
        training_masks, other_masks = (
            [*map(split_by_quarter, masks)] for masks in (training_masks, other_masks)
        )
    side = round(training.shape[1] ** 0.5)
    training, others = (x.unflatten(1, (side, side)).contiguous() for x in (training, others))
    # what is imported, or read from numba's cache, when it is first needed
    small = [torch.arange(256).view(16, 16) % 2] * 4
    probes.solve_features(torch.randn(4, 4, 4, 8), small, 2, strength=0.1)
    forget_peak()
    held = memory_mb("VmRSS")
    before = time.process_time()
    probe = probes.solve_features(training, training_masks, classes)
    found = {"cpu_s": time.process_time() - before, "peak_mb": memory_mb("VmHWM") - held}
    found |= {name: getattr(probe, name) for name in ("strength", "converged", "loss")}
    found["miou"] = mean_iou(probe, others, other_masks, classes)
    print(json.dumps(found))


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("states")
    parser.add_argument("--other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        solve_case(args.solve, args.states)
        return
    print("case | CPU-s, other | this | ratio |", " | ".join(FACTS))
    for name in CASES:
        command = [sys.executable, __file__, args.states, "--solve", name]
        found = {checkout: [] for checkout in (args.other, HERE)}
        for _ in range(args.rounds):
            for checkout, results in found.items():
                line = last_line(command, PYTHONPATH=checkout, OMP_NUM_THREADS=1)
                results.append(json.loads(line))
        other, ours = found.values()
        seconds = [statistics.median(x["cpu_s"] for x in results) for results in (other, ours)]
        facts = [f"{other[0][key]:.6g} -> {ours[0][key]:.6g}" for key in FACTS]
        row = [name, *(f"{x:.2f}" for x in seconds), f"{seconds[1] / seconds[0]:.3f}", *facts]
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
