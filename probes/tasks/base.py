"""What a probe predicts: `Task`, of which each file has a subclass.

Legend: P probes, B images, N images of a dataset, K channels of a probe, h w token grid, H W pixels, M sums per image.
A target has the shape [H, W], or [H, W, 3] for vectors; predictions have the shape of the target.
"""

import math
from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_bidir.common.imports import check_shape
from probes.ops.bilinear import upsample
from probes.ops.geometry import Geometry, GridPlacement
from probes.ops.kernels import limit_on
from probes.ops.pixel_counts import PIXELS_AT_ONCE
from probes.ops.quadrature import PreparedMasks

from .losses import CrossEntropy


class Task:
    """What is counted of an image, and the scores of a dataset.

    Scores are functions of sums over the images of a dataset, so that they can be resampled and added up over
    processes. A subclass predicts a number or a vector at each pixel, and scores are means over the images of
    `image_scores`, unless it replaces `training_losses`, `count`, `dataset_scores` and `predict_pixels`.

    Without more than name and targets it is least squares on numbers. One of a file of your own is registered by
    :func:`probes.register_task`; classes derive from :class:`probes.Segmentation`, and name them.
    """

    name: str
    # the targets that are read: segmentation, depth, normals, boundaries, or those of a registered layout
    targets: str
    classes: Sequence[str] = ()  # of a user's task, in place of those of the dataset
    # K; None if there is one for each class of the dataset
    channels: int | None = 1
    # name -> higher is better; the first is the one that chooses and is compared
    scores: dict[str, bool] = {"mae": False}
    labels: dict[str, str] = {
        "mae": "mean absolute error"
    }  # name of a score -> name with its unit in reports
    highest: float = math.inf  # that a score can be
    # smallest difference of the main score that is a finding, chosen before any result
    margin: float = 0.0
    # what `probes solve` minimises if targets are classes; None for squared errors
    loss: CrossEntropy | None = None
    # what `training_losses` takes of a batch: "target", or "masks" that are prepared from it
    trained_on: str = "target"
    counted: tuple[str, ...] = ("sums",)  # names of what `count` returns
    summed: tuple[str, ...] = ("sums",)  # of these, what `sums` reads

    @property
    def score(self) -> str:
        """Name of the main score."""
        return next(iter(self.scores))

    @property
    def sign(self) -> int:
        """1 if a higher main score is better, else -1."""
        return 1 if self.scores[self.score] else -1

    def with_margin(self, margin: float) -> Self:
        """Return the task with another margin."""
        task = copy(self)
        task.margin = margin
        return task

    def sums(self, counted: dict[str, Tensor]) -> Tensor:
        """Return the sums f[P, N, M], or of several paths [..., P, N, M], of what `count` returned of all images."""
        return counted["sums"]

    def read(self, target: np.ndarray) -> np.ndarray:
        """Return the target of an image from that of the dataset, [H, W] or [H, W, 3]; by default it is that.

        It has classes, uint8, 255 where ignored; or numbers, float32, NaN where there is no value.
        """
        return target

    def colorize(self, prediction: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """Return a map of predictions as colours, uint8[..., H, W, 3]; `palette` uint8[K, 3] has those of classes."""
        from matplotlib import colormaps

        low = np.nanmin(prediction)
        span = max(np.nanmax(prediction) - low, 1e-6)
        return colormaps["viridis"]((prediction - low) / span, bytes=True)[..., :3]

    def truth(self, target: Tensor) -> Tensor:
        """Return targets in the format of predictions, [B, H, W] or [B, H, W, 3]; most are read in it."""
        return target

    def values(self, target: Tensor) -> Tensor:
        """Return what the channels are to equal, f[B, H, W, K], NaN where a pixel has no value."""
        return target[..., None] if target.ndim == 3 else target

    def predict(self, maps: Tensor) -> Tensor:
        """Return the prediction f[..., H, W] or f[..., H, W, 3] of upsampled channels f[..., K, H, W]."""
        return maps.movedim(-3, -1).squeeze(-1)

    def image_losses(self, maps: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each image f[P, B], of which `probes fit` minimises the mean; 0 for one without a value.

        Args:
            maps: Upsampled channels f[P, B, K, H, W].
            target: [B, H, W] or [B, H, W, 3].
        """
        values = self.values(target).movedim(-1, 1)  # [B, K, H, W]
        errors = (maps - values.nan_to_num()).square().mean(2)
        return mean_over_valid(errors, self.valid(target))

    def image_scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the scores of an image, f[P, number of scores], from predictions [P, ...] at the pixels with a value.

        Args:
            prediction: f[P, n] or f[P, n, 3].
            target: The truth at these pixels, f[n] or f[n, 3], n > 0.
        """
        return (prediction - target).abs().flatten(1).mean(1, keepdim=True)

    def training_losses(
        self, outputs: Tensor, targets: PreparedMasks | Sequence[Tensor], geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Return the sums f[P] whose mean `probes fit` minimises, and the number of pixels or images that are summed.

        Args:
            outputs: Of the probes on the token grid, f[P, B, K, h, w].
            targets: B targets [H, W] or [H, W, 3], or B masks that are prepared from them.
            geometry: Placement of the tokens on the images.
        """

        def loss(x: Tensor, y: Tensor) -> Tensor:
            size = y.shape[1:3]
            return self.image_losses(upsample(x, size, geometry.view(size))[:, None], y)[:, 0]

        images = outputs.new_zeros(())
        total = outputs[:, :0].sum((1, 2, 3, 4))
        for x, y in zip(outputs.unbind(1), targets, strict=True):
            images = images + self.valid(y[None]).any()
            # recomputed in backward: the maps of all sites and images at once would be gigabytes
            total = total + checkpoint(loss, x, y[None], use_reentrant=False)
        return total, images

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
            truth = self.truth(target[None])[0]
            check_shape(self.predict, prediction, (len(prediction), *truth.shape))
            scores = self.image_scores(prediction[:, valid], truth[valid])
            sums[:, 1:] = check_shape(self.image_scores, scores, sums[:, 1:].shape)
        return sums

    @torch.no_grad()
    def count(self, outputs: Tensor, target: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        """Return what is kept of each image, by the names of `counted`: [P, B, ...], or [B, n] if equal for all probes.

        Args:
            outputs: Of the probes on the token grid, f[P, B, K, h, w].
            target: [B, H, W] or [B, H, W, 3].
            geometry: Placement of the tokens on the images.
        """
        size = target.shape[1:3]
        view = geometry.view(size)
        probes_at_once = max(1, limit_on(target.device, PIXELS_AT_ONCE) // target[0].numel())
        sums = []
        for of_image, truth in zip(outputs.unbind(1), target, strict=True):
            parts = [
                self.image_sums(self.predict(upsample(part, size, view)), truth)
                for part in of_image.split(probes_at_once)
            ]
            sums.append(torch.cat(parts))
        return {"sums": torch.stack(sums, -2).float()}

    def dataset_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the scores f64[...] by name, from sums over images f[..., M]; NaN without a value."""
        means = sums[..., 1:].double() / sums[..., :1].double()
        return dict(zip(self.scores, means.unbind(-1), strict=True))

    @torch.no_grad()
    def predict_pixels(
        self, outputs: Tensor, size: tuple[int, int], view: GridPlacement
    ) -> np.ndarray:
        """Return the prediction for each pixel of images of `size` [H, W] from a probe's outputs f[..., K, h, w].

        It is the class, uint8[..., H, W], or f32[..., H, W] or f32[..., H, W, 3] in the format of a task's targets.
        """
        return self.predict(upsample(outputs, size, view)).float().cpu().numpy()


def mean_over_valid(error: Tensor, valid: Tensor) -> Tensor:
    """Return the mean f[P, B] of errors f[P, B, H, W] over the valid pixels bool[B, H, W]; 0 where there are none."""
    total = torch.where(valid, error, 0).sum((-2, -1))
    pixels = valid.sum((-2, -1)).clamp(min=1)
    return total / pixels
