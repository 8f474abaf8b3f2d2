"""Solved probes of subsets of the training images, scored on all validation images.

The states of all training images are read once, and each subset is solved on its part of them. A subset inherits the
folds of all images and chooses its own strength: that of all images has seen what the subset leaves out.

Legend: P subsets, S sites, N validation images.
"""

from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import run_identity
from probes.config import RunConfig
from probes.data.samplers import assign_folds
from probes.data.windows import training_samples
from probes.runs.files import run_folder
from probes.runs.read import ProbeRun

from .run import SolveRun, count_validation_images, solve_sites
from .solution import Solution
from .states import StateReader, Targets


def draw_subset(groups: Sequence[Hashable], images: int, seed: int) -> list[int]:
    """Return the indices of whole groups with about so many images; larger subsets of the same seed have them, too."""
    names = list(dict.fromkeys(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    rank = {names[number]: place for place, number in enumerate(order)}
    ranks = torch.tensor([rank[group] for group in groups])
    distance = (ranks.bincount().cumsum(0) - images).abs()
    return (ranks <= distance.argmin()).nonzero().flatten().tolist()


class SubsetRun(SolveRun):
    """The probes of subsets of the training images, each a row of the solution of a site.

    Args:
        run: A finished run of all training images.
        folder: Of the sites that are solved, from which a killed call resumes.

    Raises:
        UserError: Model, data or settings are not those of the run.
    """

    def __init__(self, run: ProbeRun, folder: Path):
        values = yaml.safe_load((run.path / "config.yaml").read_text())
        values["model"] |= {"mllm": run.manifest["config"]["mllm"], "trust": run.trust}
        values["data"]["root"] = run.manifest["data"]["root"]
        values["trainer"] |= {"devices": 1, "num_nodes": 1}
        values |= {"out": str(folder), "ckpt_path": "last"}
        super().__init__(Parser(RunConfig).read([], values))
        self.data.verify(show_bar=False)
        self.identity = run_identity(self.machine, self, self.data, ("precision",))
        run_folder(run.path).check_finished(self.identity)
        training = self.data.splits["training"]
        self.groups = training.groups or range(len(training))
        self.subsets: list[list[int]] = []
        self.targets: list[Targets] = []

    @torch.no_grad()
    def count(self, subsets: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return what the task counts of the validation images by the probes of subsets, [P * S, N, ...]."""
        self.subsets = [*subsets]
        self.identity = self.identity | {"subsets": {"images": self.subsets}}
        probes = self.load_probes()
        fold_of = assign_folds(self.groups, self.config.solver.folds)
        samples = training_samples(self.data.splits["training"], probes.mllm)
        if len(samples) != len(fold_of):
            raise UserError(
                f"{self.config.out}: a learning curve is of photos that are read whole, and model.image_resize is slide"
            )
        solutions = solve_sites(self, probes, samples=samples, fold_of=fold_of)
        return count_validation_images(self, probes, solutions)

    def solve(self, reader: StateReader, states: dict[str, Tensor], site: str) -> Solution:
        """Return the probes of a site, a row for each subset."""
        if not self.targets:
            self.targets = [self.targets_of(reader, subset) for subset in self.subsets]
        solutions = []
        for subset, targets in zip(self.subsets, self.targets, strict=True):
            of_subset = copy(reader)
            of_subset.targets = targets
            solutions.append(super().solve(of_subset, {site: states[site][subset]}, site))
        return join_solutions(solutions)

    def targets_of(self, reader: StateReader, subset: list[int]) -> Targets:
        """Return the targets of a subset, with the folds that it has of those of all training images.

        Raises:
            UserError: It is in one fold, or no class is in two.
        """
        folds, fold_of = reader.targets.fold_of[subset].unique(return_inverse=True)
        if len(folds) < 2:
            raise UserError(
                f"{len(subset)} training images are in one fold, and none can choose the strength; expected more"
            )
        return reader.mask_targets(reader.targets.prepared[subset], fold_of, subset)


def join_solutions(solutions: Sequence[Solution]) -> Solution:
    """Return the chosen probes of several as the rows of one, whose weights are of x minus the mean of the first."""
    first = solutions[0]
    weights = []
    biases = []
    for solution in solutions:
        weight = solution.weights[solution.row]
        shift = weight.double() @ (first.mean - solution.mean)
        weights.append(weight)
        biases.append(solution.bias[solution.row] + shift.float())
    rows = torch.arange(len(solutions))
    return replace(
        first,
        weights=torch.stack(weights),
        bias=torch.stack(biases),
        chosen=rows[0].clone(),
        solved=rows,
    )
