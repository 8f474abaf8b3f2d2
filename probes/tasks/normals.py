"""Surface normals. A probe predicts a vector per pixel, which is normalised.

Targets: float32[H, W, 3], unit vectors, NaN where there is no value.
"""

import numpy as np
import torch
from torch import Tensor

from .base import Task, mean_over_valid

WITHIN = (11.25, 22.5, 30.0)  # degrees. Source: Fouhey et al. 2013; probe3d, evals/utils/metrics.py


class Normals(Task):
    """Unit vectors.

    Scores are computed from the angle between prediction and target, for each image, and averaged over images as by
    probe3d: its mean and median in degrees, and the shares of pixels below 11.25, 22.5 and 30 degrees. (probe3d reports
    the root mean square in place of mean and median.) The median of an even number of pixels is the lower one.

    The loss is 1 - cosine. The closed form is least squares on the vectors.
    """

    name = "normals"
    targets = "normals"
    channels = 3
    scores = {
        "mean": False,
        "median": False,
        "within_11": True,
        "within_22": True,
        "within_30": True,
    }
    labels = {
        "mean": "mean angle (degrees)",
        "median": "median angle (degrees)",
        "within_11": "within 11.25 degrees",
        "within_22": "within 22.5 degrees",
        "within_30": "within 30 degrees",
    }
    margin = 1.0  # degree

    def values(self, target: Tensor) -> Tensor:
        """Return the vectors, f[B, H, W, 3]."""
        return target

    def predict(self, maps: Tensor) -> Tensor:
        """Return unit vectors, f[..., H, W, 3]."""
        # F.normalize takes ten times as long over three channels on a CPU
        squared_norm = maps.square().sum(-3, keepdim=True)
        unit = maps * squared_norm.clamp(min=1e-24).rsqrt()
        return unit.movedim(-3, -1)

    def image_losses(self, maps: Tensor, target: Tensor) -> Tensor:
        """Return the mean of 1 - cosine, f[P, B]."""
        return mean_over_valid(
            1 - (self.predict(maps) * target.nan_to_num()).sum(-1), self.valid(target)
        )

    def image_scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return mean and median angle and the three shares, f[P, 5]."""
        angle = (prediction * target).sum(-1).clamp(-1, 1).acos().rad2deg()
        shares = ((angle < limit).float().mean(1) for limit in WITHIN)
        return torch.stack([angle.mean(1), angle.median(1).values, *shares], 1)

    def colorize(self, prediction: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """Return x, y and z as red, green and blue, 128 for 0."""
        return np.nan_to_num(127.5 * (prediction + 1)).round().clip(0, 255).astype(np.uint8)
