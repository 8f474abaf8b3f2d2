"""Classes of pixels, the paper's task. A probe predicts the logits of the classes.

Targets: uint8[H, W], 255 where ignored; of more than 255 classes int16[H, W], -1 where ignored.

Legend: P probes, N images, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from probes.ops.bilinear import upsampled_argmax
from probes.ops.cross_entropy import differentiable_sum
from probes.ops.geometry import IGNORE_INDEX, Geometry, GridPlacement
from probes.ops.pixel_counts import Counts, count
from probes.ops.quadrature import PreparedMasks

from .base import Task
from .losses import CrossEntropy

UNSIGNED = {1: np.uint8, 2: np.uint16}  # which PNG can hold, by bytes


def colorize_classes(classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the colours uint8[..., H, W, 3] of classes [..., H, W] of targets; ignored pixels are black."""
    table = np.zeros(
        (max(len(palette), IGNORE_INDEX) + 1, 3), np.uint8
    )  # the last one is also that of -1
    table[: len(palette)] = palette
    return table[classes]


class Segmentation(Task):
    """The class of each pixel.

    Scores are of the dataset: intersections and unions are summed over images first. mIoU is the mean over the classes
    that occur, labelled or predicted. Sums per image: of each class, the pixels that are right, predicted and labelled.
    Counts under each token are kept beside them, for the analyses of single patches.
    """

    name = "segmentation"
    targets = "segmentation"
    channels = None
    scores = {"miou": True, "pacc": True}
    labels = {"miou": "mIoU", "pacc": "pixel accuracy"}
    highest = 1.0
    # One point of mIoU. The drop that the paper reads off its probes at CLIP's adapter, on ADE20K, is 1.2 points.
    margin = 0.01
    loss = CrossEntropy()
    trained_on = "masks"
    counted = Counts._fields
    colorize = staticmethod(colorize_classes)
    summed = ("intersection", "predicted", "labelled")

    def training_losses(
        self, outputs: Tensor, targets: PreparedMasks, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Return the loss summed over labelled pixels f[P], and their number.

        Large photos have more pixels, so they weigh more (an order of magnitude on ADE20K); the paper does not say.
        """
        pixels = targets.pixels.sum()
        if not len(targets):
            return outputs.sum((1, 2, 3, 4)), pixels  # 0 with gradient 0
        return differentiable_sum(self.loss.of_images, outputs, targets), pixels

    def count(self, outputs: Tensor, target: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        """Return the fields of :class:`probes.ops.pixel_counts.Counts`, i32."""
        counts = count(outputs, target, geometry.view(target.shape[-2:]))._asdict()
        return {name: x.to(torch.int32) for name, x in counts.items()}

    def sums(self, counted: dict[str, Tensor]) -> Tensor:
        """Return the counts of right, predicted and labelled pixels side by side, [..., P, N, 3 K]."""
        right = counted["intersection"]
        labelled = counted["labelled"].to(right.dtype).expand_as(right)
        return torch.cat([right, counted["predicted"], labelled], -1)

    def iou(self, sums: Tensor) -> Tensor:
        """Return the IoU of each class f64[..., K], NaN where it is neither labelled nor predicted."""
        right, predicted, labelled = sums.double().unflatten(-1, (3, -1)).unbind(-2)
        return right / (predicted + labelled - right)

    def dataset_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Return mIoU and pixel accuracy, f64[...]."""
        right, _, labelled = sums.double().unflatten(-1, (3, -1)).unbind(-2)
        accuracy = right.sum(-1) / labelled.sum(-1)
        return {"miou": self.iou(sums).nanmean(-1), "pacc": accuracy}

    @torch.no_grad()
    def predict_pixels(
        self, outputs: Tensor, size: tuple[int, int], view: GridPlacement
    ) -> np.ndarray:
        """Return the class of each pixel, uint8[..., H, W], or uint16 of more than 255 classes."""
        classes = upsampled_argmax(outputs, size, view).cpu().numpy()
        return classes.view(UNSIGNED[classes.dtype.itemsize])
