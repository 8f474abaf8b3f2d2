"""LightningModule of probes that are solved instead of trained for some epochs: passes over the images, then scores.

A pass is `trainer.predict`. The subclass says what it does with the states of a batch and what follows at the end:
`optimum_solver.py` for classes, `least_squares_solver.py` for values. The validation split is scored last.

Legend: S sites, R strengths that were solved, B images, T tokens, d width, K channels of a probe.
"""

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from probes.data.batches import MaskPreparer, group_by_mask_size
from probes.data.samplers import Batches
from probes.evaluation.bootstrap import dataset_scores, task_scores
from probes.evaluation.metrics import Counts
from probes.evaluation.task_metric import TaskMetric, TaskSums
from probes.ops.cross_entropy import TIGHT_NODES

from .frozen_probes import FrozenProbes
from .probe_path import PathMetric, SolvedSite

COUNTED = ("intersection", "predicted")  # counts of a probe, per image and class
SCORE_BYTES = 2**30  # of logits at a time when the path is scored; a batch of 64 at 7B has 19 GB


class Solver(FrozenProbes):
    """Linear probes at every site, for several strengths of regularisation; see :class:`FrozenProbes`.

    Args:
        folds: F, folds of training images for the cross-validation.
        strengths: Strengths to solve, above 0.
        shared: Settings of `ProbeModule`, those that `solve.SHARED` names.
    """

    instrument: str  # name of the probes' path in metrics.json

    def __init__(self, folds: int = 4, strengths: tuple[float, ...] | None = None, **shared: Any):
        super().__init__(feature_norm="batchnorm")
        self.save_hyperparameters()  # those of subclasses, too
        self.passes = 0  # that are complete
        self.measuring = False  # the time of a pass, without solving
        self.resuming = False  # start from the files of a killed run
        self.solved: dict[str, SolvedSite] = {}

    # ------------------------------------------------------------------------------------------------ passes
    def build(self) -> None:
        """Load the MLLM; set the images of the next pass."""
        first = self.mllm is None
        super().build()
        if first:
            self.start()
        self.trainer.datamodule.pass_batches = Batches(self.batches())

    def start(self) -> None:
        """Prepare the first pass."""
        raise NotImplementedError

    def batches(self) -> list[list[int]]:
        """Return this process's images of the next pass, in batches."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """No further pass is needed or allowed."""
        return self.passes > 0

    @property
    def checkpoints(self) -> Path:
        """Folder of the files from which a killed run resumes."""
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def on_predict_start(self) -> None:
        """Let SIGTERM end the run at once, to be resumed; Lightning would wait for the end of the pass."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # ------------------------------------------------------------------------------------------------ results
    def set_probes(self) -> None:
        """Give each site the probe of its chosen strength."""
        for site, solved in self.solved.items():
            head, norm, row = self.heads[site].head, self.heads[site].norm, solved.row
            norm.running_mean.copy_(solved.mean)
            norm.running_var.copy_(torch.where(solved.scale > 0, solved.scale.clamp(min=1e-30).pow(-2), 1))
            head.weight.copy_(solved.weights[row].to(head.weight) * (norm.running_var + norm.eps).sqrt())
            head.bias.copy_(solved.bias[row])

    def on_test_start(self) -> None:
        """Prepare the scores of the path."""
        images, geometry = len(self.trainer.datamodule.splits["validation"]), self.mllm.geometry
        if self.task:
            metric = TaskMetric(self.task, images, geometry)
        else:  # the chosen probes are counted with the scores of the run
            counted = [i for i in range(self.rows * len(self.sites)) if i not in self._chosen()]
            metric = PathMetric(counted, images, self.channels, geometry)
        self.path_metric = metric.to(self.device)

    @property
    def rows(self) -> int:
        """R, the same at all sites."""
        return len(self.solved[self.sites[0]].solved)

    def _chosen(self) -> list[int]:
        """Return the index of each site's chosen probe among the probes of all strengths, strength by strength."""
        return [self.solved[site].row * len(self.sites) + i for i, site in enumerate(self.sites)]

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        for part in self._parts(len(batch["index"])):
            index = batch["index"][part]
            logits = torch.stack([self.solved[site].logits(states[site][part], self.mllm.grid) for site in self.sites])
            logits = logits.transpose(0, 1).flatten(0, 1)  # [R * S, B, K, h, w]
            for images, target in group_by_mask_size(batch["target"][part]):
                masks = () if self.task else (MaskPreparer(self.mllm.geometry, self.channels, TIGHT_NODES)(target),)
                self.path_metric.update(logits[:, images], target, index[images], *masks)
        return super()._score(states, batch)

    def _parts(self, images: int) -> list[slice]:
        """Return parts of a batch that have at most `SCORE_BYTES` of logits, or one image each."""
        probes = sum(len(solved.solved) for solved in self.solved.values())
        size = max(1, SCORE_BYTES // (4 * probes * self.channels * self.mllm.grid[0] * self.mllm.grid[1]))
        return [slice(start, start + size) for start in range(0, images, size)]

    def probe_settings(self) -> dict[str, Any]:
        """Return how the probes were solved, for metrics.json."""
        settings = {key: self.hparams[key] for key in ("seed", "folds")}
        return {"head": "linear", "feature_norm": "batchnorm", "labels": "true", "solved": self.instrument} | settings

    def path_results(self, counts: Counts | TaskSums) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors, from the scores of the chosen probes."""
        by_site = lambda x: x.unflatten(0, (-1, len(self.sites)))
        loss_name = "cv_loss" if self.task else "cv_cross_entropy"
        if self.task:
            sums = self.path_metric.compute().sums
            scores, tensors = task_scores(self.task, sums), {"sums": sums}
        else:
            others, loss = self.path_metric.compute()
            both = {name: self._merge(getattr(others, name), getattr(counts, name)) for name in COUNTED}
            score = dataset_scores(counts._replace(**both))
            scores = {"miou": score.miou, "pacc": score.pacc, "cross_entropy": loss.sum(1) / counts.labelled.sum()}
            tensors = {name: x.int() for name, x in both.items()} | {"cross_entropy": loss}
        sites = [
            solved.entry(site, {name: by_site(x)[:, i].tolist() for name, x in scores.items()}, loss_name)
            for i, (site, solved) in enumerate(self.solved.items())
        ]
        path = {"passes": self.passes, self.instrument: {"sites": sites}}
        return path, {f"{self.instrument}/{name}": by_site(x).contiguous() for name, x in tensors.items()}

    def _merge(self, others: Tensor, chosen: Tensor) -> Tensor:
        """Return counts of all probes [R * S, N, K] from those of the chosen ones [S, N, K] and of all others."""
        merged = others.new_empty(self.rows * len(self.sites), *others.shape[1:])
        merged[self.path_metric.counted], merged[self._chosen()] = others, chosen.to(others)
        return merged

    def report_limits(self) -> None:
        """Say at which sites the lowest loss is at the end of the strengths that were tried."""
        for site, solved in self.solved.items():
            strengths, lowest = solved.strengths.tolist(), int(solved.loss.argmin())
            if len(strengths) > 1 and lowest in (0, len(strengths) - 1):
                end, why = ("strongest", "the states tell little") if lowest == 0 else ("weakest", "more would be used")
                rank_zero_info(
                    f"{site}: the cross-validated loss is lowest at the {end} strength, {strengths[lowest]:g}: {why}; "
                    f"the probe has {strengths[int(solved.chosen)]:g}"
                )
