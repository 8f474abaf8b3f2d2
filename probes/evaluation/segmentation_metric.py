"""The metric that counts the pixels of segmentations."""

import torch
from torch import Tensor

from probes.ops.geometry import Geometry

from .image_metric import ImageMetric
from .metrics import BY_IMAGE, Counts, count


class SegmentationMetric(ImageMetric):
    """Counts of a dataset, over batches and ranks, each image once.

    Args:
        sites: S.
        images: Size of the dataset; `compute` requires each image exactly once.
        classes: K.
        geometry: Placement of the tokens on the images.
        by_token: Keep counts per token, see `count`.
        confusion: Also count pairs of label and prediction.
    """

    def __init__(
        self,
        sites: int,
        images: int,
        classes: int,
        geometry: Geometry,
        by_token: bool = True,
        confusion: bool = False,
    ):
        super().__init__(images, BY_IMAGE)
        self.geometry, self.by_token, self.confusion = geometry, by_token, None
        if confusion:
            pairs = torch.zeros(sites, classes, classes, dtype=torch.long)
            self.add_state("confusion", default=pairs, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `logits` f[S, B, K, h, w] on the grid, `target` uint8[B, H, W], `index` i64[B]."""
        view = self.geometry.view(tuple(target.shape[-2:]))
        counts = count(logits, target, view, by_token=self.by_token, confusion=self.confusion is not None)
        self.add(index, {name: getattr(counts, name).to(torch.int32) for name in BY_IMAGE})
        if self.confusion is not None:
            self.confusion += counts.confusion

    def compute(self) -> Counts:
        """Return the counts of the dataset, images in its order."""
        counts = {name: x.long() for name, x in super().compute().items() if name in BY_IMAGE}
        return Counts(**counts, confusion=self.confusion)
