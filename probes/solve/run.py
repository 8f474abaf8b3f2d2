"""A run of `probes solve`, from the first image to its files.

The loop over the training images is the first pass; a solver may take more of them. Then the validation images are
scored once: the probes of the chosen strengths, which are the run's, and beside them those of the other strengths.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import Identity
from llava_bidir.common.processes import broadcast, rank, rank_count, rank_zero_info
from probes.data.available_memory import available_memory
from probes.data.probe_data import ProbeData
from probes.machine import Machine, solver_device
from probes.models.module_sources import source_identity
from probes.run_config import SolverOptions
from probes.runs.prediction_files import save_predictions
from probes.runs.scoring import compute_counts, score_batch
from probes.runs.write_run import RunRecord, StrengthsRecord, save_run
from probes.site_probes import load_probes
from probes.tasks import Task

from .by_passes import PassSolver
from .in_memory import MemorySolver
from .least_squares_solver import LeastSquaresSolver
from .path_scores import PathScores
from .solved_site import SolvedSite
from .solver import Solver, SolverCheckpoints
from .state_reader import StateReader

LEAST = 4  # images of each fold in memory, however little there is
MEASURED_BATCHES = 3  # by `--dry-run`; the first is not counted


@dataclass
class SolveRun:
    """What a run is made from.

    Args:
        out: Folder of the run.
        hparams: Every option of the model and of the solver, as a LightningModule names them, for the identity and
            the files of the run.
        options: Those of the solver.
        task: Task of the probes.
        identity: Set when the run starts.
        resuming: Start from the files of a killed run.
    """

    out: Path
    hparams: dict[str, Any]
    options: SolverOptions
    task: Task
    identity: Identity | None = None
    resuming: bool = False

    @property
    def checkpoints(self) -> Path:
        """Folder from which a killed run resumes."""
        return self.out / "checkpoints"

    def models(self) -> dict[str, str | dict[str, str]]:
        """Return the paths of the models that the run is made from, by setting, or what identifies a module."""
        return {"mllm": source_identity(self.hparams["mllm"])}


@torch.no_grad()
def solve(
    run: SolveRun,
    data: ProbeData,
    machine: Machine,
    begin: Callable[[], None],
    save_images: bool = False,
) -> None:
    """Solve the probes of all sites, score them, and write the files of the run; in all processes.

    Args:
        run: Model and options.
        data: Images and targets.
        machine: Where the run computes.
        begin: Called once all settings were accepted; replaces what is in the folder of the run.
        save_images: Also write the predictions of every validation image.
    """
    data.verify(machine.progress == "bar")  # before the model is loaded
    solver = start_solver(run, data, machine)
    begin()
    solver.read_first_pass()
    solved = solver.solve()
    score(run, solver, solved, data, machine, save_images)


def start_solver(run: SolveRun, data: ProbeData, machine: Machine) -> Solver:
    """Load the model, and return the solver of the run."""
    device = machine.device
    probes = load_probes(run.hparams, data, device, head="linear", feature_norm="batchnorm")
    probes.mllm.to(device)
    probes.heads.to(solver_device(device)).eval()
    reader = StateReader(probes, data, machine, masks=run.task.loss is not None)
    checkpoints = SolverCheckpoints(run.checkpoints, run.identity, run.resuming)
    return choose_solver(reader, run.options, checkpoints)


def choose_solver(
    reader: StateReader, options: SolverOptions, checkpoints: SolverCheckpoints
) -> Solver:
    """Return the solver of the reader's task: in memory, if the states of all images fit, or by passes."""
    if reader.probes.task.loss is None:
        return LeastSquaresSolver(reader, options, checkpoints)
    images = len(reader.data.splits["training"])
    wanted = options.sample_images
    fit = images_that_fit(reader, options.folds) if wanted is None else wanted
    sample_images = broadcast(min(images, fit), 0)
    if sample_images == images:
        return MemorySolver(reader, options, checkpoints)
    return PassSolver(reader, options, checkpoints, sample_images)


