"""The paper's claims, each as one number with an interval, from the counts of probe runs.

A claim holds if its 95% interval lies on the claimed side of zero; nothing else decides. All numbers of a study come
from the same resamplings of its validation images, so that differences between sites, masks and controls are paired.

Shapes: R resamplings, N images, S sites, C cases of a knockout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mllm import ADAPTER, ENCODER
from ..results import ProbeRun, peak_layer
from ..statistics import bootstrap_weights, dataset_scores, interval, resampled_scores
from .study import Study, optional_tensors

# claim -> (the sign that the paper claims, what it says)
CLAIMS: dict[str, tuple[int, str]] = {
    "adapter_drop": (+1, "Segmentation drops at the adapter: encoder mIoU minus adapter mIoU (Sec. 3.1)"),
    "recovery": (+1, "LLM layers recover it: best layer's mIoU minus the adapter's (Sec. 3.2)"),
    "recovery_trained": (+1, "Training makes them recover: the recovery minus that of the same model untrained"),
    "starvation": (+1, "Patch 0 starves under causal attention: bidirectional minus causal accuracy (Sec. 5.1)"),
    "starvation_first_row": (+1, "So does the first row of patches: bidirectional minus causal accuracy"),
    "knockout_incorrect": (-1, "Hiding the wrong class speeds self-correction: change in wrong patches left (Sec. 4.1)"),
    "knockout_correct": (+1, "Hiding the right class impairs it: change in wrong patches left (Sec. 4.2)"),
    "knockout_specificity": (+1, "It matters which patches: right minus wrong, less the same for as many random ones"),
}  # fmt: skip

# A knockout's claims are about confusions of whole regions, so images count in which at least this share of the patches
# is wrongly predicted c at the adapter. Single patches on a boundary are another matter; tables give other thresholds.
CONFUSED_SHARE = 1 / 8

Estimate = tuple[float, Tensor]  # a value and its resampled values f[R]


def claims_of(study: Study) -> list[dict[str, Any]]:
    """All claims that the study's runs can speak to: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each also says "text", and "control": the same number of the untrained model, where there is one.
    """
    entries = []
    for mask, run in study.trained.items():
        control = study.untrained.get(mask)
        trained, untrained = _probing(run), _probing(control) if control else {}
        if untrained:
            trained["recovery_trained"] = _minus(trained["recovery"], untrained["recovery"])
        trained |= _knockout(run)
        untrained |= _knockout(control) if control else {}
        entries += [_entry(name, mask, trained[name], untrained.get(name)) for name in CLAIMS if name in trained]
    entries += _starvation_entries(study)
    order = list(CLAIMS)
    return sorted(entries, key=lambda entry: order.index(entry["claim"]))


def _entry(name: str, mask: str, estimate: Estimate, control: Estimate | None) -> dict[str, Any]:
    sign, text = CLAIMS[name]
    value, ci95 = estimate[0], interval(*estimate)
    return {
        "claim": name,
        "image_attention": mask,
        "value": value,
        "ci95": ci95,
        "holds": min(sign * bound for bound in ci95) > 0,
        "text": text,
        "control": None if control is None else {"value": control[0], "ci95": interval(*control)},
    }


def _minus(a: Estimate, b: Estimate) -> Estimate:
    return a[0] - b[0], a[1] - b[1]


def _probing(run: ProbeRun) -> dict[str, Estimate]:
    """Drop and recovery of mIoU; the best layer is that of the whole split, in every resampling."""
    weights = bootstrap_weights(run.metrics["images"], seed=run.metrics["seed"])
    miou, resampled = dataset_scores(run.counts).miou, resampled_scores(run.counts, weights).miou
    at = lambda site: (miou[run.sites.index(site)].item(), resampled[:, run.sites.index(site)])
    peak = peak_layer(dict(zip(run.sites, miou.tolist(), strict=True)))
    found = {}
    if {ENCODER, ADAPTER} <= set(run.sites):
        found["adapter_drop"] = _minus(at(ENCODER), at(ADAPTER))
    if ADAPTER in run.sites and peak:
        found["recovery"] = _minus(at(peak), at(ADAPTER))
    return found


def _starvation_entries(study: Study) -> list[dict[str, Any]]:
    trained, untrained = study.starvation(), study.starvation(untrained=True)
    if trained is None:
        return []
    entries = []
    for name, gap_of in (
        ("starvation", lambda facts: (facts["gap"][0], facts["gap_ci95"][0])),
        ("starvation_first_row", lambda facts: (facts["first_row"]["gap"], facts["first_row"]["gap_ci95"])),
    ):
        value, ci95 = gap_of(trained)
        entries.append(
            {
                "claim": name,
                "image_attention": "causal",  # the mask that starves
                "value": value,
                "ci95": ci95,
                "holds": ci95[0] > 0,
                "text": CLAIMS[name][1],
                "control": None if untrained is None else dict(zip(("value", "ci95"), gap_of(untrained), strict=True)),
            }
        )
    return entries


def knockout_effects(
    run: ProbeRun, min_patches: int, effect: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Estimate, int] | None:
    """An effect on the remaining rate in the later half of the layers, averaged over cases of all classes.

    Args:
        run: With a knockout.
        min_patches: Cases with fewer wrong patches at the adapter are left out.
        effect: From rates f[C] by condition to the effect f[C].

    Returns:
        The mean with its resamplings (of images, which can hold several cases), and C; None if there is no case.
    """
    tensors = optional_tensors(run, "knockout.safetensors")
    effects, images = [], []
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        kept = tensors[f"{name}/patches"] >= min_patches
        rates = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}/") and value.ndim == 2:
                later = value.shape[1] // 2 + value.shape[1] % 2  # layers 0..L: the later half of 1..L
                rates[key.rpartition("/")[2]] = value[kept, later:].mean(1)
        effects.append(effect(rates))
        images.append(tensors[f"{name}/image"][kept])
    if not effects or not len(torch.cat(images)):
        return None
    effects, images = torch.cat(effects).double(), torch.cat(images)
    weights = bootstrap_weights(run.metrics["images"], seed=run.metrics["seed"]).double()[:, images]
    return (effects.mean().item(), (weights @ effects) / weights.sum(1)), len(effects)


EFFECTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "knockout_incorrect": lambda rate: rate["incorrect"] - rate["none"],
    "knockout_correct": lambda rate: rate["correct"] - rate["none"],
    "knockout_specificity": lambda rate: (
        rate["correct"] - rate["incorrect"] - (rate["random_correct"] - rate["random_incorrect"])
    ),
}


def _knockout(run: ProbeRun) -> dict[str, Estimate]:
    tokens = run.metrics["grid"][0] * run.metrics["grid"][1]
    found = {name: knockout_effects(run, round(CONFUSED_SHARE * tokens), effect) for name, effect in EFFECTS.items()}
    return {name: result[0] for name, result in found.items() if result is not None}
