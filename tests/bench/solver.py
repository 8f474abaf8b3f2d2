"""CPU-seconds and memory of `probes.solve_features` in another checkout and in this one, side by side.

    python tests/bench/extract_states.py DINOV2S CAMVID STATES.pt
    git worktree add --detach OTHER bab5bafd
    python tests/bench/solver.py STATES.pt --other OTHER [--cases camvid46 camvid184 ...] [--rounds 3]

Each solve is a process of one thread; imports, and loading compiled code, are not counted. Checkouts take turns.
Medians are printed, and strength, certificate, loss and mIoU of both. Cases are the states of STATES.pt, of every
fourth photo or of all, with

- its own 11 classes,
- 44: each class split by the quarter of the photo where a pixel is,
- 150: each class split by which of 14 groups of photos with similar mean states a photo belongs to, so that a mask has
  about ten classes;

and `wide`, 40 images of Gaussian states of 4,096 channels and 150 classes.
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
from synthetic_states import synthetic_states
from torch import Tensor

import probes

CASES = {
    "camvid46": (4, "own"),
    "camvid184": (1, "own"),
    "quarters46": (4, "quarters"),
    "groups46": (4, "groups"),
}
GROUPS = 14
GROUP_CLASSES = 150
WIDE = 40
HERE = Path(__file__).resolve().parents[2]
Photos = tuple[Tensor, list[Tensor]]  # states f[N, T, d], and N masks uint8[H, W]


def split_by_quarter(mask: Tensor) -> Tensor:
    """Return a mask uint8[H, W] whose classes are 4 x class + the quarter of the photo."""
    rows, columns = (torch.arange(size) * 2 // size for size in mask.shape)
    quarter = 2 * rows[:, None] + columns
    return torch.where(mask == 255, mask, 4 * mask + quarter).byte()


def split_by_group(mask: Tensor, group: int) -> Tensor:
    """Return a mask uint8[H, W] whose classes are 14 x class + the group of the photo; those above 149 are ignored."""
    classes = GROUPS * mask.long() + group
    is_ignored = (mask == 255) | (classes >= GROUP_CLASSES)
    return torch.where(is_ignored, 255, classes).byte()


def groups_of(training: Tensor, photos: Tensor) -> list[int]:
    """Return the groups of photos f[N, T, d], by the first principal component of the training photos' mean states."""
    means = training.mean(1)
    centre = means.mean(0)
    axis = torch.linalg.svd(means - centre, full_matrices=False).Vh[0]
    edges = ((means - centre) @ axis).quantile(torch.arange(1, GROUPS) / GROUPS)
    return torch.bucketize((photos.mean(1) - centre) @ axis, edges).tolist()


def read_case(name: str, file: str) -> tuple[Photos, Photos, int]:
    """Return photos to train on, others, and the number of classes."""
    if name == "wide":
        states, masks = synthetic_states(WIDE + 8, 16, 4096, GROUP_CLASSES)
        training, others = (
            (states[part], masks[part]) for part in (slice(WIDE), slice(WIDE, None))
        )
        return training, others, GROUP_CLASSES
    every, labels = CASES[name]
    data = torch.load(file)
    splits = [tuple(x[::every] for x in data["training"]), data["validation"]]
    if labels == "quarters":
        splits = [(states, [*map(split_by_quarter, masks)]) for states, masks in splits]
        return *splits, 4 * data["classes"]
    if labels == "groups":
        first = splits[0][0]
        splits = [
            (states, [*map(split_by_group, masks, groups_of(first, states))])
            for states, masks in splits
        ]
        return *splits, GROUP_CLASSES
    return *splits, data["classes"]


def mean_iou(probe, states: Tensor, masks: list[Tensor], classes: int) -> float:
    """Return the mIoU in percent over the classes that occur; states are f[N, h, w, d]."""
    both = torch.zeros(classes)
    either = torch.zeros(classes)
    for state, mask in zip(states, masks, strict=True):
        predicted = torch.as_tensor(probe.predict(state[None], tuple(mask.shape)))[0].long()
        target = mask.long()
        labelled = target != 255
        right = labelled & (predicted == target)
        counts = [
            x.bincount(minlength=classes)
            for x in (target[right], target[labelled], predicted[labelled])
        ]
        both += counts[0]
        either += counts[1] + counts[2] - counts[0]
    return 100 * (both / either)[either > 0].mean().item()


def solve_case(name: str, file: str, strength: float | None) -> None:
    """Solve a case with the checkout on PYTHONPATH, and print what it took and found as JSON."""
    torch.set_num_threads(1)
    training, others, classes = read_case(name, file)
    side = round(training[0].shape[1] ** 0.5)
    (features, masks), (others, other_masks) = (
        (states.unflatten(1, (side, side)).contiguous(), of) for states, of in (training, others)
    )
    del training
    solve = probes.solve_features
    # what is imported, or read from numba's cache, when it is first needed
    solve(torch.randn(4, 4, 4, 8), [torch.arange(256).view(16, 16) % 2] * 4, 2, strength=0.1)
    forget_peak()
    held = memory_mb("VmRSS")
    before = time.process_time()
    probe = solve(features, masks, classes, strength)
    found = {
        "cpu_s": time.process_time() - before,
        "peak_mb": memory_mb("VmHWM") - held,
        "strength": probe.strength,
        "converged": probe.converged,
        "loss": probe.loss,
        "miou": mean_iou(probe, others, other_masks, classes),
    }
    print(json.dumps(found))


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("states")
    parser.add_argument("--other", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "wide"], default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strength", type=float, help="one that is given instead of searched")
    parser.add_argument("--solve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        solve_case(args.solve, args.states, args.strength)
        return
    print("case | CPU-s, other | this | ratio | peak MB | strength | converged | loss | mIoU")
    given = [] if args.strength is None else ["--strength", args.strength]
    for name in args.cases:
        command = [sys.executable, __file__, args.states, "--solve", name, *given]
        found = {checkout: [] for checkout in (args.other, HERE)}
        for _ in range(args.rounds):
            for checkout, results in found.items():
                line = last_line(command, PYTHONPATH=checkout, OMP_NUM_THREADS=1)
                results.append(json.loads(line))
        seconds = [statistics.median(x["cpu_s"] for x in results) for results in found.values()]
        others = [
            " -> ".join(f"{results[0][key]:.6g}" for results in found.values())
            for key in ("peak_mb", "strength", "converged", "loss", "miou")
        ]
        row = [name, *(f"{x:.2f}" for x in seconds), f"{seconds[1] / seconds[0]:.3f}", *others]
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