def images_that_fit(reader: StateReader, folds: int) -> int:
    """Return the number of images whose states fit into a quarter of the memory, some of each fold at least."""
    mllm = reader.probes.mllm
    widths = [mllm.widths[site] for site in reader.probes.sites]
    tokens = mllm.grid[0] * mllm.grid[1]
    processes = reader.machine.processes_here
    kept = (
        int(available_memory() / 4 / mllm.state_bytes(reader.probes.sites))
        * rank_count()
        // processes
    )
    # tokens of a site in float32, with logits and copies, on the device
    solved = 12 * tokens * max(widths)
    if reader.device.type == "cuda":
        free = torch.cuda.mem_get_info(reader.device)[0]
    else:
        free = available_memory()
    return max(min(kept, int(free / 4 / solved)), LEAST * folds)


def score(
    run: SolveRun,
    solver: Solver,
    solved: dict[str, SolvedSite],
    data: ProbeData,
    machine: Machine,
    save_images: bool,
) -> None:
    """Score what was solved on the validation split, and write the files of the run."""
    probes = solver.probes
    for site, found in solved.items():
        found.set_probe(probes.heads[site])
        if limit := found.describe_limit(site):
            rank_zero_info(limit)
    validation = data.splits["validation"]
    metric = probes.new_metric(len(validation))
    of_path = PathScores(probes, solved, len(validation))
    for batch in solver.reader.validation():
        with solver.reader.precision():
            states = solver.reader.states(batch)
            of_path.add(states, batch)
            logits = score_batch(probes, states, batch, metric)
        if save_images:
            save_predictions(
                probes,
                logits,
                batch,
                validation.names,
                run.out / "predictions",
            )
    counted = compute_counts(metric)
    entries, tensors = of_path.results(counted)
    if rank() > 0:
        return
    name = solver.path_kind
    path = StrengthsRecord(name, solver.about() | {name: {"sites": entries}}, tensors)
    made = {
        "head": "linear",
        "feature_norm": "batchnorm",
        "solved": name,
    }
    made |= {key: run.hparams[key] for key in ("seed", "folds")}
    record = RunRecord(run.hparams, run.identity, made, path=path)
    save_run(probes, record, data, counted, run.out)


@torch.no_grad()
def estimate(
    run: SolveRun,
    data: ProbeData,
    machine: Machine,
) -> None:
    """Print the time of a pass, measured on a few batches of which the first is not counted. Nothing is written."""
    data.verify(machine.progress == "bar")
    solver = start_solver(run, data, machine)
    times: list[float] = []
    images: list[int] = []  # a batch at the end of a fold is smaller
    batches = solver.prepare_first_pass()[:MEASURED_BATCHES]
    for batch in solver.reader.training(batches, "pass 1"):
        solver.add(batch)
        if solver.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        images.append(len(batch["index"]))
    training = len(data.splits["training"])
    validation = len(data.splits["validation"])
    if len(times) < 2:
        raise UserError(
            f"{training} training images are one batch: too few to measure; run it without --dry-run"
        )
    seconds = (times[-1] - times[0]) / sum(images[1:]) / rank_count()  # of an image

    def hours(images: int) -> str:
        return f"{images * seconds / 3600:.2f} h"

    passes = "the only one"
    if solver.keeps_states:
        passes = f"the only one of at most {solver.most_passes} that runs the model"
    elif solver.most_passes > 1:
        of_all_passes = hours(training * solver.most_passes)
        passes = f"at most {solver.most_passes} passes ({of_all_passes})"
    rank_zero_info(
        f"{1 / seconds:.3g} images/s; a pass over {training:,} training images: {hours(training)}, {passes}; "
        f"{validation:,} validation images: {hours(validation)} and the scores"
    )
    if memory := solver.memory():
        rank_zero_info(memory)
