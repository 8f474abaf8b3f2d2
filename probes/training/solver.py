"""LightningModule that solves the probes of every site from moments, instead of training them for some epochs.

Pass 1 over the training split sums the moments of all sites (`moments.py`); the discriminants of all strengths follow
(`closed_form.py`). The loss is then minimised at some strengths, with further passes if the states do not fit into
memory (`optimum.py`). The strength of each site is chosen by cross-validation over folds of training images. The
validation split is scored last, along the whole path of strengths.

Legend: S sites, F folds, R strengths, P problems, B images, T tokens, d width, K classes.
"""

import signal
import time
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.data.available_memory import available_memory
from probes.data.batches import group_by_mask_size
from probes.data.samplers import Batches, assign_folds, fold_batches
from probes.models.random_init import MATCHES
from probes.ops.cross_entropy import soft_labels

from . import solver_progress
from .closed_form import STRENGTHS, ClosedForm, solve_moments
from .distributed import all_reduce, broadcast, rank, rank_count
from .frozen_probes import FrozenProbes
from .moments import Moments, packed_size
from .optimum import OPTIMUM_STRENGTHS, Problem
from .probe_path import PathMetric, ProbePath
from .probe_variants import ProbeVariant
from .refinement import Refinement, stack_points
from .state_sample import StateSample, centre

SAVE_SECONDS = 600  # between two files of moments
CLOSED_FORM, OPTIMUM = "closed_form", "optimum"


