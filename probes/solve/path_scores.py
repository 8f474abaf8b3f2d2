"""Scores of the probes of all strengths on the validation split, beside those of the chosen probes.

Legend: S sites, R strengths that were solved, P probes, N images of a dataset, B of a batch, T tokens, d width,
K channels of a probe.
"""

import math
from typing import Any

import torch
from torch import Tensor

from probes.data.batches import group_by_size
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.score.image_metrics import TaskMetric
from probes.score.resampling import dataset_scores
from probes.site_probes import SiteProbes
from probes.tasks import SEGMENTATION, TASKS

from .solution import Solution

COUNTED = ("intersection", "predicted")  # counts of a probe, per image and class
SCORE_BYTES = 2**30  # of logits at a time when the path is scored; a batch of 64 at 7B has 19 GB


class PathMetric(TaskMetric):
    """Counts per image of the classes by some probes.

    Args:
        counted: Probes whose predictions are counted, by index; the others are counted elsewhere.
        images, geometry: As for `TaskMetric`.
    """

    def __init__(
        self,
        counted: list[int],
        images: int,
        geometry: Geometry,
    ):
        super().__init__(TASKS[SEGMENTATION], images, geometry, COUNTED)
        self.counted = counted

    def update(
        self,
        logits: Tensor,
        target: Tensor,
        index: Tensor,
    ) -> None:
        """Add images: `logits` f[P, B, K, h, w], `target` uint8[B, H, W], `index` i64[B]."""
        view = self.geometry.view(tuple(target.shape[-2:]))
        counts = count(logits[self.counted], target, view, by_token=False)
        self.add(index, {name: getattr(counts, name).to(torch.int32) for name in COUNTED})


class PathScores:
    """Scores of the probes of all strengths; those of classes that were chosen are counted with the run's own scores.

    Args:
        probes: The probes of the run, with the chosen strength of each site.
        solved: What was solved, by site.
        images: Size of the validation split.
    """

    def __init__(
        self,
        probes: SiteProbes,
        solved: dict[str, Solution],
        images: int,
    ):
        self.probes = probes
        self.solved = solved
        sites = list(solved)
        self.rows = len(solved[sites[0]].solved)  # R, the same at all sites
        # index of each site's chosen probe among the probes of all strengths, strength by strength
        self.chosen = [solved[site].row * len(sites) + i for i, site in enumerate(sites)]
        metric = probes.new_metric(images)
        if probes.task.name == SEGMENTATION:
            others = [i for i in range(self.rows * len(sites)) if i not in self.chosen]
            metric = PathMetric(others, images, probes.mllm.geometry)
        self.metric = metric

    def add(self, states: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """Add a batch of validation images with their states f[B, T, d] by site."""
        grid = self.probes.mllm.grid
        numbers = self.rows * len(self.solved) * self.probes.channels * math.prod(grid)
        size = max(1, SCORE_BYTES // (4 * numbers))
        for start in range(0, len(batch["index"]), size):
            part = slice(start, start + size)
            index = batch["index"][part]
            logits = torch.stack(
                [solved.logits(states[site][part], grid) for site, solved in self.solved.items()]
            )
            logits = logits.transpose(0, 1).flatten(0, 1)  # [R * S, B, K, h, w]
            for images, target in group_by_size(batch["target"][part]):
                self.metric.update(logits[:, images], target, index[images])

    def results(self, counted: dict[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return the sites' entries of metrics.json["path"], and what is counted at their strengths, [R, S, ...].

        Args:
            counted: What the task counts of the chosen probes.
        """
        task = self.probes.task
        tensors = self.metric.compute()
        loss_name = "cv_loss"
        if task.name == SEGMENTATION:
            loss_name = "cv_cross_entropy"
            for name in COUNTED:
                tensors[name] = self._merge(tensors[name], counted[name]).int()
        scores = dataset_scores(task, task.sums(counted | tensors))
        entries = []
        for i, (site, solved) in enumerate(self.solved.items()):
            of_site = {name: self._by_site(x)[:, i].tolist() for name, x in scores.items()}
            entries.append(solved.entry(site, of_site, loss_name))
        return entries, {name: self._by_site(x).contiguous() for name, x in tensors.items()}

    def _merge(self, others: Tensor, chosen: Tensor) -> Tensor:
        """Return counts of all probes [R * S, N, K] from those of the chosen ones [S, N, K] and of all others."""
        merged = others.new_empty(self.rows * len(self.solved), *others.shape[1:])
        merged[self.metric.counted] = others
        merged[self.chosen] = chosen
        return merged

    def _by_site(self, x: Tensor) -> Tensor:
        """Return [R * S, ...] as [R, S, ...]."""
        return x.unflatten(0, (-1, len(self.solved)))
