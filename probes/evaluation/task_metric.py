"""The metric of a task other than segmentation: its sums per image.

Legend: P probes, N images of the dataset, B images of a batch, K channels, h w token grid, T = h * w, M sums per image,
H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.ops.bilinear import upsample
from probes.ops.geometry import Geometry, GridPlacement
from probes.tasks import Task

from .image_metric import ImageMetric
from .metrics import PIXELS_AT_ONCE, cells_of_pixels


class TaskSums(NamedTuple):
    """Sums per image, for scores and errors by position.

    Args:
        sums: f32[P, N, M], from which the scores are computed.
        patch_error: f32[P, N, T], errors of the pixels under each token; None if a pixel has none, or not counted.
        patch_valid: f32[N, T], pixels with a value under each token; None as above.
    """

    sums: Tensor
    patch_error: Tensor | None = None
    patch_valid: Tensor | None = None


class TaskMetric(ImageMetric):
    """Sums per image of a dataset, over batches and ranks, each image once.

    Args:
        task: The task.
        images: Size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        by_token: Also sum the errors of pixels by token, if the task has such.
    """

    def __init__(self, task: Task, images: int, geometry: Geometry, by_token: bool = False):
        super().__init__(images, TaskSums._fields if by_token and task.pixel_error else ("sums",))
        self.task, self.geometry = task, geometry

    def update(self, channels: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `channels` f[P, B, K, h, w] on the grid, `target` [B, H, W, ...], `index` i64[B]."""
        pairs, by_token = zip(channels.unbind(1), target, strict=True), len(self.names) > 1
        images = [image_sums(self.task, x, y, self.geometry, by_token)._asdict() for x, y in pairs]
        stack = lambda name: torch.stack([image[name] for image in images], -2).float()
        self.add(index, {name: stack(name) for name in self.names})

    def compute(self) -> TaskSums:
        """Return the sums, images in the order of the dataset."""
        return TaskSums(**super().compute())


@torch.no_grad()
def image_sums(task: Task, channels: Tensor, target: Tensor, geometry: Geometry, by_token: bool = False) -> TaskSums:
    """Return the sums of an image, without the axis N, from channels f[P, K, h, w], in chunks of probes."""
    size, grid = tuple(target.shape[:2]), tuple(channels.shape[-2:])
    view, sums, errors = geometry.view(size), [], []
    if by_token:
        truth, valid = task.truth(target[None])[0], task.valid(target[None])[0]
    step = max(1, PIXELS_AT_ONCE.get(target.device.type, PIXELS_AT_ONCE["cuda"]) // target.numel())
    for part in channels.split(step):
        prediction = task.predict(upsample(part, size, view))
        sums.append(task.image_sums(prediction, target))
        if by_token:
            errors.append(sum_by_token(torch.where(valid, task.pixel_errors(prediction, truth), 0), grid, view))
    if not by_token:
        return TaskSums(torch.cat(sums))
    return TaskSums(torch.cat(sums), torch.cat(errors), sum_by_token(valid.float(), grid, view))


def sum_by_token(values: Tensor, grid: tuple[int, int], view: GridPlacement) -> Tensor:
    """Return the sums f[..., T] of pixels f[..., H, W] under each token; pixels outside every token are left out."""
    tokens = cells_of_pixels(view, grid, tuple(values.shape[-2:]), values.device)
    rows, columns = (F.one_hot(x + 1, n + 1)[:, 1:].to(values) for x, n in zip(tokens, grid, strict=True))
    return (rows.T @ values @ columns).flatten(-2)
