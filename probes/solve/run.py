"""The command `probes solve`, from the first image to the files of a run.

Sites go through memory in groups: a forward over the training images keeps the states of a group, then each of these
sites is solved. At last the probes of all strengths are scored on the validation images; those of the chosen strengths
are the run's. Each of several processes reads and solves sites of its own.

    RUN/checkpoints/SITE.safetensors      a solved site, until the run ends
"""

import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

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
from probes.config import RunConfig, SolveOptions
from probes.data.available_memory import available_memory
from probes.data.batches import PreprocessedDataset
from probes.data.probe_data import ProbeData
from probes.data.samplers import assign_folds
from probes.machine import build_machine, seed_everything, solver_device
from probes.models.module_sources import source_identity
from probes.runs.files import format_scores, run_folder, say_finished
from probes.runs.pictures import save_pictures
from probes.runs.write import RunRecord, save_run
from probes.score.estimate import dataset_scores
from probes.score.image_metrics import TaskMetric
from probes.score.strengths import CLOSED_FORM, OPTIMUM, Strengths
from probes.site_probes import MODEL_SETTINGS, SiteProbes, load_probes, save_predictions
from probes.step_progress import follow, format_duration
from probes.tasks import SEGMENTATION, TASKS
from probes.tasks.losses import CrossEntropy

