"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

All numbers of a study use the same bootstrap resamplings of its validation images, so differences between sites, masks
and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (`effects.py`). The paper chooses it on the
images that it is scored on, which favours models with many layers; tables keep that definition.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

from llava_bidir.common.configs import config_names
from probes.analyses import ANALYSES
from probes.analyses.base import Claim
from probes.analyses.knockout.contrasts import control_of, patch_contrasts, rate_effects
from probes.analyses.routes.effects import claimed_routes
from probes.analyses.starvation.run import gap_estimates
from probes.results.formatting import Rows
from probes.results.probe_run import ProbeRun
from probes.results.study import MASKS, StudyRuns

from .effects import drop_and_recovery, estimate_to_json, subtract
from .strengths import path_rows
from .truth import read_truth
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
    margin_column,
    path_column,
    unconverged,
    untested,
)

log = logging.getLogger(__name__)

CLAIMS: dict[str, Claim] = {
    "adapter_drop": Claim(
        +1,
        "Segmentation drops at the adapter: encoder mIoU minus adapter mIoU (Sec. 3.1)",
        "adapter drop",
    ),
    "recovery": Claim(
        +1,
        "LLM layers recover it after the adapter: best layer's mIoU minus the adapter's (Sec. 3.2)",
        "recovery",
    ),
    "recovery_trained": Claim(
        +1,
        "The recovery comes from training: recovery minus that of the untrained model",
        "recovery from training",
    ),
    "layer_gain": Claim(
        +1,
        "The encoder's layers make patches readable: best layer's mIoU minus that of the patch embeddings",
        "best layer − patch embeddings",
    ),
    "over_last": Claim(
        +1,
        "A layer reads better than the last one: best layer's mIoU minus the last layer's",
        "best layer − last layer",
        unlearned="also in random layers",  # true of where to read, whatever made it so
    ),
    **{name: claim for analysis in ANALYSES.values() for name, claim in analysis.claims.items()},
}

# whose numbers depend on the model alone
WITHOUT_PROBES = {
    name for analysis in ANALYSES.values() if not analysis.reads_probes for name in analysis.claims
}

Key = tuple[str, str]  # claim, mask
Measured = dict[Key, Effect]


class Numbers(NamedTuple):
    """The number of each claim, from all runs of a study."""

    main: Measured  # trained probes where there are some, else solved ones
    control: Measured  # the same, of the untrained model
    solved: Measured
    # with draws, by claim, mask and kind of probes
    comparisons: dict[tuple[str, str, str], Comparison]
    tokens: str  # "random" or "matched": what a knockout blocks in place of a class


def evaluate_claims(study: StudyRuns) -> list[dict[str, Any]]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "truth" if it is known (`truth.py`); "text"; "control": the same number for the
    untrained model, or None; and "n": the images, for a knockout also the mistaken patches, that it is a mean over.
    "value", "ci95" and "holds" are those of the main runs, as the paper measures them.
    """
    numbers = _measure_all(study)
    path = path_rows(study)
    claims = [
        _entry(study, claim, mask, numbers, path)
        for claim in CLAIMS
        for mask in study.trained
        if (claim, mask) in numbers.main
    ]
    correct_for_claims(claims)
    return claims


def _entry(study: StudyRuns, claim: str, mask: str, numbers: Numbers, path: Rows) -> dict[str, Any]:
    sign, text, _, unlearned = CLAIMS[claim]
    key = (claim, mask)
    run = study.trained[mask]
    number = numbers.main[key]
    control = numbers.control.get(key)
    truth = read_truth(run, CLAIMS).get(claim)
    path = [row for row in path if (row["effect"], row["image_attention"]) == key]
    verdicts = {
        "paper": _paper_column(study, claim, mask, numbers),
        "optimum": _optimum_column(study, claim, mask, numbers, path),
        "beyond_random": _beyond_random_column(study, claim, mask, numbers),
    }
    measured = estimate_to_json(number.in_paper)
    return {
        "claim": claim,
        "image_attention": mask,
        **measured,
        "holds": judge(sign, **measured) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, unlearned),
        **({"truth": truth} if truth else {}),
        "text": text,
        "control": control and estimate_to_json(control.in_paper),
        "n": number.counts,
    }


def _measure_all(study: StudyRuns) -> Numbers:
    controls = {mask: run for mask in study.trained if (run := study.control(mask))}
    tokens = control_of(study.members)
    main_site, solved_site = (
        next((run.peak_layer for run in r.values()), None) for r in (study.trained, study.solved)
    )
    main = measure(study.trained, main_site, tokens)
    control = measure(controls, main_site, tokens)
    _add_recovery_trained(main, control)
    solved = main
    if study.solved != study.trained:
        solved = measure(study.solved, solved_site, tokens)
        _add_recovery_trained(solved, measure(study.solved_untrained, solved_site, tokens))
    comparisons = {}
    for kind, measured, site in (("solved", solved, solved_site), ("trained", main, main_site)):
        draws = {
            part: [
                measure(runs, site, tokens) for runs in study.random_draws(part, kind == "solved")
            ]
            for part in ("llm", "adapter")
        }
        for key, effect in measured.items():
            of_draws = [draw[key].estimate for draw in draws[_random_part(key[0])] if key in draw]
            if effect.estimate and len(of_draws) >= 2 and all(of_draws):
                comparisons[*key, kind] = compare_to_draws(effect.estimate, of_draws)
    return Numbers(main, control, solved, comparisons, tokens)


def _add_recovery_trained(trained: Measured, untrained: Measured) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, under the masks that both have."""
    for claim, mask in [*trained]:
        if claim == "recovery" and (claim, mask) in untrained:
            own = trained[claim, mask]
            other = untrained[claim, mask].estimate
            trained["recovery_trained", mask] = own._replace(estimate=subtract(own.estimate, other))


