"""Bootstrap over images: how far a score could be off had other images been drawn.

Shapes: R resamplings, N images, K classes, S sites.
"""

import torch
from torch import Tensor

from .metrics import Counts, Scores, scores

RESAMPLINGS = 2000


def bootstrap_weights(images: int, resamplings: int = RESAMPLINGS, seed: int = 0) -> Tensor:
    """f[R, N]: how often each image is drawn in each resampling. One set of weights for all that is compared makes the
    comparison paired."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (resamplings, images), generator=generator)
    return torch.zeros(resamplings, images).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))


def resampled_scores(counts: Counts, weights: Tensor) -> Scores:
    """Scores of every site under every resampling: miou, pacc f[R, S], iou f[R, S, K]."""
    weights = weights.double()
    total = lambda x: torch.einsum("rn,snk->rsk", weights, x.double())
    return scores(total(counts.intersection), total(counts.predicted), (weights @ counts.labelled.double())[:, None])


def dataset_scores(counts: Counts) -> Scores:
    """Scores of every site on the dataset: miou, pacc f[S], iou f[S, K]."""
    return scores(counts.intersection.sum(1), counts.predicted.sum(1), counts.labelled.sum(0))


def interval(estimate: float, resampled: Tensor) -> list[float]:
    """95% "basic" bootstrap interval of an estimate, from its values f[R] under resampling.

    The resampled values are reflected about the estimate: rare classes drop out of resampled mIoU, which pulls it down,
    and the reflection corrects for that where a percentile interval would double it.
    """
    low, high = resampled.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [2 * estimate - high, 2 * estimate - low]
