"""Sites solved on the cores of a machine, and the files from which a killed run resumes."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from llava_bidir.common.errors import error_context
from llava_bidir.common.files import write_files
from llava_bidir.common.identity import Identity, check_same_identity
from llava_bidir.common.processes import report_lost_results
from llava_bidir.common.runs import RESUME_ADVICE
from probes.site_probes import SiteProbes

from .least_squares import solve_values
from .objective import SiteProblem
from .refinement import solve_classes
from .solution import Solution
from .states import Targets

GPU_SHARE = 2 / 3  # of the free memory of a GPU, for the states of a site


@dataclass
class SiteFiles:
    """The sites that are solved, each in a file SITE.safetensors with the identity of its run.

    Args:
        folder: RUN/checkpoints.
        identity: Of this run.
    """

    folder: Path
    identity: Identity

    def save(self, site: str, solution: Solution) -> None:
        """Write the file of a site."""
        metadata = {"identity": json.dumps(self.identity)}
        write_files({self._path(site): (vars(solution), metadata)})

    def load(self, sites: list[str]) -> dict[str, Solution]:
        """Return the sites that a killed run has solved.

        Raises:
            UserError: A file is damaged, or belongs to a run of another identity.
        """
        solutions = {}
        for site in sites:
            path = self._path(site)
            if not path.is_file():
                continue
            with error_context(path):
                with safe_open(path, "pt") as file:
                    saved_identity = json.loads(file.metadata()["identity"])
                    # in memory of torch: products of tensors in a mapped file can differ in their last bits
                    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                solutions[site] = Solution(**tensors)
            check_same_identity(
                saved_identity, current=self.identity, source=str(path), advice=RESUME_ADVICE
            )
        return solutions

    def _path(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"


def solve_site(
    probes: SiteProbes,
    states_by_site: dict[str, Tensor],
    targets: Targets,
    strengths: list[float] | None,
    device: torch.device,
    site: str,
) -> Solution:
    """Return the probes of a site whose states were read."""
    states = states_by_site[site]
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if states.nbytes < GPU_SHARE * free_bytes:
            states = states.to(device)
    if probes.task.loss is None:
        return solve_values(
            states,
            equations=targets.prepared,
            grid=probes.mllm.grid,
            fold_of=targets.fold_of,
            strengths=strengths,
        )
    problem = SiteProblem(
        loss=probes.task.loss,
        states=states,
        masks=targets.prepared,
        fold_of=targets.fold_of,
        scored=targets.scored,
    )
    return solve_classes(problem, strengths)


def in_workers(
    work: Callable[[str], Any], sites: list[str], device: torch.device
) -> Iterable[tuple[str, Any]]:
    """Return an iterator over each site with the result of its work, on a CPU as many at a time as torch has threads.

    Each worker has one thread, so that the bits of a site do not depend on their number. They are processes, which
    share the memory of this one: threads would wait for Python's lock and be as slow as one. DataLoader ends them with
    this process, however it ends.
    """
    threads = threads_of(device)
    workers = 0
    start_method = None
    # one site alone, too, which has as many threads here: they would round differently
    if threads > 1 and sites:
        workers = min(threads, len(sites))
        start_method = "fork"
    results = DataLoader(
        sites,
        batch_size=None,
        collate_fn=work,
        num_workers=workers,
        multiprocessing_context=start_method,
        worker_init_fn=report_lost_results,
    )
    return zip(sites, results, strict=True)


def threads_of(device: torch.device) -> int:
    """Return how many sites are solved at a time."""
    if device.type == "cpu" and sys.platform == "linux":
        return torch.get_num_threads()
    return 1
