"""The command `probes solve`, from the first image to the files of a run.

Sites go through memory in groups: a forward over the training images keeps the states of a group, then each of these
sites is solved. At last the probes of all strengths are scored on the validation images; those of the chosen strengths
are the run's. Each of several processes reads and solves sites of its own.

    RUN/checkpoints/SITE.safetensors      a solved site, until the run ends
"""

import math
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock
from llava_bidir.common.identity import Identity, describe_digest, run_identity
from llava_bidir.common.processes import (
    broadcast,
    decide_on_first,
    rank,
    rank_count,
    rank_zero_info,
)
from llava_bidir.common.runs import begin_run, interrupt_says_how_to_resume, plan_run, run_process
from probes.compute.machine import build_machine, seed_everything, solver_device
from probes.config import RunConfig, SolveOptions
from probes.data.available_memory import available_memory
from probes.data.batches import square_rows
from probes.data.probe_data import ProbeData
from probes.data.samplers import assign_folds
from probes.data.windows import TrainingSamples, training_samples
from probes.models.chosen import choose_model
from probes.models.module_sources import source_identity
from probes.runs.files import format_scores, run_folder, say_finished
from probes.runs.pictures import save_pictures
from probes.runs.write import RunRecord, save_run
from probes.score.estimate import dataset_scores
from probes.score.image_metrics import TaskMetric
from probes.score.strengths import CLOSED_FORM, OPTIMUM, Strengths
from probes.site_probes import MODEL_SETTINGS, SiteProbes, load_probes, save_predictions
from probes.steps.progress import follow, format_duration
from probes.tasks import SEGMENTATION, find_task
from probes.tasks.losses import CrossEntropy

from .solution import Solution
from .states import StateReader, move_batch, site_groups, target_bytes
from .workers import SiteFiles, in_workers, solve_site, threads_of

MEMORY_SHARE = 0.6  # of the free memory, for states and targets
SCORED_BYTES = 2**30  # of logits at a time; a batch of 64 at 7B has 19 GB
MEASURED_IMAGES = 64  # by `--dry-run`


class SolveRun:
    """What a run is made from, and where it computes.

    Args:
        config: All that `probes solve` is told.

    Attributes:
        machine: Where it computes.
        data: Its images and targets.
        folder: Its folder.
        hparams: Every option of the model and of the solver, as a LightningModule names them, for the identity and
            the files of the run.
        identity: Set when the run starts.

    Raises:
        UserError: The config asks for probes that are not linear, a strength is out of range, or a name is unknown.
    """

    identity: Identity | None = None

    def __init__(self, config: RunConfig):
        if config.model.head != "linear":
            raise UserError(
                f"model.head is {config.model.head!r}, but only linear probes can be solved; use `probes fit`"
            )
        choose_model(config.model)
        loss = find_task(config.data.task).loss
        strengths = sorted(set(config.solver.strengths or ()), reverse=True) or None
        if loss is None and strengths and strengths[0] > 1:
            raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
        self.config = config
        self.machine = build_machine(config.trainer)
        self.solver_device = solver_device(self.machine.device)
        seed_everything(config.seed_everything)
        self.data = ProbeData(config.data, config.seed_everything)
        self.folder = run_folder(Path(config.out))
        settings = asdict(config.model)
        settings["num_classes"] = self.data.num_classes
        settings["seed"] = config.seed_everything
        self.hparams: dict[str, Any] = {"folds": config.solver.folds, "strengths": strengths}
        self.hparams |= {name: settings[name] for name in MODEL_SETTINGS}
        # of the paper's loss a run says nothing
        if loss is not None and type(loss) is not CrossEntropy:
            self.hparams["loss"] = loss.describe()

    def models(self) -> dict[str, str | dict[str, str]]:
        """Return the paths of the models that the run is made from, by setting, or what identifies a module."""
        return {"mllm": source_identity(self.hparams["mllm"])}

    def load_probes(self) -> SiteProbes:
        """Load the model, and build the probes that solutions are copied to."""
        return load_probes(
            self.hparams,
            data=self.data,
            device=self.machine.device,
            head="linear",
            feature_norm="batchnorm",
        )

    def solve(self, reader: StateReader, states: dict[str, Tensor], site: str) -> Solution:
        """Return the probes of a site whose states were read, of all training images."""
        strengths = self.hparams["strengths"]
        return solve_site(
            reader.probes, states, reader.targets, strengths, self.solver_device, site
        )


