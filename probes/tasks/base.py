"""What a probe predicts, other than classes: `Task`, one subclass per file of this folder.

Legend: P probes, B images, K channels of a probe, H W pixels, M sums per image. A target has the shape [H, W], or
[H, W, 3] for vectors; predictions have the shape of the target.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from probes.ops.bilinear import upsample, upsampled_argmax
from probes.ops.geometry import GridPlacement


class Task(ABC):
    """Targets, loss, scores and colours of a task.

    Scores of a dataset are functions of sums over its images, so that they can be resampled and added up over
    processes. By default they are means over the images of `image_scores`.
    """

    name: ClassVar[str]
    # the targets that are read, by `data.task`: depth, normals or boundaries
    targets: ClassVar[str]
    channels: ClassVar[int]  # K
    # name -> higher is better; the first is the one that chooses and is compared
    scores: ClassVar[dict[str, bool]]
    labels: ClassVar[dict[str, str]]  # name of a score -> name with its unit in reports
    # by `probes solve`: least_squares, or cross_entropy (targets are classes)
    solved: ClassVar[str] = "least_squares"

    @property
    def score(self) -> str:
        """Name of the main score."""
        return next(iter(self.scores))

    @property
    def sign(self) -> int:
        """1 if a higher main score is better, else -1."""
        return 1 if self.scores[self.score] else -1

    @abstractmethod
    def values(self, target: Tensor) -> Tensor:
        """Return what the channels are to equal, f[B, H, W, K], NaN where a pixel has no value."""

    @abstractmethod
    def predict(self, maps: Tensor) -> Tensor:
        """Return the prediction f[..., H, W] or f[..., H, W, 3] of upsampled channels f[..., K, H, W]."""

    @abstractmethod
    def image_losses(self, maps: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each image f[P, B] that `probes fit` minimises; 0 for an image without a value.

        Args:
            maps: Upsampled channels f[P, B, K, H, W].
            target: [B, H, W] or [B, H, W, 3].
        """

    @abstractmethod
    def image_scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the scores of an image, f[P, number of scores], from predictions [P, ...] at the pixels with a value.

        Args:
            prediction: f[P, n] or f[P, n, 3].
            target: The truth at these pixels, f[n] or f[n, 3], n > 0.
        """

    @abstractmethod
    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Return a map of the prediction, uint8[H, W, 3]."""

    def truth(self, target: Tensor) -> Tensor:
        """Return targets in the format of predictions, f[B, H, W] or f[B, H, W, 3]; most are read in it."""
        return target

    def valid(self, target: Tensor) -> Tensor:
        """Return which pixels have a value, bool[B, H, W]."""
        return self.values(target).isfinite().all(-1)

    def image_sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return what an image adds to the sums, f[P, M]: 1 and its scores; 0 for an image without a value.

        Args:
            prediction: f[P, H, W] or f[P, H, W, 3].
            target: [H, W] or [H, W, 3].
        """
        valid = self.valid(target[None])[0]
        sums = prediction.new_zeros(len(prediction), 1 + len(self.scores))
        if valid.any():
            sums[:, 0] = 1
            sums[:, 1:] = self.image_scores(
                prediction[:, valid], self.truth(target[None])[0][valid]
            )
        return sums

    def dataset_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the scores f64[...] by name, from sums over images f[..., M]; NaN without a value."""
        means = sums[..., 1:].double() / sums[..., :1].double()
        return dict(zip(self.scores, means.unbind(-1), strict=True))


def mean_over_valid(error: Tensor, valid: Tensor) -> Tensor:
    """Return the mean f[P, B] of errors f[P, B, H, W] over the valid pixels bool[B, H, W]; 0 where there are none."""
    return torch.where(valid, error, 0).sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)


@torch.no_grad()
def predict_pixels(
    task: Task | None, logits: Tensor, size: tuple[int, int], view: GridPlacement
) -> np.ndarray:
    """Return the prediction of each pixel of images of `size` [H, W] from a probe's outputs f[..., K, h, w].

    It is the class, uint8[..., H, W], or f32[..., H, W] or f32[..., H, W, 3] in the format of a task's targets.
    """
    if task is None:
        return upsampled_argmax(logits, size, view).to(torch.uint8).cpu().numpy()
    return task.predict(upsample(logits, size, view)).float().cpu().numpy()
