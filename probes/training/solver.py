"""LightningModule that solves probes of classes from moments, instead of training them for some epochs.

Pass 1 over the training split sums the moments of all sites (`moment_solver.py`); the discriminants of all strengths
follow (`closed_form.py`). The loss is then minimised at some strengths, with further passes if the states do not fit
into memory (`optimum.py`). The strength of each site is chosen by cross-validation over folds of training images. The
validation split is scored last, along the whole path of strengths.

Legend: S sites, F folds, R strengths, P problems, B images, T tokens, d width, K classes.
"""

from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from probes.data.available_memory import available_memory
from probes.data.batches import group_by_mask_size
from probes.ops.cross_entropy import soft_labels

from . import solver_progress
from .closed_form import ClosedForm, solve_moments
from .distributed import broadcast, rank, rank_count
from .moment_solver import CLOSED_FORM, MomentSolver
from .optimum import OPTIMUM_STRENGTHS, Problem
from .probe_path import ProbePath
from .refinement import Refinement, stack_points
from .state_sample import StateSample

OPTIMUM = "optimum"


class ProbeSolver(MomentSolver):
    """Linear probes at the optimum, for every strength of regularisation; see :class:`MomentSolver`.

    Args:
        passes: Most passes over the training split; 1 for the closed form alone.
        optimum_strengths: Strengths at which the loss is minimised, in (0, 1].
        sample_images: Training images whose states are kept in memory, for cross-validation and curvature; None for as
            many as fit into a quarter of the available memory.
        shared: Arguments of `MomentSolver`.
    """

    def __init__(
        self,
        passes: int = 8,
        optimum_strengths: tuple[float, ...] = OPTIMUM_STRENGTHS,
        sample_images: int | None = None,
        **shared: Any,
    ):
        super().__init__(**shared)

    # ------------------------------------------------------------------------------------------------ passes
    def _choose_sample(self) -> Tensor:
        """Return the images whose states are kept, bool[N], the same number in each fold."""
        images, wanted = len(self.fold_of), self.hparams.sample_images
        tokens, itemsize = self.mllm.grid[0] * self.mllm.grid[1], self.mllm.model.dtype.itemsize
        per_image = tokens * itemsize * sum(self.mllm.widths[site] for site in self.sites)
        fit = int(available_memory() / 4 / per_image) * rank_count() // max(1, self.trainer.num_devices)
        fit = max(fit, self.hparams.folds)  # without an image of each fold, no strength could be chosen
        images = torch.tensor(min(images, fit if wanted is None else wanted), device=self.trainer.strategy.root_device)
        chosen = int(broadcast(images, 0))
        if chosen == len(self.fold_of):  # folds of groups differ in size
            return torch.ones(chosen, dtype=torch.bool)
        per_fold = -(-chosen // self.hparams.folds)
        sample = torch.zeros(len(self.fold_of), dtype=torch.bool)
        for fold in range(self.hparams.folds):
            sample[(self.fold_of == fold).nonzero().flatten()[:per_fold]] = True
        return sample

    def on_predict_start(self) -> None:
        """Prepare the sums before the first pass."""
        super().on_predict_start()
        if self.passes == 0:
            self.sample = StateSample(self.mllm, self.hparams.label_stride, self.hparams.folds)
            self.refinement = Refinement(self.sample)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the moments in the first pass, to the gradients in later ones."""
        if self.passes == 0:
            super().predict_step(batch, batch_idx)
        else:
            self.refinement.add_gradients(self.states(batch), batch["target"], self._fold(batch))

    def _add_images(self, states: dict[str, Tensor], batch: dict[str, Any], fold: int) -> None:
        target, classes = batch["target"], self.hparams.num_classes
        labels = torch.empty(len(target), self.mllm.grid[0] * self.mllm.grid[1], classes, dtype=torch.float64)
        labels, index = labels.to(self.device), batch["index"].cpu()
        for images, masks in group_by_mask_size(target):
            labels[images] = soft_labels(masks, classes, self.mllm.grid, **self.loss_options(masks))
        labels[self.seen[index].to(self.device)] = 0
        for site, x in states.items():
            self.moments[site].update(x.flatten(0, 1), labels.flatten(0, 1), fold)
        kept = self.in_sample[index].nonzero().flatten().tolist()
        if kept:
            masks = target[kept] if isinstance(target, Tensor) else [target[i] for i in kept]
            self.sample.add({site: x[kept] for site, x in states.items()}, masks, fold)

    def on_predict_epoch_end(self) -> None:
        """Solve or refine the probes after a pass."""
        if self.measuring:
            return
        self.passes += 1
        if self.passes == 1:
            further = self.hparams.passes > 1
            if further and not self.whole:
                self._save_moments()
            for i, site in enumerate(self.solving(self.sites)):
                self._solve(i, site)
            points = self.checkpoints / solver_progress.POINTS
            if self.resuming and points.is_file():
                tensors = solver_progress.load(points, self.identity)
                self.passes = solver_progress.set_points(self.refinement.problems, tensors)
            elif further:
                self.refinement.refine(self.whole)
        else:
            self.refinement.set_gradients()
            self.refinement.refine(self.whole, last=self.passes == self.hparams.passes)
            if rank() == 0:
                points = solver_progress.points_to_tensors(self.refinement.problems, self.passes)
                solver_progress.save(self.checkpoints / solver_progress.POINTS, points, self.identity)
        if self.finished:
            self._choose()

    @property
    def whole(self) -> bool:
        """The sample is the whole training split."""
        return bool(self.in_sample.all())

    @property
    def finished(self) -> bool:
        """No further pass is needed or allowed."""
        if self.passes == 0:
            return False
        return self.whole or self.passes == self.hparams.passes or self.refinement.converged

    # ------------------------------------------------------------------------------------------------ closed form
    def _solve(self, number: int, site: str) -> None:
        """Compute the path of closed-form probes of a site, and the problems of its optimum."""
        args, moments = self.hparams, self._sum_over_ranks(site)
        owner = number % rank_count()
        folds = [None, *range(args.folds)]
        if rank() == owner:
            solutions = [solve_moments(*moments.without(fold), moments.pivot, args.shrink_to) for fold in folds]
        else:
            solutions = [ClosedForm.empty(moments.pivot, args.num_classes) for _ in folds]
        for solution in solutions:
            for part in fields(solution):
                broadcast(getattr(solution, part.name), owner)
        whole, *held_out = solutions
        path = self.paths.setdefault(CLOSED_FORM, ProbePath(tuple(args.strengths)))
        path.weights[site], path.bias[site] = whole.path(path.strengths)
        path.loss[site] = self.sample.held_out_loss(site, [(s.mean, *s.path(path.strengths)) for s in held_out])
        self._set_norm(site, whole.mean, whole.scale)
        if args.passes > 1:
            self.refinement.problems[site] = [
                Problem(whole, strength, fold, solution)
                for strength in sorted(args.optimum_strengths, reverse=True)
                for fold, solution in zip(folds, solutions, strict=True)
            ]

    # ------------------------------------------------------------------------------------------------ results
    def _choose(self) -> None:
        """Collect the path of the optimum, and give each site the probe of its best strength."""
        if self.refinement.problems:
            path = ProbePath(tuple(sorted(self.hparams.optimum_strengths)))
            for site, problems in self.refinement.problems.items():
                by_fold = {
                    fold: sorted((p for p in problems if p.fold == fold), key=attrgetter("strength"))
                    for fold in {p.fold for p in problems}
                }
                stacked = {fold: stack_points(group) for fold, group in by_fold.items()}
                path.weights[site], path.bias[site] = stacked.pop(None)
                held_out = [(problems[0].space.mean, *stacked[fold]) for fold in range(self.hparams.folds)]
                path.loss[site] = self.sample.held_out_loss(site, held_out)
                path.certificates[site] = [problem.certificate for problem in by_fold[None]]
            self.paths[OPTIMUM] = path
        self._set_probes(self.paths[self.instrument])
        self.sample.clear()

    @property
    def instrument(self) -> str:
        """Name of the path from which the probes are taken."""
        return OPTIMUM if self.refinement.problems else CLOSED_FORM