def spread(sites: list[str], count: int) -> list[str]:
    """Return at most `count` of the sites: the first two, and others at equal distances up to the last."""
    first, others = sites[:2], sites[2:]
    wanted = min(max(0, count - 2), len(others))
    return (first + [others[-1 - i * len(others) // wanted] for i in reversed(range(wanted))])[: max(0, count)]


class ProbeSolver(FrozenProbes):
    """Linear probes at the optimum, for every strength of regularisation; see :class:`FrozenProbes`.

    Args:
        mllm, num_classes, image_attention, untrained, match, draw, image_resize, dtype, prefix, sites, label_stride,
            seed: As for `ProbeModule`.
        passes: Most passes over the training split; 1 for the closed form alone.
        folds: F, folds of training images for the cross-validation; each has moments of its own.
        strengths: Strengths of the closed form, in (0, 1].
        optimum_strengths: Strengths at which the loss is minimised, in (0, 1].
        shrink_to: Target of the shrinkage: "diagonal", or "trace".
        sample_images: Training images whose states are kept in memory, for cross-validation and curvature; None for as
            many as fit into a quarter of the available memory.
    """

    def __init__(
        self,
        mllm: str,
        num_classes: int = 150,
        image_attention: str | None = None,
        untrained: list[str] | None = None,
        match: Literal[*MATCHES] = "none",
        draw: int = 0,
        image_resize: str = "squash",
        dtype: str = "auto",
        prefix: str | None = None,
        sites: list[str] | None = None,
        label_stride: int = 1,
        seed: int = 0,
        passes: int = 8,
        folds: int = 4,
        strengths: tuple[float, ...] = STRENGTHS,
        optimum_strengths: tuple[float, ...] = OPTIMUM_STRENGTHS,
        shrink_to: str = "diagonal",
        sample_images: int | None = None,
    ):
        super().__init__({None: ProbeVariant(feature_norm="batchnorm", seed=seed)})
        self.save_hyperparameters()
        self.passes = 0  # that are complete
        self.measuring = False  # the time of a pass, without solving
        self.resuming = False  # start from what a killed run has left
        self.fold_of: Tensor | None = None
        self.in_sample: Tensor | None = None  # bool[N]
        self.seen: Tensor | None = None  # bool[N], images whose moments a killed run has left
        self.added: Tensor | None = None  # bool[N], images whose moments this process has
        self.moments: dict[str, Moments] = {}
        self.paths: dict[str, ProbePath] = {}
        self.path_metrics: dict[str, PathMetric] = {}

    # ------------------------------------------------------------------------------------------------ passes
    def configure_model(self) -> None:
        """Load the MLLM; set the images of the next pass, fold by fold."""
        super().configure_model()
        data = self.trainer.datamodule
        if self.fold_of is None:
            training = data.splits["training"]
            self.fold_of = assign_folds(len(training), self.hparams.folds, self.hparams.seed, training.groups)
            self._check_memory()
            self.in_sample = self._choose_sample()
            self.seen, self.added = (torch.zeros(len(training), dtype=torch.bool) for _ in range(2))
            if self.resuming:
                self._resume()
        batches = fold_batches(self.fold_of, data.rank_batch_size, rank(), rank_count())
        if self.passes == 0:  # a resumed run still needs the states of the sample
            batches = [batch for batch in batches if (~self.seen | self.in_sample)[batch].any()]
        data.pass_batches = Batches(batches)

    def _check_memory(self) -> None:
        """State the memory of the moments.

        Raises:
            UserError: They do not fit; the message proposes sites that do.
        """
        folds, classes = self.hparams.folds, self.hparams.num_classes
        width = self.mllm.widths
        size = {site: 8 * folds * (packed_size(width[site]) + classes * width[site]) for site in self.sites}
        on_gpu = self.trainer.strategy.root_device.type == "cuda"  # where the module will be; it is not there yet
        available = torch.cuda.mem_get_info()[0] if on_gpu else available_memory() // max(1, self.trainer.num_devices)
        need, share = sum(size.values()), 0.8 * available
        text = f"moments of {len(size)} sites in {folds} folds: {need / 1e9:.3g} GB per process"
        rank_zero_info(text)
        if need > share:
            kept = spread(self.sites, int(share / max(size.values())))
            advice = f"fewer --folds, or fewer sites, e.g. --model.sites '[{', '.join(kept)}]'" if kept else "--folds 2"
            raise UserError(f"{text}, but {available / 1e9:.3g} GB are available; choose {advice}")

    def _choose_sample(self) -> Tensor:
        """Return the images whose states are kept, bool[N], the same number in each fold."""
        images, wanted = len(self.fold_of), self.hparams.sample_images
        tokens, itemsize = self.mllm.grid[0] * self.mllm.grid[1], self.mllm.model.dtype.itemsize
        per_image = tokens * itemsize * sum(self.mllm.widths[site] for site in self.sites)
        fit = int(available_memory() / 4 / per_image) * rank_count() // max(1, self.trainer.num_devices)
        images = torch.tensor(min(images, fit if wanted is None else wanted), device=self.trainer.strategy.root_device)
        per_fold = -(-int(broadcast(images, 0)) // self.hparams.folds)
        sample = torch.zeros(len(self.fold_of), dtype=torch.bool)
        for fold in range(self.hparams.folds):
            sample[(self.fold_of == fold).nonzero().flatten()[:per_fold]] = True
        return sample

    @property
    def checkpoints(self) -> Path:
        """Folder of the files from which a killed run goes on."""
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def _resume(self) -> None:
        """Read what a killed run has left: all moments on the first process, what they contain on every one."""
        found = [solver_progress.load(file, self.identity) for file in solver_progress.moment_files(self.checkpoints)]
        for tensors in sorted(found, key=lambda tensors: -tensors["seen"].sum()):
            if not (tensors["seen"] & ~self.seen).any():
                continue  # contained in a larger file, whose process resumed before
            self.seen |= tensors["seen"]
            if rank() == 0:
                device = self.trainer.strategy.root_device
                solver_progress.add_tensors(self.moments, tensors, self.sites, device)
                self.added |= tensors["seen"]

    def _save_moments(self) -> None:
        """Save the moments of this process."""
        file = self.checkpoints / f"moments_{rank()}.safetensors"
        solver_progress.save(file, solver_progress.moments_to_tensors(self.moments, self.added), self.identity)
        self.saved_at = time.monotonic()

    def on_predict_start(self) -> None:
        """Prepare the sums before the first pass."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a run at once, to be resumed; Lightning's waits for a pass
        if self.passes == 0:
            args = self.hparams
            self.sample = StateSample(self.mllm, args.label_stride, args.folds)
            self.refinement = Refinement(self.sample)
            self.saved_at = time.monotonic()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the moments in the first pass, to the gradients in later ones."""
        states, fold = self.states(batch), int(self.fold_of[batch["index"][0]])
        if self.passes == 0:
            self._add_moments(states, batch, fold)
        else:
            self.refinement.add_gradients(states, batch["target"], fold)

    def _add_moments(self, states: dict[str, Tensor], batch: dict[str, Any], fold: int) -> None:
        target, classes = batch["target"], self.hparams.num_classes
        labels = torch.empty(len(target), self.mllm.grid[0] * self.mllm.grid[1], classes, dtype=torch.float64)
        labels, index = labels.to(self.device), batch["index"].cpu()
        for images, masks in group_by_mask_size(target):
            labels[images] = soft_labels(masks, classes, self.mllm.grid, **self.sample.loss_options(masks))
        labels[self.seen[index].to(self.device)] = 0
        for site, x in states.items():
            x = x.flatten(0, 1)
            if site not in self.moments:
                self.moments[site] = Moments.zeros(x.float().mean(0), self.hparams.folds, classes)
            self.moments[site].update(x, labels.flatten(0, 1), fold)
        self.added[index[~self.seen[index]]] = True
        kept = self.in_sample[index].nonzero().flatten().tolist()
        if kept:
            masks = target[kept] if isinstance(target, Tensor) else [target[i] for i in kept]
            self.sample.add({site: x[kept] for site, x in states.items()}, masks, fold)
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save_moments()

    def on_predict_epoch_end(self) -> None:
        """Solve or refine the probes after a pass."""
        if self.measuring:
            return
        self.passes += 1
        if self.passes == 1:
            further = self.hparams.passes > 1
            if further and not self.whole:
                self._save_moments()
            for i, site in enumerate(self.sites):
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
        self._set_norm(site, whole)
        if args.passes > 1:
            self.refinement.problems[site] = [
                Problem(whole, strength, fold, solution)
                for strength in sorted(args.optimum_strengths, reverse=True)
                for fold, solution in zip(folds, solutions, strict=True)
            ]

    def _sum_over_ranks(self, site: str) -> Moments:
        """Return the moments of all processes' images; a process may have had none."""
        width, classes = self.mllm.widths[site], self.hparams.num_classes
        empty = Moments.zeros(torch.zeros(width, device=self.device), self.hparams.folds, classes)
        moments = self.moments.pop(site, empty)
        moments.shift(broadcast(moments.pivot.clone(), 0))
        for total in moments.sums().values():
            all_reduce(total)
        return moments

    def _set_norm(self, site: str, solution: ClosedForm) -> None:
        """Let the site's probe standardise states by the mean and the D of its discriminants."""
        norm = self.heads[site].norm
        norm.running_mean.copy_(solution.mean)
        norm.running_var.copy_(torch.where(solution.scale > 0, solution.scale.clamp(min=1e-30).pow(-2), 1))

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
        path = self.paths[OPTIMUM if self.refinement.problems else CLOSED_FORM]
        for site in self.sites:
            head, norm, best = self.heads[site].head, self.heads[site].norm, path.best(site)
            head.weight.copy_(path.weights[site][best] * (norm.running_var + norm.eps).sqrt())
            head.bias.copy_(path.bias[site][best])
        weakest = [site for site in self.sites if path.best(site) == 0 and len(path.strengths) > 1]
        if weakest:
            sites = ", ".join(weakest)
            rank_zero_info(f"the weakest strength, {path.strengths[0]:g}, was chosen at {sites}; consider weaker ones")
        self.sample.clear()

    def on_test_start(self) -> None:
        """Prepare the scores of the path."""
        images, classes = len(self.trainer.datamodule.splits["validation"]), self.hparams.num_classes
        for name, path in self.paths.items():
            metric = PathMetric(len(path.strengths) * len(self.sites), images, classes, self.mllm.geometry)
            self.path_metrics[name] = metric.to(self.device)

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        centred = {site: centre(x, self.heads[site].norm.running_mean) for site, x in states.items()}
        for name, path in self.paths.items():
            logits = path.logits(centred, self.mllm.grid)
            for images, masks in group_by_mask_size(batch["target"]):
                self.path_metrics[name].update(logits[:, images], masks, batch["index"][images])
        return super()._score(states, batch)

    def settings_of(self, variant: str | None) -> dict[str, Any]:
        """Return how the probes were solved, for metrics.json."""
        instrument = OPTIMUM if self.refinement.problems else CLOSED_FORM
        settings = {key: self.hparams[key] for key in ("seed", "folds", "shrink_to", "label_stride")}
        return {"head": "linear", "feature_norm": "batchnorm", "labels": "true", "solved": instrument} | settings

    def path_results(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors."""
        scores = {"passes": self.passes, "sample_images": int(self.in_sample.sum())}
        tensors = {}
        for name, path in self.paths.items():
            results = self.path_metrics[name].compute()
            scores[name] = path.to_json(results, self.sites)
            tensors |= path.tensors(results, name, len(self.sites))
        return scores, tensors
