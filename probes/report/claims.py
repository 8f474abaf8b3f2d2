"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

A claim is a difference of effects: vectors of a number and its resamplings, which the runs and their analyses wrote
(probes/analyses/effects.py). All use the same resamplings of the study's validation images, so differences between
sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (probes/evaluation/layer_effects.py). The paper
chooses it on the images that it is scored on, which favours models with many layers; tables keep that definition.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from shlex import quote
from types import MappingProxyType
from typing import Any, NamedTuple

from probes.analyses import ANALYSES
from probes.analyses.claims import ANALYSIS_OF, CLAIMS, WITHOUT_PROBES
from probes.analyses.effects import read_effects
from probes.analyses.knockout.contrasts import MIN_IMAGES
from probes.evaluation.estimate import Estimate
from probes.results.comparable import check_pair, knockout_difference
from probes.results.finished_run import FinishedRun
from probes.results.formatting import Rows
from probes.results.run_command import format_command
from probes.results.steps import study_folder
from probes.results.study import CONTROLS, MASKS, StudyRuns
from probes.tasks import SEGMENTATION

from .strengths import path_rows
from .truth import read_truth
from .verdicts import (
    HOLDS,
    column,
    compare_to_draws,
    conclude,
    correct_for_claims,
    judge,
    judge_draws,
    least_favourable,
    margin_column,
    path_column,
    untested,
    why_unconverged,
)

log = logging.getLogger(__name__)

KNOCKOUT = "knockout"  # the analysis
MATCHES = {"random": "update", "permuted": "permuted"}  # `model.match` of a control

Key = tuple[str, str]  # claim, mask


class Numbers(NamedTuple):
    """The number of each claim and mask from runs of one kind; a claim can have one without the other."""

    paper: dict[Key, Estimate]  # as the paper measures it
    judged: dict[Key, Estimate]  # at the optimum and beyond random


class StudyNumbers(NamedTuple):
    """The number of each claim, from all runs of a study."""

    main: Numbers  # trained probes where there are some, else solved ones
    control: Numbers  # the same, of the untrained model
    solved: Numbers
    # minus those of random draws, by claim, mask, kind of probes and control
    beyond_random: dict[tuple[str, str, str, str], Estimate]
    tokens: str  # "random" or "matched": what a knockout blocks in place of a class


def evaluate_claims(study: StudyRuns) -> list[dict[str, Any]]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "finding", the conclusion after this correction; "truth" if it is known
    (`truth.py`); "text"; "control": the same number for the untrained model, or None; and "n": the images, for a
    knockout also the mistaken patches, that it is a mean over. "value", "ci95" and "holds" are those of the main runs,
    as the paper measures them.
    """
    numbers = measure_study(study)
    path = path_rows(study)
    claims = [
        _entry(study, claim, mask, numbers, path)
        for claim in CLAIMS
        for mask in study.main_runs
        if (claim, mask) in numbers.main.paper
    ]
    correct_for_claims(claims)
    return claims


def _entry(
    study: StudyRuns,
    claim: str,
    mask: str,
    numbers: StudyNumbers,
    path: Rows,
) -> dict[str, Any]:
    sign = CLAIMS[claim].sign
    key = (claim, mask)
    number = numbers.main.paper[key]
    control = numbers.control.paper.get(key)
    truth = None
    if study.task.name == SEGMENTATION:  # what is known of a world is about its classes
        truth = read_truth(study.main_runs[mask], CLAIMS).get(claim)
    along_path = [row for row in path if (row["effect"], row["image_attention"]) == key]
    verdicts = {
        "paper": _paper_column(study, claim, mask, numbers),
        "optimum": _optimum_column(study, claim, mask, numbers, along_path),
        "beyond_random": _beyond_random_column(study, claim, mask, numbers),
    }
    measured = number.json()
    return {
        "claim": claim,
        "image_attention": mask,
        **measured,
        "holds": judge(sign, **measured) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, CLAIMS[claim].unlearned),
        **({"truth": truth} if truth else {}),
        "text": CLAIMS[claim].text,
        "control": control and control.json(),
        "n": numbers.main.judged.get(key, number).about["n"],
    }


def measure_study(study: StudyRuns) -> StudyNumbers:
    """Return the number of each claim, from all runs of a study: differences of the vectors that the runs wrote."""
    effects = {str(run.path): read_effects(run) for run in study.members}
    tokens = compared_tokens(effects.values())

    def numbers_of(runs: Mapping[str, FinishedRun], site: str | None) -> Numbers:
        return measure_runs(runs, effects, site, tokens)

    controls = {mask: run for mask in study.main_runs if (run := study.control(mask))}
    main_site = next((run.peak_layer for run in study.main_runs.values()), None)
    main = numbers_of(study.main_runs, main_site)
    control = numbers_of(controls, main_site)
    _add_recovery_trained(main, control)
    solved_site = main_site
    solved = main
    if study.solved != study.main_runs:
        solved_site = next((run.peak_layer for run in study.solved.values()), None)
        solved = numbers_of(study.solved, solved_site)
        _add_recovery_trained(solved, numbers_of(study.solved_untrained, solved_site))
    kinds = [("solved", solved, solved_site)]
    if not study.first.is_solved:
        kinds.append(("trained", main, main_site))
    beyond = {}
    for kind, numbers, site in kinds:
        is_solved = kind == "solved"
        draws = {
            arm: [numbers_of(runs, site) for runs in study.draws_of(arm, is_solved)]
            for arm in {*CONTROLS["llm"], *CONTROLS["adapter"]}
        }
        for key, estimate in numbers.judged.items():
            for arm in CONTROLS[_random_part(key[0])]:
                if _draws_of_other_knockouts(study, *key, arm, is_solved):
                    continue
                of_draws = [draw.judged.get(key) for draw in draws[arm] if key in draw.paper]
                if len(of_draws) >= 2 and all(of_draws):
                    beyond[*key, kind, arm] = compare_to_draws(estimate, of_draws)
    return StudyNumbers(main, control, solved, beyond, tokens)


def _draws_of_other_knockouts(
    study: StudyRuns,
    claim: str,
    mask: str,
    control: str,
    solved: bool,
) -> str | None:
    """Return why the knockouts of a control are not comparable with the trained one's; None for other claims."""
    if ANALYSIS_OF.get(claim) != KNOCKOUT:
        return None
    trained = (study.solved if solved else study.main_runs).get(mask)
    if trained is None:
        return None
    draws = [runs[mask] for runs in study.draws_of(control, solved) if mask in runs]
    return next(filter(None, (knockout_difference(trained, run) for run in draws)), None)


