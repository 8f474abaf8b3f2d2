"""Drop-off, recovery and gains over layers with bootstrap values, so that differences between runs stay paired.

Shapes: R resamplings, S sites, N images, M sites of the effects: encoder, adapter and best layer
of an MLLM; first, last and best layer of a bare encoder.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import Estimate, interval
from probes.evaluation.bootstrap import dataset_scores, resampled_scores
from probes.evaluation.metrics import Counts
from probes.models.sites import ADAPTER, ENCODER, PATCHES

FOLDS = 10  # of validation images, to choose the best layer
BEST_LAYER = "best_layer"
LAST_LAYER = "last_layer"
# The sites whose scores each effect subtracts: the first minus the second.
EFFECTS = {
    "adapter_drop": (ENCODER, ADAPTER),
    "recovery": (BEST_LAYER, ADAPTER),
    "layer_gain": (BEST_LAYER, PATCHES),
    "over_last": (BEST_LAYER, LAST_LAYER),
}


def subtract(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b; both must use the same resamplings."""
    return a[0] - b[0], a[1] - b[1]


def select_sites(counts: Counts, sites: list[int]) -> Counts:
    """Return the counts at the given site indices."""
    return counts._replace(
        intersection=counts.intersection[sites], predicted=counts.predicted[sites]
    )


def image_folds(images: int, groups: Tensor | None = None) -> Tensor:
    """Return the fold i64[N] of each image, at most FOLDS; images of one of several groups i64[N] share a fold."""
    unit = torch.arange(images) if groups is None else torch.unique(groups, return_inverse=True)[1]
    return (unit if unit.any() else torch.arange(images)) % FOLDS


def cross_validated_layers(
    sites: list[str], counts: Counts, groups: Tensor | None = None
) -> Tensor | None:
    """Return for each image the index i64[N] of the LLM layer with the best mIoU on the images of all other folds.

    No image takes part in the choice of its own layer, so that the maximum over many layers is not biased upwards.
    None if no LLM layer was probed. A single image has no others: its layer is the best on itself.
    """

    def score(layers, weights):
        return resampled_scores(select_sites(counts, layers), weights).miou

    return choose_layers(sites, score, len(counts.labelled), groups)


def choose_layers(
    sites: list[str],
    score: Callable[[list[int], Tensor], Tensor],
    images: int,
    groups: Tensor | None,
) -> Tensor | None:
    """Return :func:`cross_validated_layers` for any score.

    Args:
        sites: Names of all sites.
        score: Returns the scores f[R, S] at site indices for weights of the images f[R, N]; higher is better.
        images: N.
        groups: Group i64[N] of each image, or None.
    """
    layers = [i for i, site in enumerate(sites) if site.startswith("layer_")]
    if not layers:
        return None
    fold = image_folds(images, groups)
    others = fold != torch.arange(int(fold.max()) + 1)[:, None]
    best = score(layers, others if others.any() else ~others).nan_to_num(-torch.inf).argmax(1)
    return torch.tensor(layers)[best][fold]


def sites_of_effects(
    sites: list[str], counts: Counts, groups: Tensor | None = None
) -> dict[str, Tensor]:
    """Return for each site that an effect reads, where probed, its index per image, i64[N]."""
    return sites_to_read(sites, cross_validated_layers(sites, counts, groups), len(counts.labelled))


def sites_to_read(sites: list[str], best: Tensor | None, images: int) -> dict[str, Tensor]:
    """Return :func:`sites_of_effects` for the best layer i64[N] of each image."""
    index = {site: sites.index(site) for site in (ENCODER, ADAPTER, PATCHES) if site in sites}
    if PATCHES in sites:  # a bare encoder
        index[LAST_LAYER] = max(i for i, site in enumerate(sites) if site.startswith("layer_"))
    fixed = {site: torch.full((images,), i) for site, i in index.items()}
    return fixed if best is None else fixed | {BEST_LAYER: best}


def read_sites(x: Tensor, site_of_image: dict[str, Tensor]) -> Tensor:
    """Return x[S, N, ...] at the sites of each image, [M, N, ...]."""
    return x[torch.stack(list(site_of_image.values())), torch.arange(x.shape[1])]


def effects_of_sites(estimates: dict[str, Estimate]) -> dict[str, Estimate]:
    """Return the effects of `EFFECTS` whose sites have estimates."""
    return {
        name: subtract(estimates[a], estimates[b])
        for name, (a, b) in EFFECTS.items()
        if {a, b} <= set(estimates)
    }


def miou_estimates(
    counts: Counts, site_of_image: dict[str, Tensor], weights: Tensor
) -> dict[str, Estimate]:
    """Return the mIoU at the sites of the effects, for bootstrap weights f[R, N]."""

    def read(x):
        return read_sites(x, site_of_image)

    counts = counts._replace(
        intersection=read(counts.intersection), predicted=read(counts.predicted)
    )
    values = dataset_scores(counts).miou.tolist()
    resampled = resampled_scores(counts, weights).miou
    return {site: (values[i], resampled[:, i]) for i, site in enumerate(site_of_image)}


def drop_and_recovery(
    sites: list[str], counts: Counts, weights: Tensor, groups: Tensor | None = None
) -> dict[str, Estimate]:
    """Return the effects of `EFFECTS` on mIoU: drop-off and recovery of an MLLM, gains over layers of an encoder.

    The best layer is chosen by :func:`cross_validated_layers`, once, and kept under all bootstrap weights f[R, N]; the
    plain maximum over layers, the paper's definition, is "recovery" in the "summary" of metrics.json. An effect is
    missing if one of its sites was not probed.
    """
    site_of_image = sites_of_effects(sites, counts, groups)
    return effects_of_sites(miou_estimates(counts, site_of_image, weights)) if site_of_image else {}


def estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """Return a value and its 95% interval."""
    return {"value": estimate[0], "ci95": interval(*estimate)}
