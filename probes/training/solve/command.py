"""The command `probes solve`: the options of `probes fit`, and those of the solver."""

import argparse
import shutil
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.interrupt import interrupt_says_what_is_saved
from llava_bidir.common.lightning_cli import run_process
from llava_bidir.common.rank_zero import run_on_all_ranks
from llava_bidir.common.usage_errors import ArgumentParser
from probes.tasks import TASKS
from probes.training.cli import ProbeCLI, build_cli
from probes.training.run_schema import MODEL_SETTINGS

from .run import SolveRun, estimate, solve
from .solver import SolveOptions


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
    parser.add_argument(
        "--passes",
        type=int,
        default=SolveOptions.passes,
        help=text,
    )
    parser.add_argument(
        "--folds",
        type=int,
        default=SolveOptions.folds,
        help="folds of training images that choose the strength",
    )
    text = "strengths of regularisation to solve and score (default: the best one, searched in half decades, and its "
    text += "neighbours; for depth and normals 25 from 1e-6 to 1)"
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        metavar="R",
        help=text,
    )
    text = "training images whose memory is used: for all states if it is all images, else for a few pixels of each "
    text += "image in every pass (default: as many as fit into a quarter of it)"
    parser.add_argument(
        "--sample-images",
        type=int,
        metavar="N",
        help=text,
    )
    text = "GB of states on the disk of --out, deleted at the end: if those of all training images take no more, "
    text += "passes after the first one run no model (default: none)"
    parser.add_argument(
        "--disk-gb",
        type=float,
        default=SolveOptions.disk_gb,
        metavar="GB",
        help=text,
    )
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
    cli = build_cli(config, run=False, prog="probes solve")
    data = cli.datamodule
    data.cache_features = False  # images are read once, or kept as the solver's sample
    data.trainer = cli.trainer
    # `build_cli` has made a module to train, of which only the settings are needed here. The run
    # stands in its place: `plan_run` makes the identity of its `hparams` and `models()`.
    cli.model = make_solve_run(cli.model.hparams, args, data.task)
    with run_process():
        if args.dry_run:
            dry_run(cli)
        else:
            run(cli, args.ckpt_path)


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
    if not args.disk_gb >= 0:
        raise UserError(f"--disk-gb must be at least 0, got {args.disk_gb:g}")
    if args.strengths is not None:
        if invalid := [value for value in args.strengths if not 0 < value < float("inf")]:
            raise UserError(f"--strengths must be above 0, got {invalid[0]:g}")
        args.strengths = tuple(sorted(set(args.strengths), reverse=True))


def make_solve_run(
    module_settings: Mapping[str, Any],
    args: argparse.Namespace,
    task: str,
) -> SolveRun:
    """Return what a run is made from.

    Args:
        module_settings: Settings of a `ProbeModule`, of which those of the frozen model are used.
        args: Options of the solver.
        task: Kind of targets.

    Raises:
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """
    if module_settings["head"] != "linear":
        raise UserError(
            f"model.head is {module_settings['head']!r}, but only linear probes can be solved; use `probes fit`"
        )
    of_classes = TASKS[task].cross_entropy
    if not of_classes and args.strengths and max(args.strengths) > 1:
        raise UserError(
            f"--strengths of least squares must be at most 1, got {max(args.strengths):g}"
        )
    own = {"folds": args.folds, "strengths": args.strengths}
    of_passes = {"passes": args.passes, "sample_images": args.sample_images} if of_classes else {}
    of_model = {name: module_settings[name] for name in MODEL_SETTINGS}
    options = SolveOptions(
        seed=module_settings["seed"],
        disk_gb=args.disk_gb,
        **own,
        **of_passes,
    )
    return SolveRun(own | of_model | of_passes, options, TASKS[task])


def run(cli: ProbeCLI, ckpt_path: str | None) -> None:
    """Make the passes, score the probes, and write the files of the run."""
    with cli.exclusive_run_lock():
        plan = cli.plan_run(ckpt_path)
        if plan.finished:
            return
        cli.model.identity = plan.identity
        cli.model.resuming = ckpt_path == "last"

        def solve_here() -> None:
            solve(cli.model, cli.datamodule, cli.trainer, cli.saves_predictions)

        with interrupt_says_what_is_saved(cli.checkpoints):
            run_on_all_ranks(cli.trainer, solve_here)
        if cli.trainer.is_global_zero:
            shutil.rmtree(cli.checkpoints, ignore_errors=True)
            rank_zero_info(cli.format_scores())


def dry_run(cli: ProbeCLI) -> None:
    """Print the time of a pass and the memory. Nothing is written."""
    training = len(cli.datamodule.splits["training"])
    if training <= cli.datamodule.batch_size:  # known before the model is loaded
        rank_zero_info(f"time: not measured, since {training} training images are one batch")
        return
    run_on_all_ranks(cli.trainer, lambda: estimate(cli.model, cli.datamodule, cli.trainer))
