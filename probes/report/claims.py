"""The paper's claims, each as one number with an interval, from the counts of probe runs.

A claim holds if its 95% interval lies on the claimed side of zero; nothing else decides. All numbers of a study come
from the same resamplings of its validation images, so that differences between sites, masks and controls are paired.
"""

from typing import Any

from llava_bidir.common.bootstrap import interval
from probes.analyses.knockout.effects import read_cases
from probes.results.probe_run import ProbeRun

from .effects import Estimate, as_json, drop_and_recovery, minus
from .study import Study

# claim -> (the sign that the paper claims, what it says)
CLAIMS: dict[str, tuple[int, str]] = {
    "adapter_drop": (+1, "Segmentation drops at the adapter: encoder mIoU minus adapter mIoU (Sec. 3.1)"),
    "recovery": (+1, "LLM layers recover it: best layer's mIoU minus the adapter's (Sec. 3.2)"),
    "recovery_trained": (+1, "Training makes them recover: the recovery minus that of the same model untrained"),
    "starvation": (+1, "Patch 0 starves under causal attention: bidirectional minus causal accuracy (Sec. 5.1)"),
    "starvation_first_row": (+1, "So does the first row of patches: bidirectional minus causal accuracy"),
    "knockout_incorrect": (-1, "Hiding the wrong class speeds correction: change in wrong patches left (Sec. 4.1)"),
    "knockout_correct": (+1, "Hiding the right class impairs it: change in wrong patches left (Sec. 4.2)"),
    "knockout_specificity": (+1, "Which class is hidden matters: right minus wrong, less the same at random"),
}  # fmt: skip

# A knockout's claims are about confusions of whole regions, so images count in which at least this share of the patches
# is wrongly predicted c at the adapter. Single patches on a boundary are another matter; tables give other thresholds.
CONFUSED_SHARE = 1 / 8


def claims_of(study: Study) -> list[dict[str, Any]]:
    """All claims that the study's runs can speak to: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each also says "text", and "control": the same number of the untrained model, where there is one.
    """
    entries = []
    for mask, run in study.trained.items():
        control = study.untrained.get(mask)
        trained, untrained = _probing(run), _probing(control) if control else {}
        if "recovery" in trained and "recovery" in untrained:
            trained["recovery_trained"] = minus(trained["recovery"], untrained["recovery"])
        trained |= knockout_effects(run, confused_patches(run))
        untrained |= knockout_effects(control, confused_patches(control)) if control else {}
        entries += [_entry(name, mask, trained[name], untrained.get(name)) for name in CLAIMS if name in trained]
    entries += _starvation_entries(study)
    order = list(CLAIMS)
    return sorted(entries, key=lambda entry: order.index(entry["claim"]))


def _entry(name: str, mask: str, estimate: Estimate, control: Estimate | None) -> dict[str, Any]:
    sign, text = CLAIMS[name]
    return {
        "claim": name,
        "image_attention": mask,
        **as_json(estimate, sign),
        "text": text,
        "control": None if control is None else {"value": control[0], "ci95": interval(*control)},
    }


def _probing(run: ProbeRun) -> dict[str, Estimate]:
    return drop_and_recovery(run.sites, run.counts, run.weights)


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


def confused_patches(run: ProbeRun) -> int:
    """How many patches an image must have wrong to count for the knockout's claims."""
    return round(CONFUSED_SHARE * run.metrics["grid"][0] * run.metrics["grid"][1])


def knockout_effects(run: ProbeRun, min_patches: int) -> dict[str, Estimate]:
    """Effects on the share of wrong patches that remains in the later half of the layers, averaged over cases.

    Args:
        run: With a knockout; without one there are no effects.
        min_patches: Cases with fewer wrong patches at the adapter are left out.
    """
    cases = read_cases(run, min_patches)
    if cases is None:
        return {}
    layers = next(iter(cases.rates.values())).shape[1] - 1
    later = {condition: rates[:, layers // 2 + 1 :].mean(1) for condition, rates in cases.rates.items()}
    random = later["random_correct"] - later["random_incorrect"]
    effects = {
        "knockout_incorrect": later["incorrect"] - later["none"],
        "knockout_correct": later["correct"] - later["none"],
        "knockout_specificity": later["correct"] - later["incorrect"] - random,
    }
    found = {}
    for name, effect in effects.items():
        mean, resampled = cases.mean(effect, run.weights)
        found[name] = (mean.item(), resampled)
    return found