def run_solve(options: SolveOptions) -> None:
    """Run `probes solve`."""
    config = RunConfig.of(options)
    if options.dry_run:
        dry_run(config)
    else:
        run_config(config)


@torch.no_grad()
def run_config(config: RunConfig) -> None:
    """Solve the probes of all sites, score them, and write the files of the run, or say that it is finished."""
    run = SolveRun(config)
    data = run.data
    machine = run.machine
    folder = run.folder
    lock = nullcontext()
    if machine.is_first:
        lock = exclusive_run_lock(folder.path)
    with run_process(), lock, interrupt_says_how_to_resume(), machine.processes():
        planned = plan_run(folder, config.ckpt_path, config.overwrite)
        run.identity = decide_on_first(run_identity, machine, run, data, ("precision",))
        if planned.finished:
            folder.check_finished(run.identity)
            say_finished(folder.path, config.save_predictions)
            return
        data.verify(machine.progress == "bar")  # before the model is loaded
        training = data.splits["training"]
        units = training.groups or range(len(training))
        fold_of_photo = assign_folds(units, config.solver.folds)
        probes = run.load_probes()
        samples = training_samples(training, probes.mllm)
        fold_of = fold_of_photo[samples.photo_of]
        if rank() == 0:  # all settings were accepted
            content = yaml.safe_dump(asdict(config), sort_keys=False)
            begin_run(folder.path, content, planned.replaced)
        solutions = solve_sites(run, probes, samples=samples, fold_of=fold_of)
        counted = count_validation_images(run, probes, solutions)
        if rank() == 0:
            write_files_of_run(run, probes=probes, solutions=solutions, counted=counted)
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
            rank_zero_info(format_scores(folder.path, probes.task))


def solve_sites(
    run: SolveRun, probes: SiteProbes, samples: TrainingSamples, fold_of: Tensor
) -> dict[str, Solution]:
    """Return the probes of all sites, the same in all processes; a run that is resumed has files of some."""
    files = SiteFiles(run.folder.checkpoints, run.identity)
    sites_here = sites_of_process(probes)
    solutions = {}
    if run.config.ckpt_path == "last":
        solutions = files.load(sites_here)
    missing = [site for site in sites_here if site not in solutions]
    images = len(fold_of)
    memory = memory_for_states(run, images * target_bytes(probes))
    reader = StateReader(
        probes, data=run.data, samples=samples, machine=run.machine, fold_of=fold_of
    )
    for sites, size in site_groups(probes, sites=missing, images=images, memory=memory):
        folder = None
        if size > memory:
            folder = run.folder.checkpoints
        states = reader.read(sites, folder)
        results = solve_in_workers(run, reader, states)
        for site, solution in follow(
            results, count=len(sites), label="solving sites", kind=run.machine.progress
        ):
            solutions[site] = solution
            files.save(site, solution)
            del states[site]
    everywhere = {}
    for i, site in enumerate(probes.sites):
        solved_by = i % rank_count()
        everywhere[site] = broadcast(solutions.get(site), solved_by)
    return everywhere


def sites_of_process(probes: SiteProbes) -> list[str]:
    """Return the sites that this process reads and solves."""
    return probes.sites[rank() :: rank_count()]


def memory_for_states(run: SolveRun, targets: int) -> float:
    """Return the bytes of states that a process keeps at a time, beside those of all targets."""
    given_gb = run.config.solver.memory_gb
    if given_gb is not None:
        return 1e9 * given_gb
    return MEMORY_SHARE * available_memory() / run.machine.processes_here - targets


def solve_in_workers(
    run: SolveRun, reader: StateReader, states: dict[str, Tensor]
) -> Iterable[tuple[str, Solution]]:
    """Return an iterator over the sites whose states were read, with the solution of each."""
    solve = partial(run.solve, reader, states)
    return in_workers(solve, list(states), run.solver_device)


