"""The torchmetrics metric that counts pixels over batches and ranks; apart, since torchmetrics imports slowly."""

import torch
from torch import Tensor
from torchmetrics import Metric

from probes.ops.geometry import Geometry

from .metrics import BY_IMAGE, Counts, count


class SegmentationMetric(Metric):
    """Counts of a dataset, over batches and ranks, each image once.

    Args:
        sites: S.
        images: Size of the dataset; `compute` requires each image exactly once.
        classes: K.
        geometry: Placement of the tokens on the images.
        by_token: Keep counts per token, see `count`.
        confusion: Also count pairs of label and prediction.
    """

    full_state_update = False

    def __init__(
        self,
        sites: int,
        images: int,
        classes: int,
        geometry: Geometry,
        by_token: bool = True,
        confusion: bool = False,
    ):
        super().__init__()
        self.images, self.geometry, self.by_token = images, geometry, by_token
        self.add_state("index", default=[], dist_reduce_fx="cat")
        for name in BY_IMAGE:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.confusion = None
        if confusion:
            pairs = torch.zeros(sites, classes, classes, dtype=torch.long)
            self.add_state("confusion", default=pairs, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `logits` f[S, B, K, h, w] on the grid, `target` uint8[B, H, W], `index` i64[B]."""
        view = self.geometry.view(tuple(target.shape[-2:]))
        counts = count(logits, target, view, by_token=self.by_token, confusion=self.confusion is not None)
        self.index.append(index)
        for name in BY_IMAGE:
            value = getattr(counts, name)
            # images first: torchmetrics concatenates ranks along the first axis
            by_image = value.transpose(0, 1) if value.ndim == 3 else value
            getattr(self, name).append(by_image.to(torch.int32))
        if self.confusion is not None:
            self.confusion += counts.confusion

    def compute(self) -> Counts:
        """Return the counts of the dataset, images in its order.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        order = order_of_images(concatenate(self.index), self.images)
        by_image = {name: concatenate(getattr(self, name))[order].long() for name in BY_IMAGE}
        by_site = {k: v.transpose(0, 1) if v.ndim == 3 else v for k, v in by_image.items()}
        return Counts(**by_site, confusion=self.confusion)


def concatenate(state: Tensor | list[Tensor]) -> Tensor:
    """Return a state as one tensor; torchmetrics concatenates it itself if there are several ranks."""
    return torch.cat(state) if isinstance(state, list) else state


def order_of_images(index: Tensor, images: int) -> Tensor:
    """Return the order i64[N] that sorts what was seen, i64[N], by image.

    Raises:
        RuntimeError: If an image of the dataset was not seen exactly once.
    """
    seen, order = index.sort()
    if len(index) > len(seen.unique()):
        raise RuntimeError(f"the metric saw image {seen[:-1][seen.diff() == 0][0]} more than once")
    if len(index) != images:
        raise RuntimeError(f"the metric saw {len(index)} of {images} images")
    return order
