"""Bidirectional against causal attention on the same images: differences, their intervals, and permutation tests.

Under the null the two runs are exchangeable on each image, so the test swaps their counts on a random half of the
images, the same ones at all sites. Where images come in groups (cities), both resampling and swaps go by group.

Source: Sec. 5.2, Fig. 8, of which the paper gives peaks without intervals.

Shapes: P permutations and the data as they are, in row 0; S sites.
"""

from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import RESAMPLINGS, interval, p_values, random_swaps
from probes.evaluation.bootstrap import dataset_scores, resampled_scores, swapped_scores
from probes.models.frozen_mllm import ADAPTER, ENCODER, FINAL_NORM

from .effects import at_sites, drop_and_recovery, minus
from .study import Study

ALPHA = 0.05


def paired(study: Study, permutations: int = RESAMPLINGS) -> dict[str, Any] | None:
    """What results.json says under "paired"; None unless the trained model was probed under both masks.

    "sites" are the sites that both runs have, each with the difference of mIoU, its 95% interval, and two-sided
    p-values, alone and corrected for the number of sites. "effects" are drop-off and recovery; their intervals keep
    each run's best layer, while the test looks for it again in every permutation.
    """
    if study.pair() is None:
        return None
    causal, bidirectional = study.pair()
    sites = [site for site in causal.sites if site in bidirectional.sites and site != FINAL_NORM]
    counts = [at_sites(run.counts, [run.sites.index(site) for site in sites]) for run in (causal, bidirectional)]
    weights, groups, seed = causal.weights, causal.groups, causal.metrics["seed"]
    value = dataset_scores(counts[1]).miou - dataset_scores(counts[0]).miou
    drawn = resampled_scores(counts[1], weights).miou - resampled_scores(counts[0], weights).miou
    swapped = [
        scored.miou for scored in swapped_scores(*counts, random_swaps(len(weights[0]), permutations, seed, groups))
    ]
    raw, corrected = p_values(swapped[1] - swapped[0])
    units = causal.metrics["images"] if groups is None else len(torch.unique(groups))
    return {
        "difference": "bidirectional - causal",
        "images": causal.metrics["images"],
        "groups": None if groups is None else units,
        "permutations": permutations,
        "smallest_p": max(1 / (1 + permutations), 2.0 ** (1 - units)),
        "sites": [
            {"site": site, "difference": v, "ci95": interval(v, drawn[:, i]), "p": p, "p_corrected": q}
            for i, (site, v, p, q) in enumerate(
                zip(sites, value.tolist(), raw.tolist(), corrected.tolist(), strict=True)
            )
        ],
        "effects": _effects(sites, counts, weights, swapped),
    }


def _effects(sites: list[str], counts: list, weights: Tensor, swapped: list[Tensor]) -> list[dict[str, Any]]:
    """Differences of drop-off and recovery."""
    causal, bidirectional = (drop_and_recovery(sites, found, weights) for found in counts)
    layers = [i for i, site in enumerate(sites) if site.startswith("layer_")]
    of_miou = {
        "adapter_drop": lambda miou: miou[:, sites.index(ENCODER)] - miou[:, sites.index(ADAPTER)],
        "recovery": lambda miou: miou[:, layers].amax(1) - miou[:, sites.index(ADAPTER)],
    }
    entries = []
    for name in causal:
        value, drawn = minus(bidirectional[name], causal[name])
        permuted = of_miou[name](swapped[1]) - of_miou[name](swapped[0])
        entry = {"effect": name, "difference": value, "ci95": interval(value, drawn)}
        entries.append(entry | {"p": p_values(permuted[:, None])[0].item()})
    return entries
