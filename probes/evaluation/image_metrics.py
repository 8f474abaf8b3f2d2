"""The metric of a task over the images of a dataset, each image once; apart from others: torchmetrics imports slowly.

Legend: P probes, N images of the dataset, B images of a batch, K channels of a probe, h w token grid.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from probes.ops.geometry import Geometry
from probes.tasks import Task


class TaskMetric(Metric):
    """What a task counts of each image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: N, size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        names: Of the tensors that are kept, if not those that the task counts.
    """

    full_state_update = False

    def __init__(
        self,
        task: Task,
        images: int,
        geometry: Geometry,
        names: tuple[str, ...] | None = None,
    ):
        super().__init__()
        self.task = task
        self.images = images
        self.geometry = geometry
        self.names = names or task.counted
        for name in ("index", *self.names):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `outputs` f[P, B, K, h, w] on the grid, `target` [B, H, W, ...], `index` i64[B]."""
        self.add(index, self.task.count(outputs, target, self.geometry))

    def add(self, index: Tensor, counted: dict[str, Tensor]) -> None:
        """Add images i64[B] with what was counted of them, [P, B, ...] or [B, n]."""
        self.index.append(index)
        for name, x in counted.items():
            # images first: torchmetrics concatenates ranks along the first axis
            getattr(self, name).append(x.transpose(0, 1) if x.ndim == 3 else x)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] by name, images in the order of the dataset; integers as i64.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        index, order = self._concatenate("index").sort()
        if len(index) > len(index.unique()):
            raise RuntimeError(
                f"the metric saw image {index[:-1][index.diff() == 0][0]} more than once"
            )
        if len(index) != self.images:
            raise RuntimeError(f"the metric saw {len(index)} of {self.images} images")
        tensors = {}
        for name in self.names:
            x = self._concatenate(name)[order]
            x = x.transpose(0, 1) if x.ndim == 3 else x
            tensors[name] = x if x.is_floating_point() else x.long()
        return tensors

    def _concatenate(self, name: str) -> Tensor:
        state = getattr(self, name)  # one tensor already if there are several ranks
        return torch.cat(state) if isinstance(state, list) else state
