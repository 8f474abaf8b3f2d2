"""Solve probes of values, such as depth, by least squares from moments (`least_squares.py`).

One pass over the training split is all: the closed form is the optimum, and cross-validation follows from the moments.
Images come fold by fold. A killed run resumes from the moments that each process saves every ten minutes.

    RUN/checkpoints/moments_RANK.safetensors    "SITE/count" ... and "seen": the images that one process has added
"""

import time
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import all_reduce, broadcast, rank, rank_count, rank_zero_info
from probes.data.available_memory import available_memory
from probes.data.batches import group_by_size
from probes.data.samplers import fold_batches
from probes.ops.normal_equations import normal_equations
from probes.score.strengths import CLOSED_FORM

from .least_squares import LEAST_SQUARES_STRENGTHS, LeastSquaresMoments, solve_least_squares
from .moments import packed_size
from .solved_site import SolvedSite
from .solver import Solver, tensors_of
from .state_reader import follow

SAVE_SECONDS = 600  # between two files of moments


class LeastSquaresSolver(Solver):
    """Linear probes of least squares, for every strength of regularisation; see :class:`Solver`."""

    path_kind = CLOSED_FORM

    # ------------------------------------------------------------------------------------------------ pass
    def prepare_first_pass(self) -> list[list[int]]:
        """Read the moments that a killed run has left; return the images of this process that they lack, by fold."""
        self._check_memory()
        self.moments: dict[str, LeastSquaresMoments] = {}
        # images whose moments this process has
        self.added = torch.zeros(self.images, dtype=torch.bool)
        self.saved_at = time.monotonic()
        seen = self._resume() if self.checkpoints.resuming else self.added
        size = self.reader.data.rank_batch_size
        batches = fold_batches(self.fold_of, size, rank(), rank_count())
        left = ([i for i in batch if not seen[i]] for batch in batches)
        return [batch for batch in left if batch]

    def _check_memory(self) -> None:
        """State the memory of the moments.

        Raises:
            UserError: They do not fit.
        """
        folds = self.options.folds
        width = self.mllm.widths
        size = {
            site: 8 * folds * (packed_size(width[site]) + self.channels * width[site])
            for site in self.sites
        }
        tokens = self.mllm.grid[0] * self.mllm.grid[1]
        need = sum(size.values())
        batch = self.reader.data.rank_batch_size * tokens * self.mllm.model.dtype.itemsize
        free = available_memory() // self.reader.machine.processes_here
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free
        available = max(0, free - batch * sum(width[site] for site in self.sites))
        text = f"moments of {len(size)} sites in {folds} folds: {need / 1e9:.3g} GB per process"
        rank_zero_info(text)
        if need > 0.8 * available:
            advice = "choose fewer --folds or --model.sites"
            raise UserError(f"{text}, but {available / 1e9:.3g} GB are available; {advice}")

    def add(self, batch: dict[str, Any]) -> None:
        """Add a batch of one fold to the moments, and save them every ten minutes."""
        index = batch["index"].cpu()
        for images, target in group_by_size(batch["target"]):
            view = self.mllm.geometry.view(tuple(target.shape[1:3]))
            equations = normal_equations(self.probes.task.values(target), self.mllm.grid, view)
            for site, x in batch["states"].items():
                if site not in self.moments:
                    pivot = x.flatten(0, 1).float().mean(0)
                    self.moments[site] = LeastSquaresMoments.zeros(
                        pivot, self.options.folds, self.channels
                    )
                self.moments[site].add_images(
                    x[images], equations, self.mllm.grid, int(self.fold_of[index[0]])
                )
        self.added[index] = True
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            named = {
                f"{site}/{name}": x
                for site, m in self.moments.items()
                for name, x in vars(m).items()
            }
            self.checkpoints.save(f"moments_{rank()}.safetensors", named | {"seen": self.added})
            self.saved_at = time.monotonic()

    def _resume(self) -> Tensor:
        """Read all moments on the first process; return the images that they contain on every one, bool[N]."""
        seen = torch.zeros_like(self.added)
        names = self.checkpoints.names("moments_*.safetensors")
        found = [self.checkpoints.load(name) for name in names]
        for tensors in sorted(found, key=lambda tensors: -tensors["seen"].sum()):
            if not (tensors["seen"] & ~seen).any():
                continue  # contained in a larger file, whose process resumed before
            seen |= tensors["seen"]
            if rank() == 0:
                self._add_saved(tensors)
                self.added |= tensors["seen"]
        return seen

    def _add_saved(self, tensors: dict[str, Tensor]) -> None:
        for site in self.sites:
            if saved := tensors_of(site, tensors):
                moments = LeastSquaresMoments(
                    **{name: x.to(self.device) for name, x in saved.items()}
                )
                if site in self.moments:
                    moments.add(self.moments[site])
                self.moments[site] = moments

    # ------------------------------------------------------------------------------------------------ results
    def solve(self) -> dict[str, SolvedSite]:
        """Return the closed form of all sites."""
        solved = {}
        sites = self.sites
        for site in follow(sites, len(sites), "solving sites", hidden=rank() > 0):
            moments = self._sum_over_ranks(site)
            owner = self.owner_of(site)
            # in all processes: after an error in one, the others would wait for it
            moments.check_values()
            solved[site] = broadcast(self._solve(moments) if rank() == owner else None, owner)
        return solved

    def _sum_over_ranks(self, site: str) -> LeastSquaresMoments:
        """Return the moments of all processes' images; a process may have had none."""
        width = self.mllm.widths[site]
        folds = self.options.folds
        empty = LeastSquaresMoments.zeros(
            torch.zeros(width, device=self.device), folds, self.channels
        )
        moments = self.moments.pop(site, empty)
        moments.shift(broadcast(moments.pivot, 0).to(self.device))
        for total in moments.sums().values():
            all_reduce(total)
        return moments

    def _solve(self, moments: LeastSquaresMoments) -> SolvedSite:
        strengths = tuple(sorted(self.options.strengths or LEAST_SQUARES_STRENGTHS, reverse=True))
        solved = solve_least_squares(moments, strengths)
        return SolvedSite(
            strengths=torch.tensor(strengths, dtype=torch.float64),
            loss=solved.loss.cpu(),
            compared=torch.arange(len(strengths)),
            chosen=solved.loss.argmin().cpu(),
            solved=torch.arange(len(strengths)),
            mean=solved.mean.cpu(),
            scale=solved.scale.cpu(),
            weights=solved.weights.float().cpu(),
            bias=solved.bias.float().cpu(),
            certificates=torch.zeros(0, 2, dtype=torch.float64),
        )
