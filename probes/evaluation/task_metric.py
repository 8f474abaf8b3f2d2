"""The torchmetrics metric of a task other than segmentation: its sums per image, over batches and ranks.

Legend: P probes, N images of the dataset, B images of a batch, K channels, h w token grid, M sums per image.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from probes.ops.bilinear import upsample
from probes.ops.geometry import Geometry
from probes.tasks import Task

from .metrics import PIXELS_AT_ONCE
from .segmentation_metric import concatenate, order_of_images


class TaskMetric(Metric):
    """Sums per image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: Size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
    """

    full_state_update = False

    def __init__(self, task: Task, images: int, geometry: Geometry):
        super().__init__()
        self.task, self.images, self.geometry = task, images, geometry
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("sums", default=[], dist_reduce_fx="cat")

    def update(self, channels: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `channels` f[P, B, K, h, w] on the grid, `target` [B, H, W, ...], `index` i64[B]."""
        self.index.append(index)
        sums = [image_sums(self.task, x, y, self.geometry) for x, y in zip(channels.unbind(1), target, strict=True)]
        self.sums.append(torch.stack(sums).float())

    def compute(self) -> Tensor:
        """Return the sums f32[P, N, M], images in the order of the dataset.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        return concatenate(self.sums)[order_of_images(concatenate(self.index), self.images)].transpose(0, 1)


@torch.no_grad()
def image_sums(task: Task, channels: Tensor, target: Tensor, geometry: Geometry) -> Tensor:
    """Return the sums f[P, M] of an image, from channels f[P, K, h, w], in chunks of probes."""
    size = tuple(target.shape[:2])
    step = max(1, PIXELS_AT_ONCE.get(target.device.type, PIXELS_AT_ONCE["cuda"]) // target.numel())
    parts = [upsample(part, size, geometry.view(size)) for part in channels.split(step)]
    return torch.cat([task.image_sums(task.predict(maps), target) for maps in parts])
