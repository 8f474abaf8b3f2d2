"""The command `probes solve`: the options of `probes fit`, and those of the solver."""

import argparse
import shutil
import time

import torch
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.interrupt import interrupt_says_what_is_saved
from llava_bidir.common.lightning_cli import run_process
from llava_bidir.common.usage_errors import ArgumentParser
from probes.tasks import TASKS

from .cli import ProbeCLI, build_cli
from .least_squares_solver import LeastSquaresSolver
from .optimum_solver import OptimumSolver
from .solver import Solver

# options of `fit` that a solver has too; the others say how probes are trained
SHARED = (
    "mllm",
    "num_classes",
    "image_attention",
    "untrained",
    "match",
    "draw",
    "image_px",
    "image_resize",
    "dtype",
    "prefix",
)
SHARED += ("sites", "seed")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that `fit` does not have."""
    parser = ArgumentParser(
        prog="probes solve",
        description="Solve linear probes of all sites at the optimum of their loss, with the strength of "
        "regularisation that cross-validation chooses. Depth and normals are least squares. All other options are "
        "those of `probes fit` (-c CONFIG ..., --model.mllm, --data.root, --out, --overwrite, ...); those that say how "
        "probes are trained are ignored.",
        allow_abbrev=False,
    )
    text = "most passes over the training images; one is enough where the states of all images fit into memory"
    parser.add_argument("--passes", type=int, default=10, help=text)
    parser.add_argument(
        "--folds", type=int, default=4, help="folds of training images that choose the strength"
    )
    text = "strengths of regularisation to solve and score (default: the best one, searched in half decades, and its "
    text += "neighbours; for depth and normals 25 from 1e-6 to 1)"
    parser.add_argument("--strengths", type=float, nargs="+", metavar="R", help=text)
    text = "training images whose memory is used: for all states if it is all images, else for a few pixels of each "
    text += "image in every pass (default: as many as fit into a quarter of it)"
    parser.add_argument("--sample-images", type=int, metavar="N", help=text)
    text = "`last` resumes a killed run and leaves a finished one alone"
    parser.add_argument("--ckpt_path", choices=["last"], help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory and hours, measured on a few images"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run `probes solve`."""
    args, config = build_parser().parse_known_args(argv[1:])
    check_options(args)
    gradients = "--trainer.inference_mode=false"
    cli = build_cli([*config, gradients], run=False, prog="probes solve")
    cli.model = build_solver(cli.model, args, cli.datamodule.task)
    cli.datamodule.cache_features = False  # images are read once, or kept as the solver's sample
    with run_process():
        dry_run(cli) if args.dry_run else run(cli, args.ckpt_path)


def check_options(args: argparse.Namespace) -> None:
    """Raise a UserError if an option of the solver is out of range."""
    for name, least in (("passes", 1), ("folds", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.sample_images is not None and args.sample_images < args.folds:
        folds = f"one for each of the {args.folds} --folds"
        raise UserError(
            f"--sample-images must be at least {args.folds}, {folds}; got {args.sample_images}"
        )
    if args.strengths is not None:
        if invalid := [value for value in args.strengths if not 0 < value < float("inf")]:
            raise UserError(f"--strengths must be above 0, got {invalid[0]:g}")
        args.strengths = tuple(sorted(set(args.strengths), reverse=True))


def build_solver(fit, args: argparse.Namespace, task: str) -> Solver:
    """Return the solver of a task with the settings that it shares with a `ProbeModule`.

    Raises:
        UserError: The config asks for probes that are not linear.
    """
    if fit.hparams.head != "linear":
        raise UserError(
            f"model.head is {fit.hparams.head!r}, but only linear probes can be solved; use `probes fit`"
        )
    solver = LeastSquaresSolver
    options = ("folds", "strengths")
    if TASKS[task].solved == "cross_entropy":
        solver = OptimumSolver
        options = (*options, "passes", "sample_images")
    elif args.strengths and max(args.strengths) > 1:
        raise UserError(
            f"--strengths of least squares must be at most 1, got {max(args.strengths):g}"
        )
    shared = {key: fit.hparams[key] for key in SHARED}
    return solver(**shared, **{key: getattr(args, key) for key in options})


def run(cli: ProbeCLI, ckpt_path: str | None) -> None:
    """Make the passes, score the probes, and write the files of the run."""
    with cli.exclusive_run_lock():
        if cli.plan_run(ckpt_path).finished:
            return
        cli.model.resuming = ckpt_path == "last"
        with interrupt_says_what_is_saved(cli.checkpoints):
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        if cli.trainer.is_global_zero:
            shutil.rmtree(cli.checkpoints, ignore_errors=True)
            rank_zero_info(cli.format_scores())


def dry_run(cli: ProbeCLI, batches: int = 3) -> None:
    """Print the time of a pass, measured on a few batches of which the first is not counted. Nothing is written."""
    trainer = cli.trainer
    solver = cli.model
    data = cli.datamodule
    training = len(data.splits["training"])
    if training <= data.batch_size:  # known before the model is loaded
        rank_zero_info(f"time: not measured, since {training} training images are one batch")
        return
    trainer.callbacks = []
    trainer.loggers = []
    trainer.limit_test_batches = 1
    solver.on_test_start = lambda: print_estimate(solver, batches)
    solver.test_step = lambda batch, batch_idx: None
    solver.on_test_epoch_end = lambda: None
    trainer.test(solver, datamodule=cli.datamodule, verbose=False)


def print_estimate(solver: Solver, batches: int) -> None:
    """Print the time of a pass."""
    times: list[float] = []
    images: list[int] = []  # a batch at the end of a fold is smaller
    for batch in solver.read(solver.prepare()[:batches]):
        solver.add(batch)
        if solver.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        images.append(len(batch["index"]))
    splits = solver.trainer.datamodule.splits
    training, validation = (len(splits[split]) for split in ("training", "validation"))
    if len(times) < 2:
        raise UserError(
            f"{training} training images are one batch: too few to measure; run it without --dry-run"
        )
    seconds = (times[-1] - times[0]) / sum(images[1:]) / solver.trainer.world_size  # of an image

    def hours(images: int) -> str:
        return f"{images * seconds / 3600:.2f} h"

    passes = solver.hparams.get("passes", 1)
    rank_zero_info(
        f"{1 / seconds:.3g} images/s; a pass over {training:,} training images: {hours(training)}, at most "
        f"{passes} passes ({hours(training * passes)}); {validation:,} validation images: {hours(validation)} and "
        "the scores"
    )
    if memory := solver.memory():
        rank_zero_info(memory)
