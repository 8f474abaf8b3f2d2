"""What all solvers are made of: a way to read states, options, and files from which a killed run resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.data.samplers import assign_folds
from probes.training.distributed import broadcast, gather_images, rank_count

from .checkpoints import SolverCheckpoints
from .solved_site import SolvedSite
from .state_reader import StateReader


@dataclass(frozen=True)
class SolveOptions:
    """Options of `probes solve`.

    Args:
        folds: F, folds of training images for the cross-validation.
        strengths: Strengths to solve, above 0; None for a search or, of least squares, for 25.
        seed: Seed of the pixels that are sampled.
        passes: Most passes over the training split; of classes.
        sample_images: Training images whose memory is used; None for as many as fit into a quarter of the available
            memory; of classes.
        disk_gb: Most GB of states that may be written to the disk of the run; of classes.
    """

    folds: int = 4
    strengths: tuple[float, ...] | None = None
    seed: int = 0
    passes: int = 20
    sample_images: int | None = None
    disk_gb: float = 0.0


class Solver:
    """Linear probes at every site, for several strengths of regularisation.

    `prepare_first_pass` says which images a process reads, `add` takes each of their batches, and `solve` returns the
    probes.

    Args:
        reader: Reads batches of training images with their states.
        options: Options of the command.
        checkpoints: Files of a killed run.

    Raises:
        UserError: There are fewer training images, or groups of them, than folds.
    """

    path_kind: str  # name of the probes' path in metrics.json
    most_passes = 1  # over the training images
    keeps_states = False  # of all images on the disk

    def __init__(self, reader: StateReader, options: SolveOptions, checkpoints: SolverCheckpoints):
        self.reader = reader
        self.options = options
        self.checkpoints = checkpoints
        self.probes = reader.probes
        self.mllm = reader.probes.mllm
        self.sites = reader.probes.sites
        self.channels = reader.probes.channels
        self.loss = reader.probes.task.loss
        self.device = reader.device
        self.passes = 0  # that are complete
        training = reader.data.splits["training"]
        self.images = len(training)
        self.fold_of = assign_folds(self.images, options.folds, training.groups)
        self.kept: list[Any] = []  # of the images of a pass, batch by batch
        self.sample_states: dict[str, Tensor] = {}  # of the sites that this process solves

    def prepare_first_pass(self) -> list[list[int]]:
        """Return this process's training images of the first pass, in batches."""
        raise NotImplementedError

    def read_first_pass(self) -> None:
        """Read the training images of the first pass."""
        for batch in self.reader.training(self.prepare_first_pass(), "pass 1"):
            self.add(batch)
        self.passes = 1

    @property
    def in_first_pass(self) -> bool:
        """No pass is complete: `add` is being called."""
        return self.passes == 0

    def owner_of(self, site: str) -> int:
        """Return the process that solves a site."""
        return self.sites.index(site) % rank_count()

    def add(self, batch: dict[str, Any]) -> None:
        """Take a batch of the first pass."""
        raise NotImplementedError

    def memory(self) -> str:
        """Return a sentence on the memory of the run; empty if there is nothing to say."""
        return ""

    def solve(self) -> dict[str, SolvedSite]:
        """Return the probes of all sites after the first pass, the same in all processes."""
        raise NotImplementedError

    def gather_states(
        self,
        states: Sequence[dict[str, Tensor]],
        counts: list[int],
        order: Tensor,
    ) -> None:
        """Bring the states of each site to its owner, which has them in `sample_states`.

        Args:
            states: What this process has kept of each batch, by site; each is removed when its owner has it.
            counts: Number of states that each process has kept of a site.
            order: Indices that sort the states of all processes.
        """
        self.sample_states = {}
        for site in self.sites:
            mine = torch.cat([batch.pop(site) for batch in states])
            gathered = gather_images(mine, counts, self.owner_of(site), self.device)
            if gathered is not None:
                self.sample_states[site] = gathered[order]

    def share_solved(self, solved: dict[str, SolvedSite]) -> dict[str, SolvedSite]:
        """Return the probes of all sites, each from its owner."""
        return {site: broadcast(solved.get(site), self.owner_of(site)) for site in self.sites}

    def about(self) -> dict[str, Any]:
        """Return what metrics.json["path"] says of the passes."""
        return {"passes": self.passes}
