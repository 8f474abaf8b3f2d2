"""CPU-seconds of `probes.solve_features` in another checkout and in this one, side by side.

    python tests/bench/extract_states.py DINOV2S CAMVID STATES.pt
    git worktree add --detach OTHER ecb9df1b
    python tests/bench/solver.py STATES.pt --other OTHER [--cases camvid46 camvid184 ...] [--rounds 3]

Each solve is a process of one thread; imports, and loading compiled code, are not counted. Checkouts take turns.
Medians are printed, and strength, certificate and mIoU of both. Cases are the states of STATES.pt, of every fourth
photo or of all, with

- its own 11 classes,
- 44: each class split by the quarter of the photo where a pixel is,
- 150: each class split by which of 14 groups of photos with similar mean states a photo belongs to, so that a mask has
  about ten classes;

and `wide`, Gaussian states of 4,096 channels and 150 classes (`synthetic_states.py`).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from measure import last_line

CASES = {
    "camvid46": (4, "own"),
    "camvid184": (1, "own"),
    "quarters46": (4, "quarters"),
    "groups46": (4, "groups"),
    "quarters184": (1, "quarters"),
    "groups184": (1, "groups"),
}
GROUPS = 14
GROUP_CLASSES = 150
HERE = Path(__file__).resolve().parents[2]


def split_by_quarter(masks: list) -> list:
    """Return masks uint8[H, W] whose classes are 4 x class + the quarter of the photo."""
    import torch

    found = []
    for mask in masks:
        rows, columns = (torch.arange(size) * 2 // size for size in mask.shape)
        quarter = 2 * rows[:, None] + columns
        found.append(torch.where(mask == 255, mask, 4 * mask + quarter).byte())
    return found


def split_by_group(masks: list, group_of: list[int]) -> list:
    """Return masks uint8[H, W] whose classes are 14 x class + the group of the photo; those above 149 are ignored."""
    import torch

    found = []
    for mask, group in zip(masks, group_of, strict=True):
        classes = GROUPS * mask.long() + group
        is_ignored = (mask == 255) | (classes >= GROUP_CLASSES)
        found.append(torch.where(is_ignored, 255, classes).byte())
    return found


def groups_of(training, others) -> list[list[int]]:
    """Return the groups of training photos and of others, by the first principal component of mean states."""
    import torch

    means = training.mean(1)
    centre = means.mean(0)
    axis = torch.linalg.svd(means - centre, full_matrices=False).Vh[0]
    along = (means - centre) @ axis
    at = torch.arange(1, GROUPS) / GROUPS
    edges = along.quantile(at)
    return [
        torch.bucketize((states.mean(1) - centre) @ axis, edges).tolist()
        for states in (training, others)
    ]


def read_case(name: str, states: str):
    """Return training and validation, (f[N, T, d], N masks uint8[H, W]) each, and the number of classes."""
    import torch

    if name == "wide":
        return read_wide()
    every, labels = CASES[name]
    data = torch.load(states)
    features, masks = data["training"]
    training = features[::every], masks[::every]
    validation = data["validation"]
    if labels == "own":
        return training, validation, data["classes"]
    if labels == "quarters":
        splits = [(x, split_by_quarter(own)) for x, own in (training, validation)]
        return *splits, 4 * data["classes"]
    groups = groups_of(training[0], validation[0])
    splits = [
        (x, split_by_group(own, group))
        for (x, own), group in zip((training, validation), groups, strict=True)
    ]
    return *splits, GROUP_CLASSES


def read_wide():
    """Return 184 images of Gaussian states to train on, and 32 others."""
    import torch

    sys.path.insert(0, str(HERE / "tests" / "bench"))
    from synthetic_states import Synthetic

    images = Synthetic(216, 16, 4096, 150, 1.0, 0.1)
    parts = [(states, targets) for _, states, _, targets in images.batches()]
    states = torch.cat([part[0] for part in parts])
    targets = sum((part[1] for part in parts), [])
    return (states[:184], targets[:184]), (states[184:], targets[184:]), 150


def mean_iou(probe, states, masks: list, classes: int) -> float:
    """Return the mIoU in percent over the classes that occur."""
    import torch

    both = torch.zeros(classes)
    either = torch.zeros(classes)
    side = round(states.shape[1] ** 0.5)
    for state, mask in zip(states, masks, strict=True):
        grid = state.unflatten(0, (side, side))[None]
        predicted = torch.as_tensor(probe.predict(grid, tuple(mask.shape)))[0].long()
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


def solve_case(name: str, states: str) -> None:
    """Solve a case with the checkout on PYTHONPATH, and print what it took and found as JSON."""
    import torch

    import probes

    solve = probes.solve_features
    torch.set_num_threads(1)
    (features, masks), (others, other_masks), classes = read_case(name, states)
    side = round(features.shape[1] ** 0.5)
    features = features.unflatten(1, (side, side)).contiguous()
    # what is imported, or read from numba's cache, when it is first needed
    solve(torch.randn(4, 4, 4, 8), [torch.arange(256).view(16, 16) % 2] * 4, 2, strength=0.1)
    before = time.process_time()
    probe = solve(features, masks, classes)
    spent = time.process_time() - before
    score = mean_iou(probe, others, other_masks, classes)
    print(
        json.dumps(
            {
                "cpu_s": spent,
                "strength": probe.strength,
                "converged": probe.converged,
                "loss": probe.loss,
                "miou": score,
            }
        )
    )


def run_case(name: str, states: str, checkout: Path) -> dict:
    """Return what :func:`solve_case` prints in a process with a checkout."""
    command = [sys.executable, __file__, states, "--solve", name]
    return json.loads(last_line(command, PYTHONPATH=checkout, OMP_NUM_THREADS=1))


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("states")
    parser.add_argument("--other", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "wide"], default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        solve_case(args.solve, args.states)
        return
    print("case | other, CPU-s | this one | ratio | strength | converged | mIoU", flush=True)
    for name in args.cases:
        found = {checkout: [] for checkout in (args.other, HERE)}
        for _ in range(args.rounds):
            for checkout, results in found.items():
                results.append(run_case(name, args.states, checkout))
        other, here = found.values()
        seconds = [statistics.median(x["cpu_s"] for x in results) for results in (other, here)]
        values = [
            " -> ".join(f"{results[0][key]:.6g}" for results in (other, here))
            for key in ("strength", "converged", "miou")
        ]
        print(
            " | ".join(
                [name, *(f"{x:.2f}" for x in seconds), f"{seconds[1] / seconds[0]:.3f}", *values]
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
