"""`make bench`: speed and memory as ratios, both sides measured in turn in one run, in CPU-seconds of one thread.

Prints a table and writes JSON: {"machine": ..., "ratios": [{"name", "ours_s", "other_s", "ratio": [min, median, max],
...}]}. A ratio over 1 says how many times as long (or as much memory) the other way takes. Single times depend on the
machine and its load; the ratios of paired runs hardly do.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

# of numpy: where other jobs run, its threads wait for one another
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch
from loss import bench_loss, print_peak_memory
from measure import last_line, ratios
from probe_solvers import bench_solver
from states import bench_states
from sweep import Sweep
from training_step import bench_training


def paired(
    ours: Callable[[], object], other: Callable[[], object], rounds: int, repeat: int = 1
) -> dict:
    """Times both in turn after one warm-up each, ours as the mean of `repeat` calls if it takes only milliseconds."""
    times = ([], [])
    for i in range(rounds + 1):
        for function, seconds, calls in zip((ours, other), times, (repeat, 1), strict=True):
            start = time.process_time()
            for _ in range(calls):
                function()
            if i > 0:
                seconds.append((time.process_time() - start) / calls)
    return ratios(*times)


def peak_memory_mb(step: str) -> float:
    """How much more memory a process holds at most for a step of loss.py; each in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory", step]
    # what is freed goes back to the system
    return float(last_line(command, MALLOC_MMAP_THRESHOLD_=65536))


def bench_sweep(rounds: int) -> dict:
    sweep = Sweep("small", images=8, mask_px=256)

    def one_by_one() -> None:
        for site in sweep.sites:
            sweep.step([site])

    name = f"{len(sweep.sites)} sites, one a pass over all in one pass"
    return {"name": name} | paired(sweep.step, one_by_one, max(2, rounds // 2))


def bench_frozen(rounds: int) -> dict:
    """A CLIP ViT-L/14@336 and an LLM of 1.1 B parameters, 576 image tokens, one image with a mask of 512 x 512."""
    sweep = Sweep("1b", images=1, mask_px=512)
    name = f"probing sweep over the frozen forward, {len(sweep.sites)} sites of a 1.1B LLM"
    return {"name": name} | paired(sweep.forward, sweep.step, max(2, rounds // 3))


BENCHES = {
    "loss": lambda args: bench_loss(paired, peak_memory_mb, args.rounds),
    "solver": lambda args: bench_solver(paired, max(2, args.rounds // 3)),
    "states": lambda args: [bench_states(max(2, args.rounds // 3))],
    "training": lambda args: bench_training(paired, max(2, args.rounds // 3)),
    "sweep": lambda args: [bench_sweep(args.rounds)],
    "frozen": lambda args: [bench_frozen(args.rounds)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rounds", type=int, default=7, help="paired runs of each")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--peak-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_memory:
        print_peak_memory(args.peak_memory)
        return
    machine = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(f"{machine}; one thread, median of {args.rounds} paired runs [min, max]\n")
    entries = []
    for name in args.only:
        for entry in BENCHES[name](args):
            low, median, high = entry["ratio"]
            print(f"{median:7.2f}x  [{low:.2f}, {high:.2f}]  {entry['name']}", flush=True)
            entries.append(entry)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "ratios": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
