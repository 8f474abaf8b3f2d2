"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

All numbers of a study use the same bootstrap resamplings of its validation images, so differences between sites, masks
and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (`effects.py`). The paper chooses it on the
images that it is scored on, which favours models with many layers; tables keep that definition.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_bidir.common.bootstrap import Estimate
from probes.analyses.knockout.inference import class_effects, criterion_shifts, look_alikes
from probes.analyses.starvation.run import gap_estimates
from probes.results.probe_run import ProbeRun

from .effects import drop_and_recovery
from .path import path_rows
from .study import MASKS, Rows, Study
from .verdicts import (
    HOLDS,
    Comparison,
    Effect,
    column,
    compare_to_draws,
    conclude,
    correct_for_claims,
    judge,
    judge_draws,
    mean_effect,
    minus_mean,
    path_column,
    unconverged,
    untested,
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
    comparisons: dict[tuple[str, str, str], Comparison]  # with draws, by claim, mask and kind of probes


def evaluate_claims(study: Study) -> list[dict[str, Any]]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "truth", if it is known; "text"; "control": the same number for the untrained
    model, or None; and "n": the images, for a knockout also the classes, that it is a mean over. "value", "ci95" and
    "holds" are those of the
    main runs.
    """
    numbers, path = _measure_all(study), path_rows(study)
    claims = [
        _entry(study, claim, mask, numbers, path)
        for claim in CLAIMS
        for mask in study.trained
        if (claim, mask) in numbers.main
    ]
    correct_for_claims(claims)
    return claims


def _entry(study: Study, claim: str, mask: str, numbers: Numbers, path: Rows) -> dict[str, Any]:
    (sign, text), key = CLAIMS[claim], (claim, mask)
    mean, control = mean_effect(numbers.main[key]), numbers.control.get(key)
    path = [row for row in path if (row["effect"], row["image_attention"], row["measure"]) == (*key, "miou")]
    verdicts = {
        "paper": _paper_column(study, claim, mask, numbers),
        "optimum": _optimum_column(study, claim, mask, numbers, path),
        "beyond_random": _beyond_random_column(study, claim, mask, numbers),
    }
    return {
        "claim": claim,
        "image_attention": mask,
        **mean.to_json(),
        "holds": judge(sign, mean.value, mean.ci95) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts),
        "text": text,
        "control": control and mean_effect(control).to_json(),
        "n": numbers.main[key].counts,
        **_truth(study.trained[mask], claim),
        **({"criterion_shifts": criterion_shifts(study.trained[mask])} if claim.startswith("knockout") else {}),
    }


def _truth(run: ProbeRun, claim: str) -> dict[str, str]:
    """Return {"truth": "planted" or "absent"} if the model's training.json has it for a claim on these images."""
    folder = Path(run.manifest["data"]["root"]).name
    found = run.training.get("truth", {}).get(folder, {})
    return {"truth": found[claim]} if claim in found else {}


def _measure_all(study: Study) -> Numbers:
    controls = {mask: study.control(mask) for mask in study.trained}
    main_site, solved_site = (next((run.peak_layer for run in r.values()), None) for r in (study.trained, study.solved))
    main = measure(study.trained, main_site)
    control = measure({mask: run for mask, run in controls.items() if run}, main_site)
    _add_recovery_trained(main, control)
    draws = {
        (part, solved): [measure(runs, site) for runs in study.random_draws(part, solved)]
        for part, sites in (("llm", (solved_site, main_site)), ("adapter", (None, None)))
        for solved, site in zip((True, False), sites, strict=True)
    }
    solved = main
    if study.solved != study.trained:
        solved = measure(study.solved, solved_site)
        _add_recovery_trained(solved, measure(study.solved_untrained, solved_site))
    return Numbers(main, control, solved, draws, _compare_all(main, solved, draws))


def _add_recovery_trained(trained: Measured, untrained: Measured) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, under the masks that both have."""
    for claim, mask in [*trained]:
        if claim == "recovery" and (claim, mask) in untrained:
            trained["recovery_trained", mask] = minus_mean(trained[claim, mask], [untrained[claim, mask]])


def _compare_all(
    main: Measured, solved: Measured, draws: dict[tuple[str, bool], list[Measured]]
) -> dict[tuple[str, str, str], Comparison]:
    """Return the comparison of each claim with at least two draws."""
    comparisons = {}
    for measured, kind in ((solved, "solved"), (main, "trained")):
        for key, effect in measured.items():
            of_draws = [draw[key] for draw in draws[_random_part(key[0]), kind == "solved"] if key in draw]
            if len(of_draws) >= 2 and set(effect.by_unit).intersection(*(draw.by_unit for draw in of_draws)):
                comparisons[*key, kind] = compare_to_draws(effect, of_draws)
    return comparisons


def _random_part(claim: str) -> str:
    """Return what is random in the controls of a claim."""
    return "adapter" if claim == "adapter_drop" else "llm"


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


def _paper_column(study: Study, claim: str, mask: str, numbers: Numbers) -> dict[str, Any]:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    effect = numbers.main[claim, mask]
    value, ci95, _ = mean_effect(effect)
    if study.trained[mask].is_solved:
        reason = f"the number is that of solved probes: run {_command('fit', study, mask)}, the paper's recipe"
        return untested(reason, value, ci95, probes="solved")
    solved = numbers.solved.get((claim, mask))
    shared = solved and solved.by_unit.keys() & effect.by_unit.keys()
    below = mean_effect(minus_mean(solved, [effect])).to_json() if shared else None
    return column(CLAIMS[claim][0], value, ci95, probes="trained", below_optimum=below)


def _optimum_column(study: Study, claim: str, mask: str, numbers: Numbers, path: Rows) -> dict[str, Any]:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes."""
    sign, solved = CLAIMS[claim][0], study.solved
    missing = [name for name in _compared_masks(claim, mask) if name not in solved]
    if missing:
        return untested(f"no solved probes: run {_command('solve', study, missing[0])}")
    reasons = [reason for name in _compared_masks(claim, mask) if (reason := unconverged(solved[name], claim))]
    if path:
        control = study.solved_untrained.get(mask)
        return path_column(sign, path, (reasons or [control and unconverged(control, claim)])[0])
    if claim == "recovery_trained":
        options = "--model.untrained '[adapter, llm]'"
        return untested(f"no solved run of the untrained model: run {_command('solve', study, mask, options)}")
    if (claim, mask) not in numbers.solved:
        return untested(f"no knockout of the solved probes: run `probes knockout --probes {solved[mask].path}`")
    mean = mean_effect(numbers.solved[claim, mask])
    return untested(reasons[0], mean.value, mean.ci95) if reasons else mean.column(sign)


def _beyond_random_column(study: Study, claim: str, mask: str, numbers: Numbers) -> dict[str, Any]:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with random LLMs. "same_draws_as" is the
    mask whose random adapters these are, since an adapter does not depend on the mask; "same_as" is the claim whose
    column this is.
    """
    if claim == "recovery_trained":  # minus other random weights, it is the recovery again
        return _beyond_random_column(study, "recovery", mask, numbers) | {"same_as": "recovery"}
    part, found = _random_part(claim), numbers.comparisons
    for kind in ("solved", "trained"):
        if comparison := found.get((claim, mask, kind)):
            masks = [of for name, of, probes in found if (name, probes) == (claim, kind)]
            if part == "adapter":
                same = {"same_draws_as": masks[0]} if masks[0] != mask else {}
                return judge_draws(CLAIMS[claim][0], comparison) | {"probes": kind} | same
            others = [found[claim, of, kind] for of in masks if of != mask]
            return judge_draws(CLAIMS[claim][0], comparison, others) | {"probes": kind}
    draws = {len(study.random_draws(part, solved)) for solved in (True, False)}
    if max(draws) >= 2:
        runs = f"the runs with a random {part}"
        if claim.startswith("knockout"):
            return untested(f"draws without this analysis: run `probes knockout` on {runs}, with the same --classes")
        return untested(f"fewer than two draws under the same mask: solve {runs} under each mask")
    options = "-c configs/probes/matched.yaml" if part == "llm" else "--model.untrained '[adapter]'"
    command = _command("solve", study, mask, f"{options} --model.draw {max(draws)}")
    again = ", and the same with --model.draw 1" * (max(draws) == 0)
    return untested(f"draws of a random {part}: {max(draws)}, two are needed: run {command}{again}")


def _command(command: str, study: Study, mask: str, options: str = "") -> str:
    """Return the command that makes the probes of a mask that a study lacks."""
    run = next((runs[mask] for runs in (study.trained, study.solved) if mask in runs), study.first)
    options = f"{options} " * bool(options) + f"--model.mllm {run.metrics['mllm']} --model.image_attention {mask}"
    return f"`probes {command} -c CONFIG {options} --data.root {run.manifest['data']['root']} --out RUN`"
