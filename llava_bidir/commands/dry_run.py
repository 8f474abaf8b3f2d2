"""`llava-bidir fit --dry-run`: print what a training costs, and whether it fits, without weights, images and GPU."""

import json
from argparse import ArgumentParser

from llava_bidir.command_options import DRY_RUN
from llava_bidir.common.cli import Positive, ShareAbove0
from llava_bidir.training.cli import build_data_cli
from llava_bidir.training.estimate import GB, TrainingCosts, estimate
from llava_bidir.training.step_memory import StepMemory, read_spread

A100_TFLOPS = 312.0  # in bfloat16, by NVIDIA's data sheet
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def main(argv: list[str]) -> None:
    """Run `llava-bidir fit --dry-run`."""
    parser = ArgumentParser(
        prog="llava-bidir fit --dry-run",
        description=__doc__.partition(": ")[2],
        epilog="All other options are those of `llava-bidir fit`.",
        allow_abbrev=False,
    )
    parser.add_argument(*DRY_RUN, action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--mfu", type=ShareAbove0, default=0.4, help="share of --throughput.peak_tflops"
    )
    parser.add_argument("--gpu_gb", type=Positive, default=80.0, help="memory of a GPU in GB")
    options, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    peak = cli.config.throughput.peak_tflops or A100_TFLOPS
    costs = estimate(
        cli.model,
        data=cli.datamodule,
        trainer=cli.trainer,
        spread=read_spread(cli.asked),
        tflops=options.mfu * peak,
    )
    if options.json:
        print(json.dumps(costs.as_json()))
    else:
        print(format_estimate(costs, options.gpu_gb))


def format_estimate(costs: TrainingCosts, gpu_gb: float) -> str:
    """Return a table for the terminal: what, how much, and of what."""
    rows = []
    for part in costs.parts:
        rows.append(
            (part.part, f"{part.parameters / 1e6:,.1f} M", f"parameters, {part.describe()}")
        )
    rows += [
        ("samples", f"{costs.samples:,}", f"of {costs.tokens / costs.samples:,.0f} tokens"),
        ("tokens", f"{costs.tokens / 1e6:,.1f} M", f"{costs.supervised / 1e6:,.1f} M supervised"),
        ("steps", f"{costs.steps:,}", f"of {costs.flops_per_step / 1e12:,.1f} TFLOP"),
        ("time", f"{costs.hours:,.2f} h", f"{costs.devices} GPUs at {costs.tflops:.0f} TFLOP/s"),
        ("GPU time", f"{costs.gpu_hours:,.1f} h", ""),
    ]
    for name in MEMORY_PARTS:
        rows.append((name, _gb(getattr(costs.memory, name)), ""))
    other = "with"
    if costs.checkpointing:
        other = "without"
    rows += [
        ("memory", _gb(costs.memory.total), f"of a GPU: {_fits(costs.memory, gpu_gb)}"),
        ("", _gb(costs.other_memory.total), f"{other} gradient checkpointing"),
    ]
    if costs.memory.host:
        rows.append(("host memory", _gb(costs.memory.host), "for each GPU"))
    rows.append(
        ("disk", _gb(costs.disk), f"two checkpoints of {_gb(costs.checkpoint)}, and an export")
    )
    if costs.missing_images:
        missing = f"of some that were looked up, e.g. {costs.missing_images[0]}"
        rows.append(("missing", f"{len(costs.missing_images):,} images", missing))
    return "\n".join(f"{name:<12}{value:>12}  {note}".rstrip() for name, value, note in rows)


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB"


def _fits(memory: StepMemory, gpu_gb: float) -> str:
    """Return whether the memory of a step is that of a GPU at most."""
    verb = "fits into"
    if memory.total > gpu_gb * GB:
        verb = "does not fit into"
    return f"{verb} {gpu_gb:g} GB"
