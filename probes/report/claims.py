"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

The numbers are those of measure.py; of drop and recovery at the optimum, those of strengths.py. What a column
lacks for a verdict says missing.py.
"""

from collections.abc import Mapping
from dataclasses import replace

from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.runs.comparable import knockout_difference
from probes.runs.formatting import Entry
from probes.runs.study import CONTROLS, StudyRuns
from probes.score.estimate import Estimate
from probes.tasks import SEGMENTATION

from .measure import KNOCKOUT, measure_study, random_part
from .missing import Case, why_no_draws, why_no_optimum, why_no_paper, why_unconverged
from .strengths import path_rows
from .truth import read_truth
from .verdicts import (
    HOLDS,
    column,
    conclude,
    correct_for_claims,
    judge,
    judge_draws,
    least_favourable,
    margin_column,
    path_column,
    untested,
)


def evaluate_claims(study: StudyRuns) -> list[Entry]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "finding", the conclusion after this correction; "truth" if it is known
    (`truth.py`); "text"; "control": the same number for the untrained model, or None; and "n": the images, for a
    knockout also the mistaken patches, that it is a mean over. "value", "ci95" and "holds" are those of the main runs,
    as the paper measures them.
    """
    measured = measure_study(study)
    path = path_rows(study)
    claims = []
    for claim in CLAIMS:
        for mask in study.main_runs:
            if (claim, mask) in measured[study.is_solved].trained:
                key = (claim, mask)
                rows = [row for row in path if (row["effect"], row["image_attention"]) == key]
                claims.append(
                    _entry(
                        Case(
                            study,
                            claim,
                            mask,
                            measured,
                            rows,
                        )
                    )
                )
    correct_for_claims(claims)
    return claims


def _entry(case: Case) -> Entry:
    claim = CLAIMS[case.claim]
    study = case.study
    measured = case.main.paper.json()
    control = case.measured[study.is_solved].untrained.get((case.claim, case.mask))
    truth = None
    if study.task.name == SEGMENTATION:  # what is known of a world is about its classes
        truth = read_truth(study.main_runs[case.mask], CLAIMS).get(case.claim)
    verdicts = {
        "paper": _paper_column(case),
        "optimum": _optimum_column(case),
        "beyond_random": _beyond_random_column(case),
    }
    return {
        "claim": case.claim,
        "image_attention": case.mask,
        **measured,
        "holds": judge(claim.sign, **measured) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, claim.unlearned),
        **({"truth": truth} if truth else {}),
        "text": claim.text.replace("mIoU", study.task.labels[study.task.score]),
        "control": control and control.paper.json(),
        "n": (case.main.judged or case.main.paper).about["n"],
    }


def _paper_column(case: Case) -> Entry:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    measured = case.main.paper.json()
    if not CLAIMS[case.claim].reads_probes:
        return column(case.sign, **measured)
    if reason := why_no_paper(case):
        return untested(reason, **measured, probes="solved")
    solved = case.study.solved.get(case.mask)
    is_same_effect = case.solved is not None
    if ANALYSIS_OF.get(case.claim) == KNOCKOUT and solved:
        is_same_effect &= not knockout_difference(case.study.main_runs[case.mask], solved)
    below = (case.solved.paper - case.main.paper).json() if is_same_effect else None
    return column(
        case.sign,
        **measured,
        probes="trained",
        below_optimum=below,
    )


def _optimum_column(case: Case) -> Entry:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes."""
    number = case.solved and case.solved.judged
    measured = number.json() if number and not case.path else {}
    if reason := why_no_optimum(case):
        return untested(reason, **measured)
    margin = case.study.task.margin
    if case.path:
        return path_column(case.sign, case.path, margin)
    return margin_column(
        case.sign,
        **measured,
        margin=margin,
    )


def _beyond_random_column(case: Case) -> Entry:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with both kinds of random LLMs.
    "same_draws_as" is the mask whose random adapters these are, since an adapter does not depend on the mask; "same_as"
    is the claim whose column this is.
    """
    if case.claim == "recovery_trained":  # minus other random weights, it is the recovery again
        recovery = replace(case, claim="recovery")
        return _beyond_random_column(recovery) | {"same_as": "recovery"}
    controls = CONTROLS[random_part(case.claim)]
    for solved in (True, False):
        compared = _compared(case, solved)
        if any((case.mask, control) in compared for control in controls):
            judged = _judge_beyond_random(case, compared, solved)
            if reason := _why_undecided(case, compared, solved):
                return untested(
                    reason,
                    judged["value"],
                    judged["ci95"],
                    probes=judged["probes"],
                )
            return judged
    reasons = [why_no_draws(case, control) for control in controls]
    return untested("; ".join(dict.fromkeys(reasons)))


def _compared(case: Case, solved: bool) -> dict[tuple[str, str], Estimate]:
    """Return the claim's number minus that of random draws, by mask and control, from probes of one kind."""
    if solved not in case.measured:
        return {}
    found = case.measured[solved].beyond_random
    return {
        (mask, control): number
        for (claim, mask, control), number in found.items()
        if claim == case.claim
    }


def _judge_beyond_random(
    case: Case,
    compared: Mapping[tuple[str, str], Estimate],
    solved: bool,
) -> Entry:
    """Return the column of the control beyond which the claim fares worst."""
    margin = case.study.task.margin
    # random adapters are the same under both masks
    is_pooled = random_part(case.claim) == "llm"
    columns = {}
    for control in CONTROLS[random_part(case.claim)]:
        key = (case.mask, control)
        if key in compared:
            others = [x for other, x in compared.items() if other != key and is_pooled]
            columns[control] = judge_draws(
                case.sign,
                compared[key],
                others,
                margin,
            )
    judged = least_favourable(case.sign, columns, margin)
    judged["probes"] = "solved" if solved else "trained"
    first_mask = next(iter(compared))[0]
    if not is_pooled and first_mask != case.mask:
        judged["same_draws_as"] = first_mask
    return judged


def _why_undecided(case: Case, compared: Mapping[tuple[str, str], Estimate], solved: bool) -> str:
    """Return why a number beyond random has no verdict: a control is missing, or draws have not converged; else ""."""
    controls = CONTROLS[random_part(case.claim)]
    missing = [control for control in controls if (case.mask, control) not in compared]
    if missing:
        return why_no_draws(case, missing[0])
    if not solved or not CLAIMS[case.claim].reads_probes:
        return ""
    draws = [draw for control in controls for draw in case.study.draws(control, solved=True)]
    runs = [draw[mask] for draw in draws for mask in case.masks if mask in draw]
    return why_unconverged(runs, case.claim)
