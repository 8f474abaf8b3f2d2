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
        probes_of_run: Indices of the probes that are the run's, None for all. Of the others, which have another
            strength, is kept what scores need.
    """

    def __init__(
        self,
        task: Task,
        images: int,
        geometry: Geometry,
        probes_of_run: Sequence[int] | None = None,
    ):
        self.task = task
        self.images = images
        self.geometry = geometry
        self.probes_of_run = probes_of_run
        self.by_batch: dict[str, list[Tensor]] = {}

    def add(self, outputs: Tensor, batch: dict[str, Any]) -> None:
        """Add a batch: outputs f[P, B, K, h, w] on the grid, with "target" [B, H, W, ...], or a list, and "index"."""
        for images, target in group_by_size(batch["target"]):
            counted = self.task.count(outputs[:, images], target=target, geometry=self.geometry)
            self._keep("index", batch["index"][images])
            for name, counts in counted.items():
                is_by_probe = counts.ndim == 3
                if is_by_probe and self.probes_of_run is not None and name not in self.task.summed:
                    counts = counts[self.probes_of_run]
                if is_by_probe:
                    counts = counts.transpose(0, 1)  # images first, as they are joined
                self._keep(name, counts)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.by_batch.setdefault(name, []).append(tensor)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] of all processes by name, integers as i64, and forget them.

        Images are in the order of the dataset, tensors on the CPU.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        counted_here = {name: torch.cat(batches).cpu() for name, batches in self.by_batch.items()}
        processes = [counted for counted in all_gather_objects(counted_here) if counted]
        self.by_batch = {}
        index, order = torch.cat([counted["index"] for counted in processes]).sort()
        if index.tolist() != list(range(self.images)):
            raise RuntimeError(
                f"expected each of {self.images} images once, saw {len(index)}, {len(index.unique())} different"
            )
        tensors = {}
        for name in self.task.counted:
            joined = torch.cat([counted[name] for counted in processes])
            tensor = joined[order]
            if tensor.ndim == 3:
                tensor = tensor.transpose(0, 1)
            if not tensor.is_floating_point():
                tensor = tensor.long()
            tensors[name] = tensor
        return tensors