def compared_tokens(effects: Iterable[Mapping[str, Estimate]]) -> str:
    """Return which other tokens are compared with: "matched" ones if all knockouts of the runs have them."""
    controls = [x["knockout_correct"].about["controls"] for x in effects if "knockout_correct" in x]
    if controls and all("matched" in names for names in controls):
        return "matched"
    return "random"


def _add_recovery_trained(trained: Numbers, untrained: Numbers) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, under the masks that both have."""
    for claim, mask in list(trained.judged):
        if claim == "recovery" and (claim, mask) in untrained.judged:
            difference = trained.judged[claim, mask] - untrained.judged[claim, mask]
            trained.paper["recovery_trained", mask] = difference
            trained.judged["recovery_trained", mask] = difference


def _random_part(claim: str) -> str:
    """Return what is random in the controls of a claim."""
    return "adapter" if claim == "adapter_drop" else "llm"


def measure_runs(
    runs: Mapping[str, FinishedRun],
    effects: Mapping[str, Mapping[str, Estimate]],
    site: str | None,
    tokens: str,
) -> Numbers:
    """Return the number of each claim from runs of one kind.

    Args:
        runs: By mask.
        effects: The effects of each run by name, by its folder.
        site: Where the masks are compared: the best layer of the trained model, for its controls too; or nowhere.
        tokens: What knockouts of classes are compared with, "random" or "matched".
    """
    numbers = Numbers({}, {})
    for mask, run in runs.items():
        of_run = effects[str(run.path)]
        for name, claim in CLAIMS.items():
            if name not in of_run:
                continue
            numbers.paper[name, mask] = _with_images(of_run[name], run)
            judged = of_run.get(f"{name}@{tokens}") if claim.against_tokens else of_run[name]
            if judged:
                numbers.judged[name, mask] = _with_images(judged, run)
    pair = [runs[mask] for mask in MASKS if mask in runs]
    both = len(pair) == 2 and pair[0].is_solved == pair[1].is_solved
    if both and all(site in run.sites for run in pair):
        check_pair(*pair)
        causal, bidirectional = (effects[str(run.path)] for run in pair)
        _add_differences_of_masks(
            numbers,
            causal,
            bidirectional,
            site,
            pair[0],
        )
    return numbers


def _with_images(estimate: Estimate, run: FinishedRun) -> Estimate:
    """Return an estimate that says what it is a mean over: of a run's own scores, the images."""
    count = {"images": run.metrics["images"]}
    if run.groups is not None:
        count["groups"] = len(run.groups.unique())
    return replace(estimate, about={"n": count} | dict(estimate.about))


