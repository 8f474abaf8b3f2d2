"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

All numbers of a study use the same bootstrap resamplings of its validation images, so differences between sites, masks
and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (`effects.py`). The paper chooses it on the
images that it is scored on, which favours models with many layers; tables keep that definition.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_bidir.common.bootstrap import Estimate
from probes.analyses.knockout.inference import class_effects, criterion_shifts, look_alikes
from probes.analyses.starvation.run import gap_estimates
from probes.results.probe_run import ProbeRun

from .effects import drop_and_recovery, subtract
from .path import path_rows
from .study import MASKS, Rows, Study
from .verdicts import (
    HOLDS,
    NO_CONTROL,
    NOT_CONVERGED,
    Effect,
    column,
    compare_to_draws,
    judge,
    mean_effect,
    no_verdict,
    path_column,
    unconverged,
)

log = logging.getLogger(__name__)

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


Key = tuple[str, str]  # claim, mask
Measured = dict[Key, Effect]


class Numbers(NamedTuple):
    """The number of each claim, from all runs of a study."""

    main: Measured  # trained probes where there are some, else solved ones
    control: Measured  # the same, of the untrained model
    solved: Measured
    draws: dict[tuple[str, bool], list[Measured]]  # by random part, and whether probes are solved


def evaluate_claims(study: Study) -> list[dict[str, Any]]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts": the three columns of `verdicts.py`; "supported": whether all of them are "holds";
    "text"; "control": the same number for the untrained model, or None; and "n": the images, for a knockout also the
    classes, that it is a mean over. "value", "ci95" and "holds" are those of the main runs.
    """
    numbers, path = _measure_all(study), path_rows(study)
    return [
        _entry(study, claim, mask, numbers, path)
        for claim in CLAIMS
        for mask in study.trained
        if (claim, mask) in numbers.main
    ]


def _entry(study: Study, claim: str, mask: str, numbers: Numbers, path: Rows) -> dict[str, Any]:
    (sign, text), key = CLAIMS[claim], (claim, mask)
    value, ci95 = mean_effect(numbers.main[key])
    path = [row for row in path if (row["effect"], row["image_attention"]) == key]
    verdicts = {
        "paper": _paper_column(study, claim, mask, numbers.main[key]),
        "optimum": _optimum_column(study, claim, mask, numbers, path),
        "beyond_random": _beyond_random_column(claim, mask, numbers),
    }
    return {
        "claim": claim,
        "image_attention": mask,
        "value": value,
        "ci95": ci95,
        "holds": judge(sign, ci95) == HOLDS,
        "verdicts": verdicts,
        "supported": all(entry["verdict"] == HOLDS for entry in verdicts.values()),
        "text": text,
        "control": _to_json(numbers.control.get(key)),
        "n": numbers.main[key].counts,
        **({"criterion_shifts": criterion_shifts(study.trained[mask])} if claim.startswith("knockout") else {}),
    }


def _to_json(effect: Effect | None) -> dict[str, Any] | None:
    return None if effect is None else dict(zip(("value", "ci95"), mean_effect(effect), strict=True))


def _measure_all(study: Study) -> Numbers:
    controls = {mask: study.control(mask) for mask in study.trained}
    main_site, solved_site = (next((run.peak_layer for run in r.values()), None) for r in (study.trained, study.solved))
    main = measure(study.trained, main_site)
    control = measure({mask: run for mask, run in controls.items() if run}, main_site)
    for mask in study.trained:
        if ("recovery", mask) in main.keys() & control.keys():
            pair = (measured["recovery", mask].estimate for measured in (main, control))
            main["recovery_trained", mask] = one(subtract(*pair), study.trained[mask])
    draws = {
        (part, solved): [measure(runs, site) for runs in study.random_draws(part, solved)]
        for part, sites in (("llm", (solved_site, main_site)), ("adapter", (None, None)))
        for solved, site in zip((True, False), sites, strict=True)
    }
    solved = main if study.solved == study.trained else measure(study.solved, solved_site)
    return Numbers(main, control, solved, draws)


def measure(runs: Mapping[str, ProbeRun], site: str | None) -> Measured:
    """Return the number of each claim from runs of one kind, by mask.

    Starvation compares the masks at `site`, the best layer of the trained model for its controls too, or not at all.
    """
    numbers: Measured = {}
    for mask, run in runs.items():
        estimates = drop_and_recovery(run.sites, run.counts, run.weights, run.groups)
        numbers |= {(claim, mask): one(estimate, run) for claim, estimate in estimates.items()}
        units = look_alikes(run)
        for claim, by_class in class_effects(run).items():
            if claim in CLAIMS:
                numbers[claim, mask] = Effect(
                    by_class, {"images": run.metrics["images"], "classes": len(by_class)}, units
                )
    pair = [runs[mask] for mask in MASKS if mask in runs]
    if len(pair) == 2 and pair[0].is_solved == pair[1].is_solved and all(site in run.sites for run in pair):
        for claim, estimate in gap_estimates(*pair, site).items():
            if math.isnan(estimate[0]):  # e.g. the padding of landscape photos
                log.warning("%s has no labelled pixel there; the claim %s is left out", pair[0].path, claim)
            else:
                numbers[claim, "causal"] = one(estimate, pair[0])
    return numbers


def one(estimate: Estimate, run: ProbeRun) -> Effect:
    """Return an effect that is one number over all images of a run."""
    return Effect({"": estimate}, {"images": run.metrics["images"]})


def _compared_masks(claim: str, mask: str) -> Sequence[str]:
    return MASKS if claim.startswith("starvation") else [mask]


def _paper_column(study: Study, claim: str, mask: str, effect: Effect) -> dict[str, Any]:
    """Return the column "paper": the main runs, if their probes were trained as the paper's and have converged."""
    value, ci95 = mean_effect(effect)
    for name in _compared_masks(claim, mask):
        if study.trained[name].is_solved:
            reason = "no run of `probes fit`, the paper's recipe; the number is that of solved probes"
            return no_verdict(NOT_CONVERGED, reason, value, ci95, probes="solved")
        if reason := unconverged(study.trained[name], study.solved.get(name), claim):
            return no_verdict(NOT_CONVERGED, reason, value, ci95, probes="trained")
    return column(CLAIMS[claim][0], value, ci95, probes="trained")