def _random_part(claim: str) -> str:
    """Return what is random in the controls of a claim."""
    return "adapter" if claim == "adapter_drop" else "llm"


def measure(runs: Mapping[str, ProbeRun], site: str | None, tokens: str) -> Measured:
    """Return the number of each claim from runs of one kind, by mask.

    Starvation compares the masks at `site`, the best layer of the trained model for its controls too, or not at all.
    Knockouts of classes are compared with blocked `tokens`, "random" or "matched".
    """
    numbers: Measured = {}
    for mask, run in runs.items():
        images = {"images": run.metrics["images"]}
        estimates = drop_and_recovery(run.sites, run.counts, run.weights, run.groups)
        numbers |= {
            (claim, mask): Effect(estimate, images) for claim, estimate in estimates.items()
        }
        contrasts = patch_contrasts(run, tokens)
        for claim, in_paper in rate_effects(run).items():
            effect = Effect(None, images, in_paper)
            if claim in contrasts:
                estimate, counts, over_pairs = contrasts[claim]
                effect = Effect(estimate, counts, in_paper, over_pairs)
            numbers[claim, mask] = effect
        for claim, (estimate, counts) in claimed_routes(run).items():
            numbers[claim, mask] = Effect(estimate, counts)
    pair = [runs[mask] for mask in MASKS if mask in runs]
    if (
        len(pair) == 2
        and pair[0].is_solved == pair[1].is_solved
        and all(site in run.sites for run in pair)
    ):
        for claim, estimate in gap_estimates(*pair, site).items():
            if math.isnan(estimate[0]):  # e.g. the padding of landscape photos
                log.warning(
                    "%s has no labelled pixel there; the claim %s is left out", pair[0].path, claim
                )
            else:
                numbers[claim, "causal"] = Effect(estimate, {"images": pair[0].metrics["images"]})
    return numbers


def _compared_masks(claim: str, mask: str) -> Sequence[str]:
    return MASKS if claim.startswith("starvation") else [mask]


def _paper_column(study: StudyRuns, claim: str, mask: str, numbers: Numbers) -> dict[str, Any]:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    measured = estimate_to_json(estimate := numbers.main[claim, mask].in_paper)
    if study.trained[mask].is_solved and claim not in WITHOUT_PROBES:
        reason = f"the number is that of solved probes: run {_command('fit', study, mask)}, the paper's recipe"
        return untested(reason, **measured, probes="solved")
    if claim in WITHOUT_PROBES:
        return column(CLAIMS[claim].sign, **measured)
    solved = numbers.solved.get((claim, mask))
    below = solved and estimate_to_json(subtract(solved.in_paper, estimate))
    return column(CLAIMS[claim].sign, **measured, probes="trained", below_optimum=below)