def _add_differences_of_masks(
    numbers: Numbers,
    causal: Mapping[str, Estimate],
    bidirectional: Mapping[str, Estimate],
    site: str,
    run: FinishedRun,
) -> None:
    """Add the claims that are differences of masks, from the effects of both at a site; `run` is the causal one."""
    for name, claim in CLAIMS.items():
        effect = f"{claim.between_masks}@{site}"
        if effect not in causal or effect not in bidirectional:
            continue
        difference = _with_images(bidirectional[effect] - causal[effect], run)
        if math.isnan(difference.value):  # e.g. the padding of landscape photos
            log.warning("%s has no labelled pixel there; the claim %s is left out", run.path, name)
            continue
        numbers.paper[name, "causal"] = difference
        numbers.judged[name, "causal"] = difference


def _compared_masks(claim: str, mask: str) -> Sequence[str]:
    return MASKS if CLAIMS[claim].between_masks else [mask]


def _paper_column(
    study: StudyRuns,
    claim: str,
    mask: str,
    numbers: StudyNumbers,
) -> dict[str, Any]:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    estimate = numbers.main.paper[claim, mask]
    measured = estimate.json()
    if claim in WITHOUT_PROBES:
        return column(CLAIMS[claim].sign, **measured)
    if study.main_runs[mask].is_solved:
        remedy = f"run {_command('fit', study, mask)}, the paper's recipe"
        if study_folder(study.first.path) and study.task.name == SEGMENTATION:
            remedy = "give the same `probes study` again with `--fit`, the paper's recipe"
        reason = f"the number is that of solved probes: {remedy}"
        return untested(reason, **measured, probes="solved")
    solved = numbers.solved.paper.get((claim, mask))
    if ANALYSIS_OF.get(claim) == KNOCKOUT and mask in study.solved:
        if knockout_difference(study.main_runs[mask], study.solved[mask]):
            solved = None  # not the same effect
    below = solved and (solved - estimate).json()
    return column(
        CLAIMS[claim].sign,
        **measured,
        probes="trained",
        below_optimum=below,
    )


def _optimum_column(
    study: StudyRuns,
    claim: str,
    mask: str,
    numbers: StudyNumbers,
    path: Rows,
) -> dict[str, Any]:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes."""
    sign = CLAIMS[claim].sign
    solved = study.solved
    missing = [name for name in _compared_masks(claim, mask) if name not in solved]
    if missing:
        return untested(f"no solved probes: run {_command('solve', study, missing[0])}")
    if path:
        controls = [study.solved_untrained.get(mask)] if claim == "recovery_trained" else []
        reason = why_unconverged([solved[mask], *controls], claim)
        return path_column(sign, path, reason, study.task.margin)
    if claim == "recovery_trained":
        untrained = {"model.untrained": ["adapter", "llm"]}
        return untested(
            f"no solved run of the untrained model: run {_command('solve', study, mask, untrained)}"
        )
    if (claim, mask) not in numbers.solved.paper:
        return untested(_not_analysed(claim, solved[mask]))
    estimate = numbers.solved.judged.get((claim, mask))
    if estimate is None:
        return untested(_no_contrast(solved[mask]))
    measured = estimate.json()
    if claim in WITHOUT_PROBES:
        return margin_column(sign, **measured, margin=study.task.margin)
    if reason := why_unconverged([solved[name] for name in _compared_masks(claim, mask)], claim):
        return untested(reason, **measured)
    more = {"margin": study.task.margin}
    if CLAIMS[claim].against_tokens:
        more["tokens"] = numbers.tokens
    return margin_column(sign, **measured, **more)


def _not_analysed(claim: str, run: FinishedRun) -> str:
    """Return why a claim of an analysis has no number at the optimum, and what to do."""
    name = ANALYSIS_OF[claim]
    missing = f"no {name} of the solved probes: run"
    if name not in ANALYSES:
        return f"{missing} it on {run.path}"
    options = " --classes auto:4" if name == KNOCKOUT else ""
    return f"{missing} `probes {name} --probes {quote(str(run.path))}{options}`"


def _no_contrast(run: FinishedRun) -> str:
    if run.metrics["images"] < MIN_IMAGES:
        return (
            f"{run.path} has {run.metrics['images']} validation images, and a knockout is judged from cases in "
            f"{MIN_IMAGES} or more"
        )
    return (
        f"the knockout of {run.path} has no two classes that are mistaken for each other, in enough images: run "
        f"`probes knockout --probes {quote(str(run.path))} --classes` with both classes of a pair"
    )


def _beyond_random_column(
    study: StudyRuns,
    claim: str,
    mask: str,
    numbers: StudyNumbers,
) -> dict[str, Any]:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with both kinds of random LLMs.
    "same_draws_as" is the mask whose random adapters these are, since an adapter does not depend on the mask; "same_as"
    is the claim whose column this is.
    """
    if claim == "recovery_trained":  # minus other random weights, it is the recovery again
        return _beyond_random_column(study, "recovery", mask, numbers) | {"same_as": "recovery"}
    part = _random_part(claim)
    for kind in ("solved", "trained"):
        found = {
            (of, control): compared
            for (name, of, probes, control), compared in numbers.beyond_random.items()
            if (name, probes) == (claim, kind)
        }
        controls = [control for control in CONTROLS[part] if (mask, control) in found]
        if not controls:
            continue
        sign = CLAIMS[claim].sign
        margin = study.task.margin
        columns = {}
        for control in controls:
            compared = found[mask, control]
            # random adapters are the same under both masks
            others = [x for key, x in found.items() if key != (mask, control) and part == "llm"]
            columns[control] = judge_draws(sign, compared, others, margin)
        judged = least_favourable(sign, columns, margin) | {"probes": kind}
        first = next(iter(found))[0]
        if part == "adapter" and first != mask:
            judged["same_draws_as"] = first
        reasons = [
            _why_no_draws(study, claim, mask, control, numbers)
            for control in CONTROLS[part]
            if control not in controls
        ]
        if kind == "solved" and claim not in WITHOUT_PROBES:
            draws = [runs for control in controls for runs in study.draws_of(control, solved=True)]
            runs = [draw.get(name) for draw in draws for name in _compared_masks(claim, mask)]
            reasons.append(why_unconverged(runs, claim))
        if reason := next(filter(None, reasons), None):
            return untested(reason, judged["value"], judged["ci95"], probes=kind)
        return judged
    reasons = [_why_no_draws(study, claim, mask, control, numbers) for control in CONTROLS[part]]
    return untested("; ".join(dict.fromkeys(reasons)))


