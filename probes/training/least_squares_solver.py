"""LightningModule that solves probes of values, such as depth, by least squares from moments (`least_squares.py`).

One pass over the training split is all: the closed form is the optimum, and cross-validation follows from the moments.
Images come fold by fold. A killed run resumes from the moments that each process saves every ten minutes.

    RUN/checkpoints/moments_RANK.safetensors    "SITE/count" ... and "seen": the images that one process has added
"""

import time
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from probes.data.available_memory import available_memory
from probes.data.batches import group_by_mask_size
from probes.data.samplers import assign_folds, fold_batches
from probes.ops.normal_equations import normal_equations

from . import solver_progress
from .closed_form import STRENGTHS
from .distributed import all_reduce, broadcast, rank, rank_count
from .least_squares import LeastSquaresMoments, solve_least_squares
from .moments import packed_size
from .probe_path import SolvedSite
from .solver import Solver

SAVE_SECONDS = 600  # between two files of moments


class LeastSquaresSolver(Solver):
    """Linear probes of least squares, for every strength of regularisation; see :class:`Solver`."""

    instrument = "closed_form"

    def start(self) -> None:
        """Prepare the moments, or read those that a killed run has left."""
        training = self.trainer.datamodule.splits["training"]
        self.fold_of = assign_folds(len(training), self.hparams.folds, training.groups)
        self._check_memory()
        self.moments: dict[str, LeastSquaresMoments] = {}
        # images whose moments a killed run has left, and those whose moments this process has
        self.seen, self.added = (torch.zeros(len(training), dtype=torch.bool) for _ in range(2))
        if self.resuming:
            self._resume()

    def batches(self) -> list[list[int]]:
        """Return the images of this process whose moments are missing, fold by fold."""
        batches = fold_batches(self.fold_of, self.trainer.datamodule.rank_batch_size, rank(), rank_count())
        left = [batch for batch in batches if (~self.seen)[batch].any()]
        return left or batches[:1]  # Lightning skips a pass without batches, and with it what follows the pass

    def _check_memory(self) -> None:
        """State the memory of the moments.

        Raises:
            UserError: They do not fit; the message proposes sites that do.
        """
        folds, width = self.hparams.folds, self.mllm.widths
        size = {site: 8 * folds * (packed_size(width[site]) + self.channels * width[site]) for site in self.sites}
        available, need = self._available_memory(), sum(size.values())
        text = f"moments of {len(size)} sites in {folds} folds: {need / 1e9:.3g} GB per process"
        rank_zero_info(text)
        if need > 0.8 * available:
            kept = spread(self.sites, int(0.8 * available / max(size.values())))
            advice = f"fewer --folds, or fewer sites, e.g. --model.sites '[{', '.join(kept)}]'" if kept else "--folds 2"
            raise UserError(f"{text}, but {available / 1e9:.3g} GB are available; choose {advice}")

    def _available_memory(self) -> int:
        """Return the bytes that are left for moments beside the model and the states of a batch."""
        device, tokens = self.trainer.strategy.root_device, self.mllm.grid[0] * self.mllm.grid[1]
        available = available_memory() // max(1, self.trainer.num_devices)
        if device.type == "cuda":
            elsewhere = [x for x in (*self.mllm.parameters(), *self.mllm.buffers()) if x.device != device]
            available = torch.cuda.mem_get_info(device)[0] - sum(x.nbytes for x in elsewhere)  # which will be there
        per_image = tokens * self.mllm.model.dtype.itemsize * sum(self.mllm.widths[site] for site in self.sites)
        return max(0, available - self.trainer.datamodule.rank_batch_size * per_image)

    # ------------------------------------------------------------------------------------------------ pass
    def _resume(self) -> None:
        """Read what a killed run has left: all moments on the first process, what they contain on every one."""
        files = sorted(self.checkpoints.glob("moments_*.safetensors"))
        found = [solver_progress.load(file, self.identity) for file in files]
        for tensors in sorted(found, key=lambda tensors: -tensors["seen"].sum()):
            if not (tensors["seen"] & ~self.seen).any():
                continue  # contained in a larger file, whose process resumed before
            self.seen |= tensors["seen"]
            if rank() == 0:
                self._add_saved(tensors)
                self.added |= tensors["seen"]

    def _add_saved(self, tensors: dict[str, Tensor]) -> None:
        device = self.trainer.strategy.root_device
        for site in self.sites:
            if f"{site}/pivot" in tensors:
                saved = {field.name: tensors[f"{site}/{field.name}"] for field in fields(LeastSquaresMoments)}
                moments = LeastSquaresMoments(**{name: x.to(device) for name, x in saved.items()})
                if site in self.moments:
                    moments.add(self.moments[site])
                self.moments[site] = moments

    def _save_moments(self) -> None:
        """Save the moments of this process."""
        named = {f"{site}/{f.name}": getattr(m, f.name) for site, m in self.moments.items() for f in fields(m)}
        file = self.checkpoints / f"moments_{rank()}.safetensors"
        solver_progress.save(file, named | {"seen": self.added}, self.identity)
        self.saved_at = time.monotonic()

    def on_predict_start(self) -> None:
        """Start the clock of the files of moments."""
        super().on_predict_start()
        self.saved_at = time.monotonic()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch of one fold to the moments; images that a killed run has left count for nothing."""
        states, index = self.states(batch), batch["index"].cpu()
        fold, seen = int(self.fold_of[index[0]]), self.seen[index].to(self.device)
        for images, target in group_by_mask_size(batch["target"]):
            values = self.task.values(target).masked_fill(seen[images][:, None, None, None], torch.nan)
            view = self.mllm.geometry.view(tuple(target.shape[1:3]))
            equations = normal_equations(values, self.mllm.grid, view)
            for site, x in states.items():
                if site not in self.moments:
                    pivot = x.flatten(0, 1).float().mean(0)
                    self.moments[site] = LeastSquaresMoments.zeros(pivot, self.hparams.folds, self.channels)
                self.moments[site].add_images(x[images], equations, self.mllm.grid, fold)
        self.added[index[~self.seen[index]]] = True
        if not self.measuring and time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save_moments()

    # ------------------------------------------------------------------------------------------------ results
    def on_predict_epoch_end(self) -> None:
        """Solve the probes after the pass."""
        if self.measuring:
            return
        self.passes = 1
        for number, site in enumerate(tqdm(self.sites, desc="solving sites", disable=rank() > 0, mininterval=5)):
            moments, owner = self._sum_over_ranks(site), number % rank_count()
            moments.check_values()  # in all processes: after an error in one, the others would wait for it
            self.solved[site] = broadcast(self._solve(moments) if rank() == owner else None, owner)
        self.set_probes()
        self.report_limits()

    def _sum_over_ranks(self, site: str) -> LeastSquaresMoments:
        """Return the moments of all processes' images; a process may have had none."""
        width, folds = self.mllm.widths[site], self.hparams.folds
        empty = LeastSquaresMoments.zeros(torch.zeros(width, device=self.device), folds, self.channels)
        moments = self.moments.pop(site, empty)
        moments.shift(broadcast(moments.pivot, 0).to(self.device))
        for total in moments.sums().values():
            all_reduce(total)
        return moments

    def _solve(self, moments: LeastSquaresMoments) -> SolvedSite:
        strengths = tuple(sorted(self.hparams.strengths or STRENGTHS, reverse=True))
        solved = solve_least_squares(moments, strengths)
        return SolvedSite(
            strengths=torch.tensor(strengths, dtype=torch.float64),
            loss=solved.loss.cpu(),
            chosen=solved.loss.argmin().cpu(),
            solved=torch.arange(len(strengths)),
            mean=solved.mean.cpu(),
            scale=solved.scale.cpu(),
            weights=solved.weights.float().cpu(),
            bias=solved.bias.float().cpu(),
            certificates=torch.zeros(0, 2, dtype=torch.float64),
        )


def spread(sites: list[str], count: int) -> list[str]:
    """Return at most `count` of the sites: the first two, and others at equal distances up to the last."""
    first, others = sites[:2], sites[2:]
    wanted = min(max(0, count - 2), len(others))
    return (first + [others[-1 - i * len(others) // wanted] for i in reversed(range(wanted))])[: max(0, count)]
