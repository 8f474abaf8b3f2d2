"""How far a score could be off had other images been drawn, and whether two runs on the same images differ.

Images of one scene or city resemble each other, so both can go by groups of images instead: whole groups are drawn, or
swapped, together.

Shapes: R resamplings, N images, K classes, S sites.
"""

import torch
from torch import Tensor

from .metrics import Counts, Scores, scores

RESAMPLINGS = 2000


def bootstrap_weights(
    images: int, resamplings: int = RESAMPLINGS, seed: int = 0, groups: Tensor | None = None
) -> Tensor:
    """f[R, N]: how often each image is drawn in each resampling. One set of weights for all that is compared makes the
    comparison paired.

    Args:
        images: N.
        resamplings: R.
        seed: Of the draws.
        groups: long[N], the group of each image: as many groups as there are are drawn, each with all its images
            (cluster bootstrap). A single group says nothing about others; then, as with None, images are drawn.
    """
    unit_of, units = _units(images, groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(units, (resamplings, units), generator=generator)
    times = torch.zeros(resamplings, units).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))
    return times[:, unit_of]


def random_swaps(images: int, permutations: int = RESAMPLINGS, seed: int = 0, groups: Tensor | None = None) -> Tensor:
    """f[1 + R, N] of 0 and 1: on which images the two conditions of a pair change names; on none in row 0.

    Args:
        images: N.
        permutations: R.
        seed: Of the draws.
        groups: long[N]; images of a group are swapped together. As in :func:`bootstrap_weights`.
    """
    unit_of, units = _units(images, groups)
    generator = torch.Generator().manual_seed(seed)
    swaps = torch.randint(2, (permutations, units), generator=generator)
    return torch.cat([torch.zeros(1, units), swaps])[:, unit_of]


def _units(images: int, groups: Tensor | None) -> tuple[Tensor, int]:
    """What is drawn or swapped as one: the unit of each image, long[N], and how many there are."""
    unit_of = torch.arange(images) if groups is None else torch.unique(groups, return_inverse=True)[1]
    units = int(unit_of.max()) + 1
    return (unit_of, units) if units > 1 else (torch.arange(images), images)


def resampled_scores(counts: Counts, weights: Tensor) -> Scores:
    """Scores of every site under every resampling: miou, pacc f[R, S], iou f[R, S, K]."""
    weights = weights.double()
    total = lambda x: torch.einsum("rn,snk->rsk", weights, x.double())
    return scores(total(counts.intersection), total(counts.predicted), (weights @ counts.labelled.double())[:, None])


def swapped_scores(a: Counts, b: Counts, swaps: Tensor) -> tuple[Scores, Scores]:
    """Scores of two conditions on the same images once they have changed names on some of them: f[R, S] each.

    Args:
        a, b: Counts of the same images at the same sites.
        swaps: f[R, N] from :func:`random_swaps`.
    """
    swaps, labelled = swaps.double(), a.labelled.sum(0)
    sums = []
    for x, y in ((a.intersection, b.intersection), (a.predicted, b.predicted)):
        x, y = x.double(), y.double()
        moved = torch.einsum("rn,snk->rsk", swaps, y - x)
        sums.append((x.sum(1) + moved, y.sum(1) - moved))
    (a_right, b_right), (a_predicted, b_predicted) = sums
    return scores(a_right, a_predicted, labelled), scores(b_right, b_predicted, labelled)


def p_values(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Two-sided p-values of a permutation test, by site and corrected for there being many sites: f[S] each.

    The corrected ones compare each site with the largest difference of any site in the same permutation, each in units
    of its own spread (max-T, single step, after Westfall and Young): under the null of no difference anywhere, the
    chance that any of them falls below alpha is alpha, however the sites hang together.

    Args:
        differences: f[1 + R, S]; row 0 is what was observed, the others are permuted. It counts itself, so that the
            smallest value possible is 1 / (1 + R) and none is zero.
    """
    size = differences.double().abs()
    spread = size.square().mean(0).sqrt()
    size = torch.where(spread > 0, size / spread, 0.0)
    reached = size[0] * (1 - 1e-9)  # the same sum in another order is not exactly the same
    return (size >= reached).double().mean(0), (size.amax(1, keepdim=True) >= reached).double().mean(0)


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