def _why_no_draws(
    study: StudyRuns,
    claim: str,
    mask: str,
    control: str,
    numbers: StudyNumbers,
) -> str:
    """Return why a claim was not compared with a control, and the command that changes it."""
    part = _random_part(claim)
    name = part if study.first.has_llm else "encoder"
    adjective = "permuted" if control == "permuted" else "random"
    kinds = {True, study.first.is_solved}  # trained probes are compared with trained ones only
    count = max(len(study.draws_of(control, solved)) for solved in kinds)
    if count >= 2:
        which_runs = f"the runs with a {adjective} {name}"
        if CLAIMS[claim].against_tokens and (claim, mask) not in numbers.main.judged:
            return _no_contrast(study.main_runs[mask])
        if claim in ANALYSIS_OF and not CLAIMS[claim].between_masks:
            solved = study.first.is_solved
            if reason := _draws_of_other_knockouts(study, claim, mask, control, solved):
                return reason
            draws = [runs[mask] for runs in study.draws_of(control, solved) if mask in runs]
            analysed = [run for run in draws if run.analysis("knockout.json")]
            if CLAIMS[claim].against_tokens and draws and len(analysed) == len(draws):
                return _no_contrast(draws[0])
            return _draws_without(ANALYSIS_OF[claim], which_runs)
        return f"fewer than two draws under the same mask: solve {which_runs} under each mask"
    too_few = f"draws of a {adjective} {name}: {count}, two are needed"
    if study_folder(study.first.path):
        again = f"{too_few}: give the same `probes study` again with `--draws 2`"
        return f"{again}, or with {control}0 and {control}1 among its `--arms`"
    weights: dict[str, Any] = {"model.untrained": [name]}
    if control in MATCHES:
        weights["model.match"] = MATCHES[control]
    command = _command("solve", study, mask, weights | {"model.draw": count})
    again = ", and the same with --model.draw 1" if count == 0 else ""
    return f"{too_few}: run {command}{again}"


def _draws_without(analysis: str, runs: str) -> str:
    """Return that random models lack an analysis, and what to do."""
    command = f"`probes {analysis}`" if analysis in ANALYSES else analysis
    options = "--classes" if analysis == KNOCKOUT else "options"
    return f"draws without this analysis: run {command} on {runs}, with the same {options}"


def _command(
    command: str,
    study: StudyRuns,
    mask: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the command that makes the probes of a mask that a study lacks, with the settings of one that it has."""
    kinds = (study.main_runs, study.solved)
    if command == "solve":  # with the options of the solver
        kinds = (study.solved, study.main_runs)
    run = next((runs[mask] for runs in kinds if mask in runs), study.first)
    if run.has_llm:
        changes = {"model.image_attention": mask, **changes}
    return f"`{format_command(run, command, changes)}`"
