"""Boundaries between instances or classes. A probe predicts the logits of interior and boundary.

Targets: uint8[H, W], 1 at boundaries, 0 elsewhere, 255 where ignored.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from probes.ops.geometry import IGNORE_INDEX

from .base import Task, mean_over_valid
from .losses import CrossEntropy

TOLERANCE = 0.0075  # of the image's diagonal. Source: maxDist of BSDS500's correspondPixels
THRESHOLDS = 99  # equally spaced in (0, 1). Source: nthresh of BSDS500's boundaryBench


class Boundaries(Task):
    """Pixels at boundaries.

    Scores are those of BSDS500 over the dataset: F at the threshold that is best for all images (ODS), and average
    precision, the sum over falling thresholds of precision x rise of recall. A predicted pixel is right if a boundary
    lies within 0.0075 of the diagonal, and a boundary pixel is found if a prediction does. Sums per image: for each
    interval between thresholds, the pixels predicted, those of them that are right, and the boundary pixels found.

    Deviates: BSDS500 thins predictions and assigns them to boundary pixels one to one. Here both are dilated by the
    tolerance, so that scores are higher, and a wide prediction is not punished as long as it is near a boundary.

    The loss is the cross-entropy in which both classes of an image have the same weight (HED). The solver sees
    boundaries as two classes without weights, which moves the bias, and so the probability at which F is best.
    """

    name = "boundaries"
    targets = "boundaries"
    channels = 2
    scores = {"f": True, "ap": True}
    labels = {"f": "F (best threshold)", "ap": "average precision"}
    margin = 0.01  # one point, as of segmentation
    loss = CrossEntropy()

    def values(self, target: Tensor) -> Tensor:
        """Return 1 for the class of each pixel and 0 for the other, f[B, H, W, 2]."""
        onehot = torch.stack([target == 0, target == 1], -1).float()
        return onehot.masked_fill((target == IGNORE_INDEX)[..., None], torch.nan)

    def predict(self, maps: Tensor) -> Tensor:
        """Return the probability of a boundary, f[..., H, W]."""
        interior, boundary = maps.unbind(-3)
        return (boundary - interior).sigmoid()

    def image_losses(self, maps: Tensor, target: Tensor) -> Tensor:
        """Return the mean over both classes of their mean cross-entropies, f[P, B]; one class if there is one only."""
        interior, boundary = maps.unbind(-3)
        is_interior = target == 0
        is_boundary = target == 1
        interior_loss = mean_over_valid(F.softplus(boundary - interior), is_interior)
        boundary_loss = mean_over_valid(F.softplus(interior - boundary), is_boundary)
        has_interior = is_interior.any(-1).any(-1).float()
        has_boundary = is_boundary.any(-1).any(-1).float()
        classes = has_interior + has_boundary
        return (interior_loss + boundary_loss) / classes.clamp(min=1)

    def image_sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return pixels predicted, right, and found by interval between thresholds, and boundaries, f[P, 3 n + 1]."""
        radius = TOLERANCE * math.hypot(*target.shape)
        boundary = target == 1
        reach = dilate(boundary[None].to(prediction), radius)
        near = reach[0] > 0
        valid = target != IGNORE_INDEX
        shown = prediction.masked_fill(~valid, 0)
        reached = dilate(shown, radius)
        predicted = histogram(prediction[:, valid])
        right = histogram(prediction[:, valid & near])
        found = histogram(reached[:, boundary])
        pixels = boundary.sum().to(prediction)
        boundaries = pixels.expand(len(prediction), 1)
        return torch.cat([predicted, right, found, boundaries], 1)

    def dataset_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Return F at the best threshold and average precision, f64[...]."""
        *counts, boundaries = sums.double().split([THRESHOLDS] * 3 + [1], -1)
        predicted, right, found = (x.flip(-1).cumsum(-1) for x in counts)  # at falling thresholds
        precision = right / predicted.clamp(min=1)
        recall = found / boundaries
        total = precision + recall
        f = 2 * precision * recall / total.clamp(min=1e-12)
        none_found = torch.zeros_like(recall[..., :1])
        rise = recall.diff(dim=-1, prepend=none_found)
        average_precision = (precision * rise).sum(-1)
        return {"f": f.amax(-1), "ap": average_precision}

    def colorize(self, prediction: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """Return likely boundaries bright."""
        probability = np.where(prediction > 1, 0, prediction)  # 255: ignored
        grey = (255 * probability).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)


def dilate(maps: Tensor, radius: float) -> Tensor:
    """Return the maximum of non-negative maps f[P, H, W] over the pixels within a radius in pixels."""
    reach = int(radius)
    height, _ = maps.shape[-2:]
    padded = F.pad(maps, (0, 0, reach, reach))
    result = maps
    for row in range(-reach, reach + 1):
        half = int(math.sqrt(radius**2 - row**2))
        first = reach + row
        shifted = padded[:, first : first + height]
        window = (1, 2 * half + 1)
        row_maximum = F.max_pool2d(shifted[:, None], window, stride=1, padding=(0, half))
        result = torch.maximum(result, row_maximum[:, 0])
    return result


def histogram(probability: Tensor) -> Tensor:
    """Return how many of f[P, n] lie from each threshold to the next, f[P, THRESHOLDS]; none below the first."""
    thresholds = torch.arange(1, THRESHOLDS + 1, device=probability.device) / (THRESHOLDS + 1)
    interval = torch.bucketize(probability, thresholds, right=True)
    # float32 would stop counting at 2^24
    counts = interval.new_zeros(len(probability), THRESHOLDS + 1)
    counts.scatter_add_(1, interval, torch.ones_like(interval))
    return counts[:, 1:].to(probability)
