"""What all solvers are made of: files from which a killed run resumes, and work on the cores of a machine."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava_bidir.common.errors import error_context
from llava_bidir.common.files import atomic_write, write_tensors
from llava_bidir.common.identity import Identity, check_same_identity
from llava_bidir.common.processes import broadcast, gather_images, rank, rank_count
from llava_bidir.common.runs import RESUME_ADVICE
from probes.data.samplers import assign_folds
from probes.run_config import SolverOptions

from .solved_site import SolvedSite
from .state_reader import StateReader, follow


class SolverCheckpoints:
    """Files of tensors in a folder, each with the identity of its run.

    Args:
        folder: RUN/checkpoints.
        identity: Of this run; None where nothing is saved.
        resuming: Files of a killed run may be read.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity | None,
        resuming: bool,
    ):
        self.folder = folder
        self.identity = identity
        self.resuming = resuming

    def has(self, name: str) -> bool:
        """Return whether a killed run has left a file that this run may read."""
        return self.resuming and (self.folder / name).is_file()

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files that a killed run has left."""
        return sorted(file.name for file in self.folder.glob(pattern)) if self.resuming else []

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file, with the identity of the run."""
        with atomic_write(self.folder / name) as partial:
            on_cpu = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
            write_tensors(on_cpu, partial, {"identity": json.dumps(self.identity)})

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file.

        Raises:
            UserError: The file is damaged, or belongs to a run of another identity.
        """
        path = self.folder / name
        with error_context(path):
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["identity"])
            # in memory of torch: products of tensors at the addresses of a mapped file can differ in their last bits
            tensors = {key: x.clone() for key, x in load_file(path).items()}
        check_same_identity(saved, self.identity, str(path), RESUME_ADVICE)
        return tensors


def tensors_of(site: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a site by name, from those of all sites by "SITE/NAME"."""
    return {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{site}/")}


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

    def __init__(
        self,
        reader: StateReader,
        options: SolverOptions,
        checkpoints: SolverCheckpoints,
    ):
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


def in_workers(
    work: Callable[[str], Any], sites: list[str], device: torch.device
) -> Iterable[tuple[str, Any]]:
    """Yield each site with the result of its work, on a CPU as many at a time as torch has threads.

    Each worker has one thread, so that the bits of a site do not depend on their number. They are processes, which
    share the memory of this one: threads would wait for Python's lock and be as slow as one. DataLoader ends them with
    this process, however it ends.
    """
    threads = (
        torch.get_num_threads() if sites and device.type == "cpu" and sys.platform == "linux" else 1
    )
    # one site alone, too, which has as many threads here: they would round differently
    processes = (
        {"num_workers": min(threads, len(sites)), "multiprocessing_context": "fork"}
        if threads > 1
        else {}
    )
    results = iter(
        DataLoader(
            _Results(work, sites),
            batch_size=None,
            collate_fn=lambda result: result,
            **processes,
        )
    )
    # after the workers are forked: a thread of this process that holds a lock would leave it locked in them
    solved = zip(sites, results, strict=True)
    yield from follow(solved, len(sites), "solving sites", hidden=rank() > 0)


class _Results(Dataset):
    """The result of some work for each site, done when it is asked for."""

    def __init__(self, work: Callable[[str], Any], sites: list[str]):
        self.work = work
        self.sites = sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.sites[index])
