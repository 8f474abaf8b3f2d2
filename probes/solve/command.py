"""The command `probes solve`: a solver in place of the training loop of `probes fit`."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock
from llava_bidir.common.identity import run_identity
from llava_bidir.common.processes import decide_on_first, rank, rank_zero_info
from llava_bidir.common.runs import (
    begin_run,
    hide_expected_messages,
    interrupt_says_what_is_saved,
    plan_run,
    run_process,
)
from probes.config import RunConfig, SolveOptions
from probes.data.probe_data import ProbeData
from probes.machine import Machine, build_machine, seed_everything
from probes.runs.files import format_scores, run_folder, say_finished
from probes.site_probes import MODEL_SETTINGS
from probes.tasks import TASKS
from probes.tasks.losses import CrossEntropy

from .run import SolveRun, estimate, solve


def run(options: SolveOptions) -> None:
    """Run `probes solve`."""
    config = RunConfig.of(options)
    if options.dry_run:
        dry_run(config)
    else:
        run_config(config)


def run_config(config: RunConfig) -> None:
    """Solve the probes of all sites, score them, and write the files of the run."""
    run, data, machine = build_solve(config)
    lock = exclusive_run_lock(run.out) if machine.is_first else nullcontext()
    with run_process(), lock, interrupt_says_what_is_saved(run.checkpoints):
        machine.run(lambda: solve_unless_finished(config, run, data, machine))


def solve_unless_finished(
    config: RunConfig,
    run: SolveRun,
    data: ProbeData,
    machine: Machine,
) -> None:
    """Solve and score, or say that the run is finished; in all processes."""
    folder = run_folder(run.out)
    planned = plan_run(folder, config.ckpt_path, config.overwrite)
    run.identity = decide_on_first(lambda: run_identity(machine, run, data, ("precision",)))
    if planned.finished:
        folder.check_finished(run.identity)
        say_finished(run.out, data.name, config.save_predictions)
        return
    run.resuming = config.ckpt_path == "last"

    def begin() -> None:
        if rank() == 0:
            content = yaml.safe_dump(asdict(config), sort_keys=False)
            begin_run(run.out, content, planned.replaced)

    solve(run, data, machine, begin, config.save_predictions)
    if rank() == 0:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        rank_zero_info(format_scores(run.out, run.task))


def dry_run(config: RunConfig) -> float:
    """Print the time and memory of a run, and return its seconds. Nothing is written."""
    run, data, machine = build_solve(config)
    seconds: list[float] = []
    with run_process():
        machine.run(lambda: seconds.append(estimate(run, data, machine)))
    return seconds[0]


def build_solve(config: RunConfig) -> tuple[SolveRun, ProbeData, Machine]:
    """Return what a run is made from, its data, and where it computes.

    Raises:
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """
    hide_expected_messages()
    machine = build_machine(config.trainer)
    seed_everything(config.seed_everything)
    data = ProbeData(**vars(config.data), seed=config.seed_everything)
    if config.model.head != "linear":
        raise UserError(
            f"model.head is {config.model.head!r}, but only linear probes can be solved; use `probes fit`"
        )
    task = TASKS[config.data.task]
    strengths = sorted(set(config.solver.strengths or ()), reverse=True) or None
    if task.loss is None and strengths and strengths[0] > 1:
        raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
    own = {"num_classes": data.num_classes, "seed": config.seed_everything}
    settings = asdict(config.model) | own
    hparams = {"folds": config.solver.folds, "strengths": strengths}
    hparams |= {name: settings[name] for name in MODEL_SETTINGS}
    if task.loss is not None and type(task.loss) is not CrossEntropy:  # of which a run says nothing
        hparams["loss"] = task.loss.describe()
    options = replace(config.solver, strengths=strengths)
    return SolveRun(Path(config.out), hparams, options, task), data, machine
