"""Drop-off and recovery with bootstrap values, so that differences between runs stay paired.

Shapes: R resamplings, S sites.
"""

from typing import Any

from torch import Tensor

from llava_bidir.common.bootstrap import interval
from probes.evaluation.bootstrap import dataset_scores, resampled_scores
from probes.evaluation.metrics import Counts, peak_layer
from probes.models.sites import ADAPTER, ENCODER

Estimate = tuple[float, Tensor]  # a value and its resampled values f[R]


def subtract(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b; both must use the same resamplings."""
    return a[0] - b[0], a[1] - b[1]


def select_sites(counts: Counts, sites: list[int]) -> Counts:
    """Return the counts at the given site indices."""
    return counts._replace(intersection=counts.intersection[sites], predicted=counts.predicted[sites])


def drop_and_recovery(sites: list[str], counts: Counts, weights: Tensor) -> dict[str, Estimate]:
    """Return the effects "adapter_drop" (encoder minus adapter mIoU) and "recovery" (best layer minus adapter).

    The best layer of `counts` is chosen once on the full split and kept under all bootstrap weights f[R, N]. An effect
    is missing if one of its sites was not probed.
    """
    miou = dict(zip(sites, dataset_scores(counts).miou.tolist(), strict=True))
    peak = peak_layer(miou)
    probed = [site for site in (ENCODER, ADAPTER, peak) if site in miou]
    resampled = resampled_scores(select_sites(counts, [sites.index(site) for site in probed]), weights).miou
    estimates = {site: (miou[site], resampled[:, i]) for i, site in enumerate(probed)}
    pairs = {"adapter_drop": (ENCODER, ADAPTER), "recovery": (peak, ADAPTER)}
    return {name: subtract(estimates[a], estimates[b]) for name, (a, b) in pairs.items() if {a, b} <= set(probed)}


def estimates_to_json(estimates: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Return each value and its 95% interval."""
    return {name: {"value": estimate[0], "ci95": interval(*estimate)} for name, estimate in estimates.items()}
