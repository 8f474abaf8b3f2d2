"""A run of `probes solve`, from the first image to its files.

Sites go through memory in groups: a forward over the training images keeps the states of a group, then each of these
sites is solved. At last the validation images are scored: the probes of the chosen strengths, which are the run's, and
those of the others. Each of several processes reads and solves sites of its own.

    RUN/checkpoints/SITE.safetensors      a solved site, until the run ends
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.identity import Identity, describe_digest
from llava_bidir.common.processes import broadcast, rank, rank_count, rank_zero_info
from probes.config import SolverOptions
from probes.data.available_memory import available_memory
from probes.data.probe_data import ProbeData
from probes.data.samplers import assign_folds
from probes.machine import Machine, solver_device
from probes.models.module_sources import source_identity
from probes.runs.pictures import save_pictures
from probes.runs.write import RunRecord, StrengthsRecord, save_run
from probes.score.strengths import CLOSED_FORM, OPTIMUM
from probes.site_probes import (
    SiteProbes,
    compute_counts,
    load_probes,
    save_predictions,
    score_batch,
)
from probes.step_progress import format_duration
from probes.tasks import SEGMENTATION, Task

from .least_squares import solve_values
from .objective import SiteProblem
from .path_scores import PathScores
from .progress import follow
from .refinement import solve_classes
from .solution import Solution
from .states import Kept, move_batch, read, site_groups
from .workers import SiteFiles, in_workers, threads_of

MEMORY_SHARE = 0.6  # of the free memory, for states
GPU_SHARE = 2 / 3  # of the free memory of a GPU, for the states of a site
MEASURED_IMAGES = 64  # by `--dry-run`


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
    training = data.splits["training"]
    fold_of = assign_folds(len(training), run.options.folds, training.groups)
    probes = load_on(machine, run, data)
    begin()
    solved = solve_sites(run, probes, data, machine, fold_of)
    score(run, probes, solved, data, machine, save_images)


def load_on(machine: Machine, run: SolveRun, data: ProbeData) -> SiteProbes:
    """Load the model and its probes onto the device of a machine."""
    device = machine.device
    probes = load_probes(run.hparams, data, device, head="linear", feature_norm="batchnorm")
    probes.mllm.to(device)
    probes.heads.to(solver_device(device)).eval()
    return probes


def solve_sites(
    run: SolveRun,
    probes: SiteProbes,
    data: ProbeData,
    machine: Machine,
    fold_of: Tensor,
) -> dict[str, Solution]:
    """Return the probes of all sites, the same in all processes."""
    files = SiteFiles(run.checkpoints, run.identity, run.resuming)
    mine = probes.sites[rank() :: rank_count()]
    solved = files.load(mine)
    if solved:
        rank_zero_info(f"{len(solved)} of {len(mine)} sites were solved before")
    memory = memory_for_states(run.options, machine)
    size_of = sizes_of_states(probes, len(fold_of))
    device = solver_device(machine.device)
    targets = None
    for sites in site_groups([site for site in mine if site not in solved], size_of, memory):
        fits = sum(size_of[site] for site in sites) <= memory
        folder = None if fits else run.checkpoints
        kept = read(
            probes,
            data,
            machine,
            sites,
            fold_of,
            folder,
            targets,
        )
        targets = kept.targets
        work = partial(solve_site, probes, kept, run.options.strengths, device)
        results = in_workers(work, sites, device)
        for site, found in follow(results, len(sites), "solving sites", machine.progress):
            solved[site] = found
            files.save(site, found)
            del kept.states[site]
    count = rank_count()
    return {site: broadcast(solved.get(site), i % count) for i, site in enumerate(probes.sites)}


def solve_site(
    probes: SiteProbes,
    kept: Kept,
    strengths: list[float] | None,
    device: torch.device,
    site: str,
) -> Solution:
    """Return the probes of a site whose states are kept."""
    states = kept.states[site]
    targets = kept.targets
    if device.type == "cuda" and states.nbytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        states = states.to(device)
    if probes.task.loss is None:
        return solve_values(
            states,
            targets.prepared,
            probes.mllm.grid,
            targets.fold_of,
            strengths,
        )
    problem = SiteProblem(
        probes.task.loss,
        states,
        targets.prepared,
        targets.fold_of,
        targets.scored,
    )
    return solve_classes(problem, strengths)


def memory_for_states(options: SolverOptions, machine: Machine) -> float:
    """Return the bytes of states that a process keeps at a time."""
    if options.memory_gb is not None:
        return 1e9 * options.memory_gb
    return MEMORY_SHARE * available_memory() / machine.processes_here


def sizes_of_states(probes: SiteProbes, images: int) -> dict[str, int]:
    """Return the bytes of the states of so many images by site."""
    return {site: images * probes.mllm.state_bytes([site]) for site in probes.sites}


def score(
    run: SolveRun,
    probes: SiteProbes,
    solved: dict[str, Solution],
    data: ProbeData,
    machine: Machine,
    save_images: bool,
) -> None:
    """Score what was solved on the validation split, and write the files of the run."""
    for site, found in solved.items():
        found.set_probe(probes.heads[site])
        if limit := found.describe_limit(site):
            rank_zero_info(limit)
    validation = data.splits["validation"]
    metric = probes.new_metric(len(validation))
    of_path = PathScores(probes, solved, len(validation))
    data.read_for(probes.mllm, probes.sites, None)
    loader = data.validation_loader()
    device = solver_device(machine.device)
    for batch in follow(loader, len(loader), "scores", machine.progress):
        batch = move_batch(batch, device)
        with machine.forward_context():
            states = {site: x.to(device) for site, x in probes.states(batch).items()}
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
    name = CLOSED_FORM if run.task.loss is None else OPTIMUM
    path = StrengthsRecord(name, {name: {"sites": entries}}, tensors)
    made = {
        "head": "linear",
        "feature_norm": "batchnorm",
        "solved": name,
    }
    made |= {key: run.hparams[key] for key in ("seed", "folds")}
    record = RunRecord(run.hparams, run.identity, made, path=path)
    if run.task.name == SEGMENTATION and not run.hparams["untrained"]:
        data_hash = describe_digest(run.identity["data"])
        with machine.forward_context():
            save_pictures(
                probes,
                counted,
                validation,
                run.out,
                data_hash,
            )
    save_run(probes, record, data, counted, run.out)


@torch.no_grad()
def estimate(run: SolveRun, data: ProbeData, machine: Machine) -> float:
    """Print what a run takes, measured on some images, and return its seconds. Nothing is written."""
    data.verify(machine.progress == "bar")
    probes = load_on(machine, run, data)
    images = len(data.splits["training"])
    sites = probes.sites[rank() :: rank_count()]
    fold_of = assign_folds(min(images, MEASURED_IMAGES), run.options.folds)
    share = len(fold_of) / images
    device = solver_device(machine.device)
    started = time.perf_counter()
    kept = read(probes, data, machine, sites[-1:], fold_of)
    after_read = time.perf_counter()
    work = partial(solve_site, probes, kept, run.options.strengths, device)
    list(in_workers(work, sites[-1:], device))
    forward = (after_read - started) / share
    solve = (time.perf_counter() - after_read) / share
    size_of = sizes_of_states(probes, images)
    memory = memory_for_states(run.options, machine)
    groups = site_groups(sites, size_of, memory)
    most = max(sum(size_of[site] for site in group) for group in groups)
    threads = threads_of(device)
    total = len(groups) * forward + len(sites) * solve / threads
    total += forward * len(data.splits["validation"]) / images / rank_count()
    rank_zero_info(
        f"about {format_duration(total)}: a forward over {images:,} training images takes {format_duration(forward)}, "
        f"a site {format_duration(solve)}, {threads} at a time; {len(groups)} forwards at most, each for the sites "
        f"whose states fit: {most / 1e9:.3g} GB in {'memory' if most <= memory else 'a file in --out'}"
    )
    return total
