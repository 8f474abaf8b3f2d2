"""What a task counts over the images of a dataset, each image once, by batches and processes.

Legend: P probes, N images of the dataset, B images of a batch, K channels of a probe, h w token grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.processes import all_gather_objects
from probes.data.batches import group_by_size
from probes.ops.geometry import Geometry
from probes.tasks import Task


class TaskMetric:
    """What a task counts of each image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: N, size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        of_run: Indices of the probes that are the run's, None for all. Of the others, which have another strength, is
            kept what scores need.
    """

    def __init__(
        self, task: Task, images: int, geometry: Geometry, of_run: Sequence[int] | None = None
    ):
        self.task = task
        self.images = images
        self.geometry = geometry
        self.of_run = of_run
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, outputs: Tensor, batch: dict[str, Any]) -> None:
        """Add a batch: outputs f[P, B, K, h, w] on the grid, with "target" [B, H, W, ...], or a list, and "index"."""
        for images, target in group_by_size(batch["target"]):
            counted = self.task.count(outputs[:, images], target, self.geometry)
            for name, x in {"index": batch["index"][images], **counted}.items():
                if x.ndim == 3:
                    if self.of_run is not None and name not in self.task.summed:
                        x = x[self.of_run]
                    x = x.transpose(0, 1)  # images first, as they are joined
                self.kept.setdefault(name, []).append(x)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] of all processes by name, integers as i64, and forget them.

        Images are in the order of the dataset, tensors on the CPU.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        parts = all_gather_objects({name: torch.cat(xs).cpu() for name, xs in self.kept.items()})
        self.kept = {}
        names = ("index", *self.task.counted)
        joined = {name: torch.cat([part[name] for part in parts if part]) for name in names}
        index, order = joined.pop("index").sort()
        if index.tolist() != list(range(self.images)):
            raise RuntimeError(
                f"expected each of {self.images} images once, saw {len(index)}, {len(index.unique())} different"
            )
        tensors = {}
        for name, x in joined.items():
            x = x[order]
            x = x.transpose(0, 1) if x.ndim == 3 else x
            tensors[name] = x if x.is_floating_point() else x.long()
        return tensors
