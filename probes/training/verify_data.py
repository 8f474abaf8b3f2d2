"""The command `probes verify-data`: the checks of `fit` before it loads a model, on a machine without GPUs."""

import time

from llava_bidir.common.loader_workers import usable_cores
from llava_bidir.common.usage_errors import ArgumentParser, natural

from .cli import build_cli

TRAINER = {"accelerator": "cpu", "devices": "1", "num_nodes": "1", "strategy": "auto", "precision": "32-true"}


def main(argv: list[str]) -> None:
    """Read every image and target of a probing config.

    Raises:
        UserError: If some cannot be used, or no pixel of a split is labelled; the message names them.
    """
    parser = ArgumentParser(
        prog="probes verify-data",
        description="Read every image and target of both splits; exit with status 1 if any cannot be used. All other "
        "options are those of `probes fit` (-c CONFIG ..., --data.root ..., ...); the model is not needed.",
    )
    parser.add_argument("--workers", type=natural, default=usable_cores(), help="number of processes")
    args, config = parser.parse_known_args(argv[1:])
    trainer = [f"--trainer.{key}={value}" for key, value in TRAINER.items()]
    data = build_cli(["--model.mllm", "none", *config, *trainer], run=False, prog=parser.prog).datamodule
    start = time.perf_counter()
    data.check_files(data.find_bad_files(args.workers))
    sizes = ", ".join(f"{len(dataset):,} {split} images" for split, dataset in data.splits.items())
    targets = f"{data.num_classes} classes" if data.classes else data.task
    print(f"{data.root}: {sizes}, {targets}, all readable ({time.perf_counter() - start:.0f} s)")
