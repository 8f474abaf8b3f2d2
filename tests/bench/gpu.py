"""A probing sweep at LLaVA-1.5-7B's shape on one GPU: `python tests/bench/gpu.py` (random weights, bfloat16, < 8 min).

Prints, and writes as JSON: images a second of the frozen forward alone, of a training step of the probes at all sites
and of a validation step, each with its peak memory, our way and the naive one (F.interpolate, then cross_entropy or
argmax, site by site); the hours that the paper's ADE20K protocol then takes (20 epochs, App. A.2); and the loss alone,
ours by number of nodes and the naive way, with the largest deviation of the gradient from float64.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loss import torch_loss, with_gradient
from sweep import CLASSES, SHAPES, Sweep

from probes import prepare_masks, upsampled_cross_entropy

# App. A.2; ADE20K's images
EPOCHS = 20
TRAINING = 20_210
VALIDATION = 2_000


def measured(function: Callable[[], object], rounds: int, device: str) -> dict[str, float | None]:
    """Median seconds of some calls after one to warm up, and the memory at its peak in GB, on a GPU."""
    gpu = device == "cuda"
    function()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
    }


def hours(training: dict, validation: dict, images: int) -> float:
    """Of the ADE20K protocol, at so many images a step."""
    seconds = TRAINING * training["seconds"] + VALIDATION * validation["seconds"]
    return EPOCHS * seconds / images / 3600


def bench_sweep(args: argparse.Namespace) -> dict:
    sweep = Sweep(args.shape, args.images, args.mask_px, torch.bfloat16, args.device)
    steps = {
        "frozen forward": sweep.forward,
        "training step": sweep.step,
        "training step, naive": sweep.naive_step,
        "solver step": sweep.add_gradients,
        "validation step": sweep.score,
        "validation step, naive": sweep.naive_score,
    }
    results = {}
    for name, step in steps.items():
        result = measured(step, args.rounds, args.device)
        result["images_s"] = args.images / result["seconds"]
        memory = ""
        if result["peak_gb"] is not None:
            memory = f"   {result['peak_gb']:6.1f} GB"
        print(f"{result['images_s']:9.2f} images/s{memory}   {name}", flush=True)
        results[name] = result
    for way in ("", ", naive"):
        steps = results[f"training step{way}"], results[f"validation step{way}"]
        results[f"hours{way}"] = hours(*steps, args.images)
    solved = hours(results["solver step"], results["validation step"], args.images)
    results["hours, solved"] = solved / EPOCHS
    took = f"{results['hours']:.1f} h, naive {results['hours, naive']:.1f} h"
    took += f"; one pass of the solver {results['hours, solved']:.2f} h"
    print(f"ADE20K, {EPOCHS} epochs, {len(sweep.sites)} sites: {took}")
    return results


def bench_loss(args: argparse.Namespace) -> dict:
    """The loss of one probe and its gradient."""
    torch.manual_seed(0)
    size = (args.images, args.mask_px, args.mask_px)
    with torch.device(args.device):
        logits = torch.randn(args.images, CLASSES, 24, 24, requires_grad=True)
        target = torch.randint(CLASSES, size, dtype=torch.uint8)

    def ours(z: torch.Tensor, nodes: int = 3) -> torch.Tensor:
        masks = target
        if z.dtype == torch.float32:
            masks = prepared[nodes]
        return with_gradient(partial(upsampled_cross_entropy, target=masks, nodes=None), z)[1]

    naive = partial(with_gradient, partial(torch_loss, target=target), logits)
    prepared = {nodes: prepare_masks(target, CLASSES, (24, 24), nodes) for nodes in (3, 8)}
    ways = {f"{nodes} nodes": partial(ours, logits, nodes) for nodes in prepared} | {"naive": naive}
    results = {}
    for name, function in ways.items():
        results[name] = measured(function, args.rounds, args.device)
        print(f"{1e3 * results[name]['seconds']:9.2f} ms   loss and gradient, {name}", flush=True)
    exact = ours(logits.detach().double().requires_grad_())
    results["gradient_error"] = ((ours(logits, 8) - exact).abs().max() / exact.abs().max()).item()
    print(f"{results['gradient_error']:9.1e}   largest error of it over the largest entry; 8 nodes")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--images", type=int, default=16, help="a step")
    parser.add_argument("--mask-px", type=int, default=512, help="height and width of masks")
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # as `probes fit`
    name = "CPU"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, shape {args.shape}, {args.images} images a step\n")
    results = {
        "device": name,
        "torch": torch.__version__,
        "loss": bench_loss(args),
        "sweep": bench_sweep(args),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