def _optimum_column(study: Study, claim: str, mask: str, numbers: Numbers, path: Rows) -> dict[str, Any]:
    """Return the column "optimum": along the path where the claim has one, else from the chosen solved probes."""
    sign, effect = CLAIMS[claim][0], numbers.solved.get((claim, mask))
    if at_optimum := [row for row in path if row["measure"] == "miou"]:
        return path_column(sign, at_optimum)
    if claim == "recovery_trained" and mask in study.solved:  # matched random LLMs are untrained models, too
        beyond_random = _beyond_random_column(claim, mask, numbers)
        solved = beyond_random.get("probes") == "solved"
        return beyond_random if solved else no_verdict(NO_CONTROL, "no solved run of an untrained model")
    if effect is None:
        missing = "no solved run" if mask not in study.solved else "the solved run has no such analysis"
        return no_verdict(NOT_CONVERGED, f"{missing}: run `probes solve`, and the analysis on its run")
    value, ci95 = mean_effect(effect)
    for name in _compared_masks(claim, mask):
        if reason := unconverged(study.solved[name], None, claim):
            return no_verdict(NOT_CONVERGED, reason, value, ci95)
    return column(sign, value, ci95)


def _beyond_random_column(claim: str, mask: str, numbers: Numbers) -> dict[str, Any]:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with random LLMs.
    """
    part = "adapter" if claim == "adapter_drop" else "llm"
    key, most = ("recovery" if claim == "recovery_trained" else claim, mask), 0
    for trained, solved in ((numbers.solved, True), (numbers.main, False)):
        draws = [measured[key] for measured in numbers.draws[part, solved] if key in measured]
        if key in trained and len(draws) >= 2 and set(trained[key].by_unit).intersection(*(d.by_unit for d in draws)):
            return compare_to_draws(CLAIMS[claim][0], trained[key], draws) | {
                "probes": "solved" if solved else "trained"
            }
        most = max(most, len(draws))
    return no_verdict(NO_CONTROL, f"draws of a random {part} with this analysis: {most}; an interval needs two")
