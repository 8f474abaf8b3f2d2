"""Drop-off and recovery as numbers: values with their resampled values, so that differences of them are paired.

Shapes: R resamplings, S sites.
"""

from typing import Any

from torch import Tensor

from llava_bidir.common.bootstrap import interval
from probes.evaluation.bootstrap import dataset_scores, resampled_scores
from probes.evaluation.metrics import Counts, peak_layer
from probes.models.frozen_mllm import ADAPTER, ENCODER

Estimate = tuple[float, Tensor]  # a value and its resampled values f[R]


def minus(a: Estimate, b: Estimate) -> Estimate:
    return a[0] - b[0], a[1] - b[1]


def at_sites(counts: Counts, sites: list[int]) -> Counts:
    """Of some sites only, by index."""
    return counts._replace(intersection=counts.intersection[sites], predicted=counts.predicted[sites])


def drop_and_recovery(sites: list[str], counts: Counts, weights: Tensor) -> dict[str, Estimate]:
    """How far mIoU falls from encoder to adapter ("adapter_drop") and climbs from there to the best layer ("recovery").

    The best layer is that of the whole split, in every resampling. An effect whose sites were not probed is left out.

    Args:
        sites: Names of the counts' sites.
        counts: Of one run or recipe.
        weights: f[R, N] of the bootstrap.
    """
    miou = dict(zip(sites, dataset_scores(counts).miou.tolist(), strict=True))
    peak = peak_layer(miou)
    known = [site for site in (ENCODER, ADAPTER, peak) if site in miou]
    resampled = resampled_scores(at_sites(counts, [sites.index(site) for site in known]), weights).miou
    at = {site: (miou[site], resampled[:, i]) for i, site in enumerate(known)}
    pairs = {"adapter_drop": (ENCODER, ADAPTER), "recovery": (peak, ADAPTER)}
    return {name: minus(at[a], at[b]) for name, (a, b) in pairs.items() if a in at and b in at}


def as_json(estimate: Estimate, sign: int = +1) -> dict[str, Any]:
    """Value, interval, and whether all of the interval lies on the claimed side of zero; nothing else decides."""
    ci95 = interval(*estimate)
    return {"value": estimate[0], "ci95": ci95, "holds": min(sign * bound for bound in ci95) > 0}
