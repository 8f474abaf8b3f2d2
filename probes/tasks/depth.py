"""Metric depth. A probe predicts the logarithm of the depth in metres.

Targets: float32[H, W] in metres, NaN where there is no value.
"""

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError

from .base import Task, mean_over_valid

# DINOv2's lower limit for NYUv2, and far beyond what depth cameras measure: the exponential of a bad probe stays finite
LOWEST_M = 1e-3
HIGHEST_M = 1e3
# weight of the squared mean in the loss. Source: AdaBins, and DINOv2's SigLoss
VARIANCE_FOCUS = 0.15


class Depth(Task):
    """Depth in metres.

    Scores are computed for each image and averaged over images, as by probe3d (evals/utils/metrics.py) and DINOv2's
    evaluation (Monocular-Depth-Estimation-Toolbox): root mean square error in metres, mean |p - t| / t, mean
    |log10 p - log10 t|, and the shares of pixels with max(p / t, t / p) below 1.25, 1.25^2 and 1.25^3. Of NYUv2 they
    are those of the pixels that these score, too: the layout `nyuv2` leaves out what is outside Eigen's crop. The last
    score is the root mean square error over the pixels of all images.

    The loss is the scale-invariant log loss of AdaBins, as DINOv2's linear probes use it: with g = log p - log t, the
    root of var(g) + 0.15 mean(g)^2.

    Deviates: DINOv2 predicts 256 uniform bins from 0.001 to 10 m with a linear normalisation, adds half of a multi-
    scale gradient loss, and takes variance and mean over a batch. Here one channel predicts log depth, so that the
    probe is the one that the closed form solves, no gradient term pulls the two apart, and each image has a loss of its
    own, which does not depend on how images are distributed to batches and processes. Predictions are not limited to
    10 m, so that a pixel far off counts for more.
    """

    name = "depth"
    targets = "depth"
    channels = 1
    scores = {
        "rmse": False,
        "abs_rel": False,
        "log10": False,
        "delta_1": True,
        "delta_2": True,
        "delta_3": True,
        "rmse_pixels": False,
    }
    labels = {
        "rmse": "RMSE (m)",
        "abs_rel": "AbsRel",
        "log10": "log10",
        "delta_1": "delta < 1.25",
        "delta_2": "delta < 1.25^2",
        "delta_3": "delta < 1.25^3",
        "rmse_pixels": "RMSE of all pixels (m)",
    }
    margin = 0.01  # metres; the literature gives RMSE with two decimals

    def values(self, target: Tensor) -> Tensor:
        """Return the log depth, f[B, H, W, 1]."""
        return target.log()[..., None]

    def predict(self, maps: Tensor) -> Tensor:
        """Return the depth in metres, f[..., H, W]."""
        return maps.squeeze(-3).exp().clamp(LOWEST_M, HIGHEST_M)

    def image_losses(self, maps: Tensor, target: Tensor) -> Tensor:
        """Return the scale-invariant log loss, f[P, B]."""
        valid = self.valid(target)
        g = maps.squeeze(2) - torch.where(valid, target, 1).log()
        mean = mean_over_valid(g, valid)
        square = mean_over_valid(g.square(), valid)
        squared = square - (1 - VARIANCE_FOCUS) * mean.square()
        # the root has no gradient at 0
        return torch.where(squared > 0, squared.clamp(min=1e-12).sqrt(), 0)

    def image_sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return what an image adds to the sums: 1 and its scores, then its squared errors and pixels, f[P, 9]."""
        valid = self.valid(target[None])[0]
        sums = prediction.new_zeros(len(prediction), 2 + len(self.scores))
        if valid.any():
            predicted = prediction[:, valid]
            sums[:, 0] = 1
            sums[:, 1:-2] = self.image_scores(predicted, target[valid])
            sums[:, -2] = (predicted - target[valid]).square().sum(1)
            sums[:, -1] = valid.sum()
        return sums

    def dataset_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the scores f64[...]: means over images, and the error over all pixels."""
        if sums.shape[-1] != 2 + len(self.scores):
            raise UserError(
                "the sums of a depth run are of an older version, without the error over all pixels; make the run again"
            )
        images, *scores, squares, pixels = sums.double().unbind(-1)
        values = [score / images for score in scores]
        values.append((squares / pixels).sqrt())
        return dict(zip(self.scores, values, strict=True))

    def image_scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return RMSE, AbsRel, log10 and the three shares, f[P, 6]."""
        error = prediction - target
        ratio = torch.maximum(prediction / target, target / prediction)
        scores = [
            error.square().mean(1).sqrt(),
            (error.abs() / target).mean(1),
            ratio.log10().mean(1),
            *((ratio < 1.25**power).float().mean(1) for power in (1, 2, 3)),
        ]
        return torch.stack(scores, 1)

    def colorize(self, prediction: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """Return near pixels bright, far ones dark, from the nearest to the farthest of the map."""
        from matplotlib import colormaps

        log = np.log(prediction)
        nearest = np.nanmin(log)
        span = max(np.nanmax(log) - nearest, 1e-6)
        return colormaps["viridis_r"]((log - nearest) / span, bytes=True)[..., :3]
