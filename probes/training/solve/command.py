"""The command `probes solve`: model, data and trainer of `probes fit`, and a solver in place of its training loop."""

import shutil
from collections.abc import Mapping
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.lightning_cli import run_process
from llava_bidir.common.rank_zero import run_on_all_ranks
from llava_bidir.common.run_folder import StartOfRun
from llava_bidir.common.when_to_save import interrupt_says_what_is_saved
from probes.run_config import RunConfig, SolverOptions
from probes.tasks import TASKS
from probes.training.cli import ProbeCLI, build_run
from probes.training.run_schema import MODEL_SETTINGS

from .run import SolveRun, estimate, solve
from .solver import SolveOptions


def run_config(config: RunConfig) -> None:
    """Make the passes, score the probes, and write the files of the run."""
    cli = build_solve(config)
    with run_process(), cli.exclusive_run_lock():
        plan = cli.plan_run(config.ckpt_path)
        if plan.finished:
            return
        cli.model.identity = plan.identity
        cli.model.resuming = config.ckpt_path == "last"

        def solve_here() -> None:
            solve(cli.model, cli.datamodule, cli.trainer, config.save_predictions)

        with interrupt_says_what_is_saved(cli.checkpoints):
            run_on_all_ranks(cli.trainer, solve_here)
        if cli.trainer.is_global_zero:
            shutil.rmtree(cli.checkpoints, ignore_errors=True)
            rank_zero_info(cli.format_scores())


def dry_run(config: RunConfig) -> None:
    """Print the time of a pass and the memory. Nothing is written."""
    cli = build_solve(config)
    data = cli.datamodule
    training = len(data.splits["training"])
    with run_process():
        if training <= data.batch_size:  # known before the model is loaded
            rank_zero_info(f"time: not measured, since {training} training images are one batch")
        else:
            run_on_all_ranks(cli.trainer, lambda: estimate(cli.model, data, cli.trainer))


def build_solve(config: RunConfig) -> ProbeCLI:
    """Return data and trainer of a run, and in place of a module to train what the run is made from."""
    cli = build_run(config, "probes solve")
    cli.datamodule.cache_features = False  # images are read once, or kept as the solver's sample
    cli.datamodule.trainer = cli.trainer
    cli.model = make_solve_run(cli.model.hparams, config.solver, cli.datamodule.task)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, StartOfRun):
            callback.content = yaml.safe_dump(config.values(), sort_keys=False)
    return cli


def make_solve_run(
    module_settings: Mapping[str, Any],
    solver: SolverOptions,
    task: str,
) -> SolveRun:
    """Return what a run is made from.

    Args:
        module_settings: Settings of a `ProbeModule`, of which those of the frozen model are used.
        solver: Options of the solver.
        task: Kind of targets.

    Raises:
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """
    if module_settings["head"] != "linear":
        raise UserError(
            f"model.head is {module_settings['head']!r}, but only linear probes can be solved; use `probes fit`"
        )
    of_classes = TASKS[task].loss is not None
    strengths = tuple(sorted(set(solver.strengths or ()), reverse=True)) or None
    if not of_classes and strengths and strengths[0] > 1:
        raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
    own = {"folds": solver.folds, "strengths": strengths}
    of_passes = {}
    if of_classes:
        of_passes = {"passes": solver.passes, "sample_images": solver.sample_images}
    of_model = {name: module_settings[name] for name in MODEL_SETTINGS}
    options = SolveOptions(
        seed=module_settings["seed"],
        disk_gb=solver.disk_gb,
        **own,
        **of_passes,
    )
    return SolveRun(own | of_model | of_passes, options, TASKS[task])