def count_validation_images(
    run: SolveRun, probes: SiteProbes, solutions: dict[str, Solution]
) -> dict[str, Tensor]:
    """Return what the task counts of the validation images, by name, and save their predictions if asked to.

    What scores need is of the probes at all strengths, [R * S, N, ...], the rest of those of the run.
    """
    device = run.solver_device
    machine = run.machine
    probes.heads.to(device).eval()
    for site, solution in solutions.items():
        solution.set_probe(probes.heads[site])
    validation = run.data.splits["validation"]
    chosen = chosen_probes(solutions)
    metric = TaskMetric(
        probes.task, images=len(validation), geometry=probes.mllm.geometry, probes_of_run=chosen
    )
    at_once = images_at_once(probes, solutions)
    images = run.data.read_images(validation, probes.mllm.preprocess)
    loader = run.data.validation_loader(images)
    for batch in follow(loader, count=len(loader), label="scores", kind=machine.progress):
        batch = move_batch(batch, device)
        with machine.forward_context():
            states = {site: x.to(device) for site, x in probes.states(batch).items()}
            rows = square_rows(batch["target"], probes.mllm.geometry)
            for start in range(0, len(batch["index"]), at_once):
                part = slice(start, start + at_once)
                images = {name: batch[name][part] for name in ("index", "target")}
                squares = slice(rows[part][0].start, rows[part][-1].stop)
                states_of_part = {site: x[squares] for site, x in states.items()}
                logits = logits_of_strengths(probes, solutions, states_of_part)
                metric.update(logits, images["target"], images["index"])
                if run.config.save_predictions:
                    save_predictions(
                        probes,
                        logits=logits[chosen],
                        batch=images,
                        names=validation.names,
                        folder=run.folder.path / "predictions",
                    )
    return metric.compute()


def chosen_probes(solutions: dict[str, Solution]) -> list[int]:
    """Return the index of each site's chosen probe among those of all strengths and sites, R * S."""
    sites = len(solutions)
    return [solution.row * sites + i for i, solution in enumerate(solutions.values())]


