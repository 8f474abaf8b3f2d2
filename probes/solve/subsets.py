"""Solved probes of subsets of the training images, scored on all validation images.

The states of all training images are read once, and each subset is solved on its part of them. A subset inherits the
folds of all images and chooses its own strength: that of all images has seen what the subset leaves out.

Legend: P subsets, S sites, N validation images, d width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import yaml
from torch import Tensor

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.identity import run_identity
from llava_bidir.common.runs import run_process
from probes.config import RunConfig
from probes.data.samplers import assign_folds
from probes.runs.read import ProbeRun

from .held_out import scored_masks
from .run import SolveRun, count_validation_images, memory_for_states
from .solution import Solution
from .states import StateReader, Targets, site_groups, target_bytes
from .workers import in_workers, solve_site


def read_solve_run(run: ProbeRun) -> SolveRun:
    """Return what a finished run was made from, in one process, with paths that are true in any folder."""
    values = yaml.safe_load((run.path / "config.yaml").read_text())
    values["model"] |= {"mllm": run.manifest["config"]["mllm"], "trust": run.trust}
    values["data"]["root"] = run.manifest["data"]["root"]
    values["trainer"] |= {"devices": 1, "num_nodes": 1}
    return SolveRun(Parser(RunConfig).read([], values | {"out": str(run.path)}))


def draw_subset(groups: Sequence[Hashable], images: int, seed: int) -> list[int]:
    """Return the indices of about so many images of whole groups; a larger subset of the same seed has them, too."""
    members: dict[Hashable, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(group, []).append(image)
    in_order = [*members.values()]
    order = torch.randperm(len(in_order), generator=torch.Generator().manual_seed(seed))
    drawn = [in_order[i] for i in order.tolist()]
    totals = torch.tensor([len(group) for group in drawn]).cumsum(0)
    count = int((totals - images).abs().argmin()) + 1
    return sorted(sum(drawn[:count], []))


@torch.no_grad()
def count_subsets(
    run: SolveRun, sizes: Sequence[int], draws: int
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Return subsets of each size and draw, and what is counted with their probes, as `count_validation_images`.

    Raises:
        UserError: Model, data or settings are not those of the finished run, or a subset cannot choose a strength.
    """
    with run_process(), run.machine.processes():
        run.data.verify(run.machine.progress == "bar")
        run.folder.check_finished(run_identity(run.machine, run, run.data, ("precision",)))
        training = run.data.splits["training"]
        groups = training.groups or range(len(training))
        subsets = [
            draw_subset(groups, size, seed=draws * run.hparams["seed"] + draw)
            for size, draw in product(sizes, range(draws))
        ]
        probes = run.load_probes()
        fold_of = assign_folds(groups, run.config.solver.folds)
        reader = StateReader(probes, data=run.data, machine=run.machine, fold_of=fold_of)
        images = len(training)
        memory = memory_for_states(run, 2 * images * target_bytes(probes))
        solutions: dict[str, list[Solution]] = {}
        targets: list[Targets] = []
        for sites, size in site_groups(probes, sites=probes.sites, images=images, memory=memory):
            states = reader.read(sites, run.folder.checkpoints if size > memory else None)
            targets = targets or [targets_of(reader, subset) for subset in subsets]
            items = list(product(sites, range(len(subsets))))
            solve = partial(_solve_item, run, reader, states, targets, subsets)
            for (site, _), solution in in_workers(solve, items, run.solver_device):
                solutions.setdefault(site, []).append(solution)
        joined = {site: join_solutions(of_site) for site, of_site in solutions.items()}
        return subsets, count_validation_images(run, probes, joined)


def targets_of(reader: StateReader, subset: list[int]) -> Targets:
    """Return the targets of a subset of the training images, with the folds that it has of those of all.

    Raises:
        UserError: It is of one fold, or no class is in two.
    """
    with error_context(f"{len(subset)} training images"):
        folds, fold_of = reader.targets.fold_of[subset].unique(return_inverse=True)
        if len(folds) < 2:
            raise UserError("they are in one fold, and none can choose the strength; expected more")
        prepared = reader.targets.prepared[subset]
        training = reader.data.splits["training"]
        scored = scored_masks(
            prepared,
            fold_of=fold_of,
            target_of=lambda i: torch.from_numpy(training[subset[i]]["target"]),
            prepare=reader.prepare,
        )
        return Targets(prepared, scored=scored, fold_of=fold_of)


def _solve_item(
    run: SolveRun,
    reader: StateReader,
    states: dict[str, Tensor],
    targets: Sequence[Targets],
    subsets: Sequence[list[int]],
    item: tuple[str, int],
) -> Solution:
    """Return the probes of a site on a subset."""
    site, number = item
    of_subset = {site: states[site][subsets[number]]}
    strengths = run.hparams["strengths"]
    return solve_site(reader.probes, of_subset, targets[number], strengths, run.solver_device, site)


def join_solutions(solutions: Sequence[Solution]) -> Solution:
    """Return the chosen probes of subsets as one solution with a row for each: weights are of x minus one mean."""
    first = solutions[0]
    weights = torch.stack([solution.weights[solution.row] for solution in solutions])
    biases = []
    for solution, weight in zip(solutions, weights, strict=True):
        shift = weight.double() @ (first.mean - solution.mean)
        biases.append(solution.bias[solution.row] + shift.float())
    rows = torch.arange(len(solutions))
    return replace(first, weights=weights, bias=torch.stack(biases), chosen=rows[0], solved=rows)