from .solution import Solution
from .states import move_batch, read, site_groups, target_bytes
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
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """

    identity: Identity | None = None

    def __init__(self, config: RunConfig):
        if config.model.head != "linear":
            raise UserError(
                f"model.head is {config.model.head!r}, but only linear probes can be solved; use `probes fit`"
            )
        task = TASKS[config.data.task]
        strengths = sorted(set(config.solver.strengths or ()), reverse=True) or None
        if task.loss is None and strengths and strengths[0] > 1:
            raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
        self.config = config
        self.machine = build_machine(config.trainer)
        seed_everything(config.seed_everything)
        self.data = ProbeData(config.data, config.seed_everything)
        self.folder = run_folder(Path(config.out))
        settings = asdict(config.model)
        settings |= {"num_classes": self.data.num_classes, "seed": config.seed_everything}
        self.hparams: dict[str, Any] = {"folds": config.solver.folds, "strengths": strengths}
        self.hparams |= {name: settings[name] for name in MODEL_SETTINGS}
        # of the paper's loss a run says nothing
        if task.loss is not None and type(task.loss) is not CrossEntropy:
            self.hparams["loss"] = task.loss.describe()

    def models(self) -> dict[str, Any]:
        """Return the paths of the models that the run is made from, by setting, or what identifies a module."""
        return {"mllm": source_identity(self.hparams["mllm"])}


def run(options: SolveOptions) -> None:
    """Run `probes solve`."""
    (dry_run if options.dry_run else run_config)(RunConfig.of(options))


@torch.no_grad()
def run_config(config: RunConfig) -> None:
    """Solve the probes of all sites, score them, and write the files of the run, or say that it is finished."""
    run = SolveRun(config)
    data = run.data
    machine = run.machine
    folder = run.folder
    lock = exclusive_run_lock(folder.path) if machine.is_first else nullcontext()
    with run_process(), lock, interrupt_says_how_to_resume(), machine.processes():
        planned = plan_run(folder, config.ckpt_path, config.overwrite)
        run.identity = decide_on_first(run_identity, machine, run, data, ("precision",))
        if planned.finished:
            folder.check_finished(run.identity)
            say_finished(folder.path, config.save_predictions)
            return
        data.verify(machine.progress == "bar")  # before the model is loaded
        training = data.splits["training"]
        fold_of = assign_folds(training.groups or range(len(training)), config.solver.folds)
        probes = load_probes(
            run.hparams, data=data, device=machine.device, head="linear", feature_norm="batchnorm"
        )
        if rank() == 0:  # all settings were accepted
            content = yaml.safe_dump(asdict(config), sort_keys=False)
            begin_run(folder.path, content, planned.replaced)
        solved = solve_sites(run, probes, fold_of)
        score(run, probes, solved)
        if rank() == 0:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
            rank_zero_info(format_scores(folder.path, probes.task))


def solve_sites(run: SolveRun, probes: SiteProbes, fold_of: Tensor) -> dict[str, Solution]:
    """Return the probes of all sites, the same in all processes; a run that is resumed has files of some."""
    machine = run.machine
    files = SiteFiles(run.folder.checkpoints, run.identity)
    mine = probes.sites[rank() :: rank_count()]
    solved = files.load(mine) if run.config.ckpt_path == "last" else {}
    memory = memory_for_states(run, len(fold_of) * target_bytes(probes))
    device = solver_device(machine.device)
    missing = [site for site in mine if site not in solved]
    targets = None
    for sites, size in site_groups(probes, sites=missing, images=len(fold_of), memory=memory):
        states, targets = read(
            probes,
            data=run.data,
            machine=machine,
            sites=sites,
            fold_of=fold_of,
            folder=None if size <= memory else run.folder.checkpoints,
            targets=targets,
        )
        work = partial(solve_site, probes, states, targets, run.hparams["strengths"], device)
        results = in_workers(work, sites, device)
        for site, found in follow(
            results, count=len(sites), label="solving sites", kind=machine.progress
        ):
            solved[site] = found
            files.save(site, found)
            del states[site]
    count = rank_count()
    return {site: broadcast(solved.get(site), i % count) for i, site in enumerate(probes.sites)}


def memory_for_states(run: SolveRun, targets: int) -> float:
    """Return the bytes of states that a process keeps at a time, beside those of all targets."""
    given = run.config.solver.memory_gb
    if given is not None:
        return 1e9 * given
    return MEMORY_SHARE * available_memory() / run.machine.processes_here - targets


def score(run: SolveRun, probes: SiteProbes, solved: dict[str, Solution]) -> None:
    """Score the probes of all strengths on the validation split, and write the files of the run."""
    data = run.data
    machine = run.machine
    device = solver_device(machine.device)
    probes.heads.to(device).eval()
    for site, found in solved.items():
        found.set_probe(probes.heads[site])
    task = probes.task
    count = len(solved)
    of_run = [found.row * count + i for i, found in enumerate(solved.values())]
    validation = data.splits["validation"]
    metric = TaskMetric(
        task=task, images=len(validation), geometry=probes.mllm.geometry, probes_of_run=of_run
    )
    numbers = (
        sum(len(x.solved) for x in solved.values()) * probes.channels * math.prod(probes.mllm.grid)
    )
    size = max(1, SCORED_BYTES // (4 * numbers))  # images whose logits are made at a time
    loader = data.validation_loader(PreprocessedDataset(validation, probes.mllm.preprocess))
    for batch in follow(loader, count=len(loader), label="scores", kind=machine.progress):
        batch = move_batch(batch, device)
        with machine.forward_context():
            states = {site: x.to(device) for site, x in probes.states(batch).items()}
            for start in range(0, len(batch["index"]), size):
                part = slice(start, start + size)
                some = {name: batch[name][part] for name in ("index", "target")}
                of_part = {site: x[part] for site, x in states.items()}
                logits = logits_of_strengths(probes, solved, of_part)
                metric.add(logits, some)
                if run.config.save_predictions:
                    save_predictions(
                        probes,
                        logits=logits[of_run],
                        batch=some,
                        names=validation.names,
                        folder=run.folder.path / "predictions",
                    )
    counted = metric.compute()
    if rank() > 0:
        return
    sums = task.sums(counted)  # [R * S, N, M]
    counted |= {name: counted[name][of_run] for name in task.summed if counted[name].ndim == 3}
    scores = {name: x.view(-1, count) for name, x in dataset_scores(task, sums).items()}
    entries = [
        found.entry(site, {name: x[:, i].tolist() for name, x in scores.items()}, task)
        for i, (site, found) in enumerate(solved.items())
    ]
    made = {
        "head": "linear",
        "feature_norm": "batchnorm",
        "solved": CLOSED_FORM if task.loss is None else OPTIMUM,
        "seed": run.hparams["seed"],
        "folds": run.hparams["folds"],
    }
    record = RunRecord(
        run.hparams,
        run.identity,
        made,
        strengths=Strengths(entries, task.score, exact=task.loss is None),
        sums_at_strengths=sums.unflatten(0, (-1, count)),
    )
    if task.name == SEGMENTATION and not run.hparams["untrained"]:
        data_hash = describe_digest(run.identity["data"])
        with machine.forward_context():
            save_pictures(
                probes, counted=counted, dataset=validation, folder=run.folder.path, data=data_hash
            )
    save_run(probes, record=record, data=data, counted=counted, out=run.folder.path)


def logits_of_strengths(
    probes: SiteProbes, solved: dict[str, Solution], states: dict[str, Tensor]
) -> Tensor:
    """Return the logits of all strengths and sites, f32[R * S, B, K, h, w]; the chosen ones are those of the probes."""
    grid = probes.mllm.grid
    logits = torch.stack([found.logits(states[site], grid) for site, found in solved.items()], 1)
    for i, (found, own) in enumerate(zip(solved.values(), probes.logits(states), strict=True)):
        logits[found.row, i] = own
    return logits.flatten(0, 1)


@torch.no_grad()
def dry_run(config: RunConfig) -> float:
    """Print the time and memory of a run, measured on some images, and return its seconds. Nothing is written."""
    run = SolveRun(config)
    data = run.data
    machine = run.machine
    with run_process(), machine.processes():
        data.verify(machine.progress == "bar")
        probes = load_probes(
            run.hparams, data=data, device=machine.device, head="linear", feature_norm="batchnorm"
        )
        images = len(data.splits["training"])
        sites = probes.sites[rank() :: rank_count()]
        if not sites:  # of more processes than sites; the first one has some, and prints
            return 0.0
        measured = sites[-1:]
        fold_of = assign_folds(range(min(images, MEASURED_IMAGES)), config.solver.folds)
        device = solver_device(machine.device)
        started = time.perf_counter()
        states, targets = read(probes, data=data, machine=machine, sites=measured, fold_of=fold_of)
        after_read = time.perf_counter()
        work = partial(solve_site, probes, states, targets, run.hparams["strengths"], device)
        list(in_workers(work, measured, device))
        forward = (after_read - started) * images / len(fold_of)
        solve = (time.perf_counter() - after_read) * images / len(fold_of)
        of_targets = images * target_bytes(probes)
        memory = memory_for_states(run, of_targets)
        groups = site_groups(probes, sites=sites, images=images, memory=memory)
        most = max(size for _, size in groups)
        threads = threads_of(device)
        total = len(groups) * forward + len(sites) * solve / threads
        total += forward * len(data.splits["validation"]) / images / rank_count()
        rank_zero_info(
            f"about {format_duration(total)}: a forward over {images:,} training images takes "
            f"{format_duration(forward)}, a site {format_duration(solve)}, {threads} at a time; {len(groups)} forwards "
            f"at most, each for the sites whose states fit: {most / 1e9:.3g} GB in "
            f"{'memory' if most <= memory else 'a file in --out'}, beside {of_targets / 1e9:.3g} GB of targets"
        )
        return total
