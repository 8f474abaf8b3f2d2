"""LightningModule that solves probes of values, such as depth, by least squares from moments (`least_squares.py`).

One pass over the training split is all: the closed form is the optimum, and cross-validation follows from the moments.

Legend: R strengths, B images, d width, K channels.
"""

from typing import Any

import torch
from torch import Tensor

from probes.data.batches import group_by_mask_size
from probes.ops.normal_equations import normal_equations

from .distributed import broadcast, rank, rank_count
from .least_squares import LeastSquares, LeastSquaresMoments, solve_least_squares
from .moment_solver import CLOSED_FORM, MomentSolver
from .probe_path import ProbePath


class LeastSquaresSolver(MomentSolver):
    """Linear probes of least squares, for every strength of regularisation; see :class:`MomentSolver`."""

    kind = LeastSquaresMoments

    def _add_images(self, states: dict[str, Tensor], batch: dict[str, Any], fold: int) -> None:
        seen = self.seen[batch["index"].cpu()].to(self.device)
        for images, target in group_by_mask_size(batch["target"]):
            values = self.task.values(target).masked_fill(seen[images][:, None, None, None], torch.nan)
            equations = normal_equations(values, self.mllm.grid, **self.loss_options(target))
            for site, x in states.items():
                self.moments[site].add_images(x[images], equations, self.mllm.grid, fold)

    def on_predict_epoch_end(self) -> None:
        """Solve the probes after the pass."""
        if self.measuring:
            return
        self.passes = 1
        path = self.paths[CLOSED_FORM] = ProbePath(tuple(self.hparams.strengths))
        for number, site in enumerate(self.solving(self.sites)):
            solution = self._solve(number, site)
            path.weights[site], path.bias[site] = solution.weights.float(), solution.bias.float()
            path.loss[site] = solution.loss.cpu()
            self._set_norm(site, solution.mean, solution.scale)
        self._set_probes(path)

    def _solve(self, number: int, site: str) -> LeastSquares:
        """Return the probes of a site, which one process solves for all."""
        args, moments, owner = self.hparams, self._sum_over_ranks(site), number % rank_count()
        moments.check_values()  # in all processes: after an error in one, the others would wait for it
        if rank() == owner:
            solution = solve_least_squares(moments, args.strengths, args.shrink_to)
        else:
            solution = LeastSquares.empty(moments.pivot, len(args.strengths), self.channels)
        return LeastSquares(*(broadcast(part.contiguous(), owner) for part in solution))