def images_at_once(probes: SiteProbes, solutions: dict[str, Solution]) -> int:
    """Return the number of images whose logits are made at a time."""
    outputs = sum(len(solution.solved) for solution in solutions.values()) * probes.channels
    bytes_of_image = 4 * outputs * math.prod(probes.mllm.grid)
    return max(1, SCORED_BYTES // bytes_of_image)


def logits_of_strengths(
    probes: SiteProbes, solutions: dict[str, Solution], states: dict[str, Tensor]
) -> Tensor:
    """Return the logits of all strengths and sites, f32[R * S, B, K, h, w].

    At the chosen strengths they are those of the probes that the run saves, with their batch norm: what is scored is
    what a user loads.
    """
    logits_by_site = []
    saved_probes = probes.logits(states)
    for (site, solution), chosen_logits in zip(solutions.items(), saved_probes, strict=True):
        logits = solution.logits(states[site], probes.mllm.grid)
        logits[solution.row] = chosen_logits
        logits_by_site.append(logits)
    return torch.stack(logits_by_site, 1).flatten(0, 1)


def write_files_of_run(
    run: SolveRun, probes: SiteProbes, solutions: dict[str, Solution], counted: dict[str, Tensor]
) -> None:
    """Write the files of a run from what was counted of the validation images, see `count_validation_images`."""
    task = probes.task
    sites = len(solutions)
    sums = task.sums(counted)  # [R * S, N, M]
    scores = {name: x.view(-1, sites) for name, x in dataset_scores(task, sums).items()}
    entries = []
    for i, (site, solution) in enumerate(solutions.items()):
        scores_of_site = {name: by_strength[:, i].tolist() for name, by_strength in scores.items()}
        entries.append(solution.entry(site, scores=scores_of_site, task=task))
    is_closed_form = task.loss is None
    made = {
        "head": "linear",
        "feature_norm": "batchnorm",
        "solved": CLOSED_FORM if is_closed_form else OPTIMUM,
        "seed": run.hparams["seed"],
        "folds": run.hparams["folds"],
    }
    record = RunRecord(
        settings=run.hparams,
        identity=run.identity,
        probe=made,
        strengths=Strengths(entries, task.score, exact=is_closed_form),
        sums_at_strengths=sums.unflatten(0, (-1, sites)),
    )
    chosen = chosen_probes(solutions)
    counted_at_choice = dict(counted)
    for name in task.summed:
        if counted[name].ndim == 3:
            counted_at_choice[name] = counted[name][chosen]
    if task.name == SEGMENTATION and not (run.hparams["untrained"] or run.data.is_blank):
        write_pictures(run, probes, counted_at_choice)
    save_run(probes, record=record, data=run.data, counted=counted_at_choice, out=run.folder.path)


def write_pictures(run: SolveRun, probes: SiteProbes, counted: dict[str, Tensor]) -> None:
    """Write the predictions of some validation images, which the report shows."""
    with run.machine.forward_context():
        save_pictures(
            probes,
            counted=counted,
            dataset=run.data.splits["validation"],
            folder=run.folder.path,
            data=describe_digest(run.identity["data"]),
        )


class RunCost(NamedTuple):
    """Seconds of the parts of a run, as measured on some images, on a machine that does nothing else.

    Args:
        start: Loading the model, and checking images and targets.
        forward: A forward over the training images.
        validation: A forward over the validation images.
        site: The solution of a site and its scores; the mean of an early and a late site.
    """

    start: float
    forward: float
    validation: float
    site: float

    def seconds(self, sites: float, forwards: int = 1) -> float:
        """Return the seconds of a run of so many sites, whose states take so many forwards."""
        return self.start + forwards * self.forward + self.validation + sites * self.site


@torch.no_grad()
def dry_run(config: RunConfig) -> RunCost:
    """Print the time and memory of a run, measured on some images, and return its cost. Nothing is written.

    Of more processes than sites, one without a site has no cost.
    """
    run = SolveRun(config)
    started = work_seconds()
    with run_process(), run.machine.processes():
        run.data.verify(run.machine.progress == "bar")
        probes = run.load_probes()
        start_s = work_seconds() - started
        sites = sites_of_process(probes)
        if not sites:
            return RunCost(start_s, 0.0, 0.0, 0.0)
        images = len(training_samples(run.data.splits["training"], probes.mllm))
        bytes_of_targets = images * target_bytes(probes)
        memory = memory_for_states(run, bytes_of_targets)
        groups = site_groups(probes, sites=sites, images=images, memory=memory)
        cost = measure_cost(run, probes, ends=list(dict.fromkeys([sites[0], sites[-1]])))
        cost = cost._replace(start=start_s)
        largest = max(size for _, size in groups)
        place = "memory" if largest <= memory else "a file in --out"
        rank_zero_info(
            f"about {format_duration(cost.seconds(len(sites), len(groups)))} on an idle machine: a forward over "
            f"{images:,} training images takes {format_duration(cost.forward)}, a site {format_duration(cost.site)}; "
            f"{len(groups)} forwards at most, each for the sites whose states fit: {largest / 1e9:.3g} GB in {place}, "
            f"beside {bytes_of_targets / 1e9:.3g} GB of targets"
        )
        return cost


def measure_cost(run: SolveRun, probes: SiteProbes, ends: list[str]) -> RunCost:
    """Return the cost of a run, but its start, from an early and a late site, solved and scored on some images."""
    shares = {}
    for split, dataset in run.data.splits.items():
        images = len(dataset)
        dataset.names = dataset.names[:MEASURED_IMAGES]
        dataset.files = dataset.files[:MEASURED_IMAGES]
        shares[split] = images / len(dataset)
    training, validation = (len(run.data.splits[split]) for split in ("training", "validation"))
    heads = torch.nn.ModuleDict({site: probes.heads[site] for site in ends})
    probes = replace(probes, heads=heads)
    samples = training_samples(run.data.splits["training"], probes.mllm)
    fold_of = assign_folds(range(training), run.config.solver.folds)[samples.photo_of]
    reader = StateReader(
        probes, data=run.data, samples=samples, machine=run.machine, fold_of=fold_of
    )
    times = [work_seconds()]
    states = reader.read(ends)
    times.append(work_seconds())
    solutions = dict(solve_in_workers(run, reader, states))
    times.append(work_seconds())
    count_validation_images(run, probes, solutions)
    times.append(work_seconds())
    forward_s, solutions_s, counted_s = (after - before for before, after in pairwise(times))
    validation_s = forward_s * validation / training
    scores_s = max(0.0, counted_s - validation_s)
    threads = torch.get_num_threads()
    sites_s = solutions_s / threads_of(run.solver_device) * shares["training"]
    sites_s += scores_s / threads * shares["validation"]
    return RunCost(
        start=0.0,
        forward=forward_s / threads * shares["training"],
        validation=validation_s / threads * shares["validation"] / rank_count(),
        site=sites_s / len(ends),
    )


def work_seconds() -> float:
    """Return seconds of this process's work so far: of the clock on a GPU, else of cores, which others may use, too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return sum(os.times()[:4])  # with processes that have ended
