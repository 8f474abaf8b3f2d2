"""Metrics over the images of a dataset, each image once; apart from `metrics.py`: torchmetrics imports slowly.

Legend: P probes, N images of the dataset, B images of a batch, K classes, or channels of another task, h w token grid,
M sums per image, H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from probes.ops.bilinear import upsample
from probes.ops.geometry import Geometry
from probes.tasks import Task

from .metrics import BY_IMAGE, PIXELS_AT_ONCE, Counts, count


class ImageMetric(Metric):
    """Named tensors of the images of a dataset, each image once.

    Args:
        images: N, size of the dataset; `compute` requires each image exactly once.
        names: Names of the tensors.
    """

    full_state_update = False

    def __init__(self, images: int, names: tuple[str, ...]):
        super().__init__()
        self.images = images
        self.names = names
        for name in ("index", *names):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, index: Tensor, tensors: dict[str, Tensor]) -> None:
        """Add images i64[B] with their tensors [P, B, ...] of P probes, or [B, n]."""
        self.index.append(index)
        # images first: torchmetrics concatenates ranks along the first axis
        for name, x in tensors.items():
            getattr(self, name).append(x.transpose(0, 1) if x.ndim == 3 else x)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] by name, images in the order of the dataset.

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
        tensors = {name: self._concatenate(name)[order] for name in self.names}
        return {name: x.transpose(0, 1) if x.ndim == 3 else x for name, x in tensors.items()}

    def _concatenate(self, name: str) -> Tensor:
        state = getattr(self, name)  # one tensor already if there are several ranks
        return torch.cat(state) if isinstance(state, list) else state


class SegmentationMetric(ImageMetric):
    """Counts of a dataset, over batches and ranks, each image once.

    Args:
        images: Size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        by_token: Keep counts per token, see `count`.
    """

    def __init__(self, images: int, geometry: Geometry, by_token: bool = True):
        super().__init__(images, BY_IMAGE)
        self.geometry = geometry
        self.by_token = by_token

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `logits` f[P, B, K, h, w] on the grid, `target` uint8[B, H, W], `index` i64[B]."""
        counts = count(
            logits, target, self.geometry.view(tuple(target.shape[-2:])), by_token=self.by_token
        )
        self.add(index, {name: x.to(torch.int32) for name, x in counts._asdict().items()})

    def compute(self) -> Counts:
        """Return the counts of the dataset, images in its order."""
        counts = super().compute()
        return Counts(**{name: counts[name].long() for name in BY_IMAGE})


class TaskSums(NamedTuple):
    """Sums per image f32[P, N, M] of another task, from which its scores are computed."""

    sums: Tensor


class TaskMetric(ImageMetric):
    """Sums per image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: Size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
    """

    def __init__(self, task: Task, images: int, geometry: Geometry):
        super().__init__(images, ("sums",))
        self.task = task
        self.geometry = geometry

    def update(self, channels: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `channels` f[P, B, K, h, w] on the grid, `target` [B, H, W, ...], `index` i64[B]."""
        sums = [
            image_sums(self.task, x, y, self.geometry)
            for x, y in zip(channels.unbind(1), target, strict=True)
        ]
        self.add(index, {"sums": torch.stack(sums, -2).float()})

    def compute(self) -> TaskSums:
        """Return the sums, images in the order of the dataset."""
        return TaskSums(**super().compute())


@torch.no_grad()
def image_sums(task: Task, channels: Tensor, target: Tensor, geometry: Geometry) -> Tensor:
    """Return the sums of an image f[P, M] from channels f[P, K, h, w], in chunks of probes."""
    size = tuple(target.shape[:2])
    step = max(1, PIXELS_AT_ONCE.get(target.device.type, PIXELS_AT_ONCE["cuda"]) // target.numel())
    predictions = (
        task.predict(upsample(part, size, geometry.view(size))) for part in channels.split(step)
    )
    return torch.cat([task.image_sums(prediction, target) for prediction in predictions])
