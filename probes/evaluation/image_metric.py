"""Tensors per image of a dataset, over batches and ranks; apart from `metrics.py`: torchmetrics imports slowly."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMetric(Metric):
    """Named tensors of the images of a dataset, each image once.

    Args:
        images: N, size of the dataset; `compute` requires each image exactly once.
        names: Names of the tensors.
    """

    full_state_update = False

    def __init__(self, images: int, names: tuple[str, ...]):
        super().__init__()
        self.images, self.names = images, names
        for name in ("index", *names):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, index: Tensor, tensors: dict[str, Tensor]) -> None:
        """Add images i64[B] with their tensors [P, B, ...] of P probes, or [B, n]."""
        self.index.append(index)
        for name, x in tensors.items():  # images first: torchmetrics concatenates ranks along the first axis
            getattr(self, name).append(x.transpose(0, 1) if x.ndim == 3 else x)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] by name, images in the order of the dataset.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        index, order = self._concatenate("index").sort()
        if len(index) > len(index.unique()):
            raise RuntimeError(f"the metric saw image {index[:-1][index.diff() == 0][0]} more than once")
        if len(index) != self.images:
            raise RuntimeError(f"the metric saw {len(index)} of {self.images} images")
        tensors = {name: self._concatenate(name)[order] for name in self.names}
        return {name: x.transpose(0, 1) if x.ndim == 3 else x for name, x in tensors.items()}

    def _concatenate(self, name: str) -> Tensor:
        state = getattr(self, name)  # one tensor already if there are several ranks
        return torch.cat(state) if isinstance(state, list) else state
