"""Evaluate the paper's claims, each as one number with a 95% interval, from the counts of probe runs.

A claim holds if its interval lies entirely on the claimed side of zero. All numbers of a study use the same bootstrap
resamplings of its validation images, so differences between sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (`effects.py`). The paper chooses it on the
images that it is scored on, which favours models with many layers; tables keep that definition.
"""

from typing import Any

from probes.analyses.knockout.effects import later_half, min_confused_patches, read_cases
from probes.results.probe_run import ProbeRun

from .effects import Estimate, drop_and_recovery, estimates_to_json, subtract
from .study import Study

# claim -> (claimed sign, text)
CLAIMS: dict[str, tuple[int, str]] = {
    "adapter_drop": (+1, "Segmentation drops at the adapter: encoder mIoU minus adapter mIoU (Sec. 3.1)"),
    "recovery": (+1, "LLM layers recover it after the adapter: best layer's mIoU minus the adapter's (Sec. 3.2)"),
    "recovery_trained": (+1, "The recovery comes from training: recovery minus that of the untrained model"),
    "starvation": (+1, "Patch 0 starves under causal attention: bidirectional minus causal accuracy (Sec. 5.1)"),
    "starvation_first_row": (+1, "The first row starves under causal attention: bidirectional minus causal accuracy"),
    "knockout_incorrect": (-1, "Blocking the wrong class speeds correction: change in wrong patches left (Sec. 4.1)"),
    "knockout_correct": (+1, "Blocking the correct class impairs correction: change in wrong patches left (Sec. 4.2)"),
    "knockout_specificity": (+1, "The effect is class-specific: correct minus wrong class, less the same at random"),
}  # fmt: skip


def evaluate_claims(study: Study) -> list[dict[str, Any]]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "text", "control": the same number for the untrained model, or None, and "n": the images, for a
    knockout also the cases (an image and a class), that it is a mean over.
    """
    numbers, counts = [], {}
    for mask, run in study.trained.items():
        cases = read_cases(run, min_confused_patches(run))
        counts[mask] = {"images": run.metrics["images"]}, cases and cases.counts
        trained, untrained = _effects(run), _effects(study.control(mask))
        if "recovery" in trained and "recovery" in untrained:
            trained["recovery_trained"] = subtract(trained["recovery"], untrained["recovery"])
        numbers.append((mask, estimates_to_json(trained), estimates_to_json(untrained)))
    numbers.append(("causal", _first_gaps(study.starvation()), _first_gaps(study.starvation(untrained=True))))
    return [
        {"claim": claim, "image_attention": mask, **trained[claim]}
        | {"holds": min(sign * bound for bound in trained[claim]["ci95"]) > 0}
        | {"text": text, "control": untrained.get(claim), "n": counts[mask][claim.startswith("knockout")]}
        for claim, (sign, text) in CLAIMS.items()
        for mask, trained, untrained in numbers
        if claim in trained
    ]


def _effects(run: ProbeRun | None) -> dict[str, Estimate]:
    if run is None:
        return {}
    effects = drop_and_recovery(run.sites, run.counts, run.weights, run.groups)
    return effects | knockout_effects(run, min_confused_patches(run))


def _first_gaps(starvation: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    if starvation is None:
        return {}
    row = starvation["first_row"]
    return {
        "starvation": {"value": starvation["gap"][0], "ci95": starvation["gap_ci95"][0]},
        "starvation_first_row": {"value": row["gap"], "ci95": row["gap_ci95"]},
    }


def knockout_effects(run: ProbeRun, min_patches: int) -> dict[str, Estimate]:
    """Return the knockout effects on the share of wrong patches left, averaged over cases and the later layers.

    Cases with fewer than `min_patches` wrong patches at the adapter are skipped. Empty without a knockout.
    """
    cases = read_cases(run, min_patches)
    if cases is None:
        return {}
    later = {condition: later_half(rates) for condition, rates in cases.rates.items()}
    random = later["random_correct"] - later["random_incorrect"]
    effects = {
        "knockout_incorrect": later["incorrect"] - later["none"],
        "knockout_correct": later["correct"] - later["none"],
        "knockout_specificity": later["correct"] - later["incorrect"] - random,
    }
    means = {name: cases.mean(effect, run.weights) for name, effect in effects.items()}
    return {name: (mean.item(), resampled) for name, (mean, resampled) in means.items()}
