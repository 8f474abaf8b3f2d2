"""The command `probes solve`: model, data and trainer of `probes fit`, and a solver in place of its training loop."""

import shutil
from dataclasses import asdict, replace

import yaml
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.lightning_cli import run_process
from llava_bidir.common.rank_zero import run_on_all_ranks
from llava_bidir.common.run_folder import StartOfRun
from llava_bidir.common.when_to_save import interrupt_says_what_is_saved
from probes.run_config import RunConfig
from probes.tasks import TASKS
from probes.tasks.losses import CrossEntropy
from probes.training.cli import ProbeCLI, build_run
from probes.training.run_schema import MODEL_SETTINGS

from .run import SolveRun, estimate, solve


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
    cli.model = make_solve_run(config, cli.datamodule.num_classes)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, StartOfRun):
            callback.content = yaml.safe_dump(config.values(), sort_keys=False)
    return cli


def make_solve_run(config: RunConfig, num_classes: int) -> SolveRun:
    """Return what a run is made from.

    Args:
        config: Options of the run.
        num_classes: Of the data.

    Raises:
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """
    if config.model.head != "linear":
        raise UserError(
            f"model.head is {config.model.head!r}, but only linear probes can be solved; use `probes fit`"
        )
    task = TASKS[config.data.task]
    strengths = sorted(set(config.solver.strengths or ()), reverse=True) or None
    if task.loss is None and strengths and strengths[0] > 1:
        raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
    settings = asdict(config.model) | {"num_classes": num_classes, "seed": config.seed_everything}
    hparams = {"folds": config.solver.folds, "strengths": strengths}
    hparams |= {name: settings[name] for name in MODEL_SETTINGS}
    if task.loss is not None:
        if type(task.loss) is not CrossEntropy:  # of which a run says nothing
            hparams["loss"] = task.loss.describe()
        hparams |= {
            "passes": config.solver.passes,
            "sample_images": config.solver.sample_images,
        }
    return SolveRun(hparams, replace(config.solver, strengths=strengths), task)