def _optimum_column(
    study: StudyRuns, claim: str, mask: str, numbers: Numbers, path: Rows
) -> dict[str, Any]:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes."""
    sign = CLAIMS[claim].sign
    solved = study.solved
    missing = [name for name in _compared_masks(claim, mask) if name not in solved]
    if missing:
        return untested(f"no solved probes: run {_command('solve', study, missing[0])}")
    if path:
        controls = [study.solved_untrained.get(mask)] if claim == "recovery_trained" else []
        return path_column(sign, path, unconverged([solved[mask], *controls], claim))
    if claim == "recovery_trained":
        options = "--model.untrained '[adapter, llm]'"
        return untested(
            f"no solved run of the untrained model: run {_command('solve', study, mask, options)}"
        )
    if (claim, mask) not in numbers.solved:
        if claim in WITHOUT_PROBES:
            return untested(f"run `probes routes --probes {quote(str(solved[mask].path))}`")
        return untested(
            f"no knockout of the solved probes: run `probes knockout --probes {quote(str(solved[mask].path))}`"
        )
    effect = numbers.solved[claim, mask]
    if effect.estimate is None:
        return untested(_no_contrast(solved[mask]))
    measured = estimate_to_json(effect.estimate)
    if claim in WITHOUT_PROBES:
        return margin_column(sign, **measured)
    if reason := unconverged([solved[name] for name in _compared_masks(claim, mask)], claim):
        return untested(reason, **measured)
    more = {"over_pairs": effect.over_pairs, "tokens": numbers.tokens} if effect.over_pairs else {}
    return margin_column(sign, **measured, **more)


def _no_contrast(run: ProbeRun) -> str:
    return (
        f"the knockout of {run.path} has no two classes that are mistaken for each other, in enough images: run "
        f"`probes knockout --probes {quote(str(run.path))} --classes` with both classes of a pair"
    )


def _beyond_random_column(
    study: StudyRuns, claim: str, mask: str, numbers: Numbers
) -> dict[str, Any]:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with random LLMs. "same_draws_as" is the
    mask whose random adapters these are, since an adapter does not depend on the mask; "same_as" is the claim whose
    column this is.
    """
    if claim == "recovery_trained":  # minus other random weights, it is the recovery again
        return _beyond_random_column(study, "recovery", mask, numbers) | {"same_as": "recovery"}
    part = _random_part(claim)
    found = numbers.comparisons
    for kind in ("solved", "trained"):
        if comparison := found.get((claim, mask, kind)):
            masks = [of for name, of, probes in found if (name, probes) == (claim, kind)]
            others = [found[claim, of, kind] for of in masks if of != mask and part == "llm"]
            same = {"same_draws_as": masks[0]} if part == "adapter" and masks[0] != mask else {}
            judged = judge_draws(CLAIMS[claim].sign, comparison, others) | {"probes": kind} | same
            draws = study.random_draws(part, solved=True) if kind == "solved" else []
            runs = [draw.get(name) for draw in draws for name in _compared_masks(claim, mask)]
            reason = None if claim in WITHOUT_PROBES else unconverged(runs, claim)
            return (
                untested(reason, judged["value"], judged["ci95"], probes=kind) if reason else judged
            )
    draws = {len(study.random_draws(part, solved)) for solved in (True, False)}
    name = part if study.first.has_llm else "encoder"
    if max(draws) >= 2:
        runs = f"the runs with a random {name}"
        if claim in WITHOUT_PROBES:
            return untested(f"draws without this analysis: run `probes routes` on {runs}")
        if claim.startswith("knockout"):
            if numbers.main[claim, mask].estimate is None:
                return untested(_no_contrast(study.trained[mask]))
            return untested(
                f"draws without this analysis: run `probes knockout` on {runs}, with the same --classes"
            )
        return untested(f"fewer than two draws under the same mask: solve {runs} under each mask")
    options = "-c matched" if part == "llm" else "--model.untrained '[adapter]'"
    if not study.first.has_llm:
        options = "--model.untrained '[encoder]' --model.match update"
    command = _command("solve", study, mask, f"{options} --model.draw {max(draws)}")
    again = ", and the same with --model.draw 1" * (max(draws) == 0)
    return untested(f"draws of a random {name}: {max(draws)}, two are needed: run {command}{again}")


def _command(command: str, study: StudyRuns, mask: str, options: str = "") -> str:
    """Return the command that makes the probes of a mask that a study lacks."""
    run = next((runs[mask] for runs in (study.trained, study.solved) if mask in runs), study.first)
    mask_option = f" --model.image_attention {quote(mask)}" if run.has_llm else ""
    model = f"--model.mllm {quote(run.metrics['mllm'])}{mask_option}"
    options = f"{options} " * bool(options) + model
    data = run.manifest["data"]
    config = data["dataset"] if data["dataset"] in config_names() else "CONFIG"
    return f"`probes {command} -c {config} {options} --data.root {quote(data['root'])} --out RUN`"
