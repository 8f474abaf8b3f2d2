"""What a task counts over the images of a dataset, each image once, by batches and processes.

Legend: P probes, N images of the dataset, B images of a batch, K channels of a probe, h w token grid.
"""

import torch
from torch import Tensor

from llava_bidir.common.processes import all_gather_objects
from probes.ops.geometry import Geometry
from probes.tasks import Task


class TaskMetric:
    """What a task counts of each image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: N, size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        names: Of the tensors that are kept, if not those that the task counts.
    """

    def __init__(
        self,
        task: Task,
        images: int,
        geometry: Geometry,
        names: tuple[str, ...] | None = None,
    ):
        self.task = task
        self.images = images
        self.geometry = geometry
        self.names = names or task.counted
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.kept: dict[str, list[Tensor]] = {name: [] for name in ("index", *self.names)}

    def update(
        self,
        outputs: Tensor,
        target: Tensor,
        index: Tensor,
    ) -> None:
        """Add images: `outputs` f[P, B, K, h, w] on the grid, `target` [B, H, W, ...], `index` i64[B]."""
        self.add(index, self.task.count(outputs, target, self.geometry))

    def add(self, index: Tensor, counted: dict[str, Tensor]) -> None:
        """Add images i64[B] with what was counted of them, [P, B, ...] or [B, n]."""
        self.kept["index"].append(index)
        for name, x in counted.items():
            # images first, as they are joined
            self.kept[name].append(x.transpose(0, 1) if x.ndim == 3 else x)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] of all processes by name; integers as i64.

        Images are in the order of the dataset, tensors on the CPU.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        parts = all_gather_objects(
            {name: torch.cat(xs).cpu() for name, xs in self.kept.items() if xs}
        )
        joined = {name: torch.cat([part[name] for part in parts if part]) for name in self.kept}
        index, order = joined["index"].sort()
        if index.tolist() != list(range(self.images)):
            raise RuntimeError(
                f"expected each of {self.images} images once, saw {len(index)}, {len(index.unique())} different"
            )
        tensors = {}
        for name in self.names:
            x = joined[name][order]
            x = x.transpose(0, 1) if x.ndim == 3 else x
            tensors[name] = x if x.is_floating_point() else x.long()
        return tensors
