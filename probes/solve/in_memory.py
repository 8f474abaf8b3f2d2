"""Solve linear probes of classes with the states of all training images in memory.

The first pass keeps the states; then each site is solved by one process, on a CPU by one thread.

    RUN/checkpoints/SITE.safetensors      a solved site
"""

from typing import Any

import torch

from llava_bidir.common.processes import all_gather_objects, broadcast, rank_zero_info
from probes.data.batches import MaskPreparer
from probes.ops.quadrature import join_masks
from probes.score.strengths import OPTIMUM

from .held_out import scored_masks
from .objective import LOOSE_NODES, SiteProblem
from .refinement import solve_site
from .solved_site import SolvedSite
from .solver import Solver, in_workers


class MemorySolver(Solver):
    """Linear probes of classes at the optimum of the loss of images in memory; see :class:`Solver`."""

    path_kind = OPTIMUM

    def prepare_first_pass(self) -> list[list[int]]:
        """Return all of this process's images."""
        return self.reader.share(range(self.images))

    def memory(self) -> str:
        """Return that the states of all images fit, and the memory that they take."""
        kept = self.images * self.mllm.state_bytes(self.sites)
        return f"the states of all {self.images:,} images are kept: {kept / 1e9:.3g} GB, one pass"

    def add(self, batch: dict[str, Any]) -> None:
        """Keep the states and masks of a batch."""
        prepare = MaskPreparer(self.mllm.geometry, self.channels, LOOSE_NODES)
        loose = prepare(batch["target"], batch["masks"]).to("cpu")
        states = {site: x.cpu() for site, x in batch["states"].items()}
        self.kept.append((batch["index"].cpu(), states, loose, batch["masks"].to("cpu")))

    def solve(self) -> dict[str, SolvedSite]:
        """Solve the sites of this process, several at a time; a site that a killed run has solved is read."""
        self._gather()
        file = "{}.safetensors".format
        saved = broadcast([site for site in self.sites if self.checkpoints.has(file(site))], 0)
        solved = {site: SolvedSite(**self.checkpoints.load(file(site))) for site in saved}
        if saved:
            rank_zero_info(f"{len(saved)} of {len(self.sites)} sites were solved before")
        mine = [site for site in self.sample_states if site not in saved]
        for site, found in in_workers(self._solve_site, mine, self.device):
            solved[site] = found
            self.checkpoints.save(file(site), vars(found))
            del self.sample_states[site]
        return self.share_solved(solved)

    def about(self) -> dict[str, Any]:
        """Return what metrics.json["path"] says of the passes."""
        return super().about() | {"sample_images": self.images}

    def _gather(self) -> None:
        """Bring the states of each site to its owner, and the masks to all processes, in the order of the images."""
        index, states, *masks = zip(*self.kept, strict=True)
        self.kept = []
        parts = all_gather_objects((torch.cat(index), *map(join_masks, masks)))
        counts = [len(index) for index, _, _ in parts]
        order = torch.cat([index for index, _, _ in parts]).argsort()
        self.loose = join_masks([part[1] for part in parts])[order.tolist()]
        self.tight = join_masks([part[2] for part in parts])[order.tolist()]
        self.scored = scored_masks(
            self.tight, self.fold_of, self.reader.training_target, self.reader.prepare_masks
        )
        self.gather_states(states, counts, order)

    def _solve_site(self, site: str) -> SolvedSite:
        states = self.sample_states[site].to(self.device)
        loose = self.loose.to(self.device)
        tight = self.tight.to(self.device)
        scored = None if self.scored is None else self.scored.to(self.device)
        problem = SiteProblem(
            self.loss,
            states,
            loose,
            tight,
            self.fold_of,
            scored,
        )
        path, refinement = solve_site(problem, self.options.strengths)
        return SolvedSite.of_points(
            path,
            problem.space,
            refinement.accepted.points,
            refinement.certificates,
        )
