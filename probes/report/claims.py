"""Evaluate the paper's claims, each as one number with a 95% interval and a verdict in three columns (verdicts.py).

The numbers, and what a column lacks for a verdict, are those of measure.py.

DATA/truth.json says what is known about a world: {claim: "planted" or "absent"}. A checkpoint's training.json has the
same under "truth", by the name of the folder of images, since what is true of a model depends on what it sees. It wins
over that of the data.

Of several seeds, the unit is a training, not an image. The interval of a joint number is for the mean over seeds:
Student's t over the values of the seeds. Their spread includes that of random draws, which each seed has for itself,
and of images where each seed has its own. Images that seeds share are not part of it; their interval and that over
seeds are then added as the sides of a right angle.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.imports import HINT
from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.ops.quantiles import student_quantile
from probes.runs.compare import knockout_difference
from probes.runs.formatting import Entry
from probes.runs.read import FinishedRun
from probes.runs.study import StudyRuns, studies_by_model
from probes.score.estimate import Estimate
from probes.tasks import SEGMENTATION

from .measure import (
    KNOCKOUT,
    Case,
    measure_study,
    why_no_draws,
    why_no_optimum,
    why_no_paper,
    why_undecided,
)
from .verdicts import (
    COLUMNS,
    HOLDS,
    MARGIN,
    UNTESTED,
    column,
    conclude,
    correct_for_claims,
    judge,
    judge_draws,
    path_column,
    untested,
    worst_of,
)

TRUTH_FILE = "truth.json"
TRUTHS = ("planted", "absent")
OTHER_CLAIMS = ("answers", "depth")  # which a report does not judge


def evaluate_claims(study: StudyRuns) -> list[Entry]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "finding", the conclusion after this correction; "truth" if it is known
    (:func:`read_truth`); "text"; "control": the same number for the untrained model, or None; and "n": the images, for
    a knockout also the mistaken patches, that it is a mean over. "value", "ci95" and "holds" are those of the main
    runs, as the paper measures them.
    """
    measured = measure_study(study)
    found = measured[study.is_solved].trained
    cases = [
        Case(
            study,
            name,
            mask,
            measured,
        )
        for name in CLAIMS
        for mask in study.main_runs
    ]
    claims = [_evaluate(case) for case in cases if (case.name, case.mask) in found]
    correct_for_claims(claims)
    return claims


def _evaluate(case: Case) -> Entry:
    study = case.study
    measured = case.main.paper.json()
    control = case.measured[study.is_solved].untrained.get((case.name, case.mask))
    truth = None
    if study.task.name == SEGMENTATION:  # what is known of a world is about its classes
        truth = read_truth(study.main_runs[case.mask]).get(case.name)
    verdicts = {
        "paper": _paper_column(case),
        "optimum": _optimum_column(case),
        "beyond_random": _beyond_random_column(case),
    }
    return {
        "claim": case.name,
        "image_attention": case.mask,
        **measured,
        "holds": judge(case.claim.sign, **measured) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, case.claim.unlearned),
        **({"truth": truth} if truth else {}),
        "text": case.claim.text.replace("mIoU", study.task.labels[study.task.score]),
        "control": control and control.paper.json(),
        "n": (case.main.judged or case.main.paper).about["n"],
    }


def _paper_column(case: Case) -> Entry:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    measured = case.main.paper.json()
    if not case.claim.reads_probes:
        return column(case.claim.sign, **measured)
    if reason := why_no_paper(case):
        return untested(reason, **measured, probes="solved")
    below = case.solved and (case.solved.paper - case.main.paper).json()
    solved = case.study.solved.get(case.mask)
    if below and solved and ANALYSIS_OF.get(case.name) == KNOCKOUT:
        is_other = knockout_difference(case.study.main_runs[case.mask], solved)
        below = None if is_other else below
    return column(
        case.claim.sign,
        **measured,
        probes="trained",
        below_optimum=below,
    )


def _optimum_column(case: Case) -> Entry:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes."""
    rows = case.strengths()
    number = case.solved and case.solved.judged
    measured = number.json() if number and not rows else {}
    if reason := why_no_optimum(case, rows):
        return untested(reason, **measured)
    margin = case.study.task.margin
    if rows:
        return path_column(case.claim.sign, rows, margin)
    return column(case.claim.sign, **measured, margin=margin)


def _beyond_random_column(case: Case) -> Entry:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with both kinds of random LLMs.
    """
    if case.name == "recovery_trained":  # minus other random weights, it is the recovery again
        return _beyond_random_column(replace(case, name="recovery"))
    for solved in (True, False):
        compared = case.beyond_random(solved)
        if any(mask == case.mask for mask, _ in compared):
            judged = _judge_beyond_random(case, compared) | {
                "probes": "solved" if solved else "trained"
            }
            if reason := why_undecided(case, compared, solved):
                return untested(
                    reason,
                    judged["value"],
                    judged["ci95"],
                    probes=judged["probes"],
                )
            return judged
    reasons = [why_no_draws(case, control) for control in case.controls]
    return untested("; ".join(dict.fromkeys(reasons)))


def _judge_beyond_random(case: Case, compared: dict[tuple[str, str], Estimate]) -> Entry:
    """Return the column of the control beyond which the claim fares worst; "controls" has those of all.

    A model that has learned nothing resembles one kind of random weights and not another one: a random LLM whose
    attention is sharper than that of all draws of one kind can read more than these.
    """
    sign = case.claim.sign
    margin = case.study.task.margin
    is_pooled = case.name != "adapter_drop"  # random adapters are the same under both masks
    columns = {}
    for (mask, control), estimate in compared.items():
        if mask == case.mask:
            others = [x for key, x in compared.items() if key != (mask, control) and is_pooled]
            columns[control] = judge_draws(
                sign,
                estimate,
                others,
                margin,
            )
    named = [entry | {"control": control} for control, entry in columns.items()]
    return worst_of(sign, named, margin) | {"controls": columns}


def read_truth(run: FinishedRun) -> dict[str, str]:
    """Return the truth about each claim that the run's data or checkpoint record; {} for those that do not.

    Raises:
        UserError: One of them has another claim or value.
    """
    file = Path(run.manifest["data"]["root"]) / TRUTH_FILE
    of_model = run.training.get("truth", {}).get(file.parent.name, {})
    sources = {str(file): read_json(file) if file.is_file() else {}}
    sources[f"{run.path / 'manifest.json'}: mllm_training.truth"] = of_model
    for source, truth in sources.items():
        for claim, value in truth.items():
            if claim not in (*CLAIMS, *OTHER_CLAIMS):
                expected = ", ".join((*CLAIMS, *OTHER_CLAIMS))
                raise UserError(
                    f"{source}: there is no claim {claim!r}; expected one of {expected}; {HINT}"
                )
            if value not in TRUTHS:
                raise UserError(f"{source}: {claim} must be {' or '.join(TRUTHS)}, got {value!r}")
    return sources[str(file)] | of_model


# ------------------------------------------------------------------------------------------------ seeds
def joint_studies(studies: list[StudyRuns], claims: list[list[Entry]]) -> list[Entry]:
    """Return {"task", "model", "dataset", "has_llm", "seeds", "claims", "left_out"} of models with several seeds.

    Claims have the keys of `evaluate_claims` but "control", and "n" counts seeds; each column has "by_seed", the values
    of the seeds.
    """
    joint = []
    for members in studies_by_model(study for study in studies if study.seed is not None):
        of_members = [claims[i] for i, x in enumerate(studies) if any(x is y for y in members)]
        images = [study.first.manifest["data"]["fingerprint"] for study in members]
        shares_images = len(set(images)) < len(images)
        by_seed = dict(zip((x.seed for x in members), of_members, strict=True))
        about = {
            "task": members[0].task.name,
            "model": members[0].name,
            "dataset": members[0].dataset,
            "has_llm": members[0].first.has_llm,
            "seeds": list(by_seed),
        }
        joint.append(about | join_claims(by_seed, shares_images, members[0].task.margin))
    return joint


def join_claims(
    by_seed: dict[int, list[Entry]],
    shared_images: bool,
    margin: float,
) -> dict[str, list[Entry]]:
    """Return the "claims" of at least two seeds, and those that a seed lacks, "left_out" of it."""
    found: dict[tuple[str, str], dict[int, Entry]] = {}
    for seed, claims in by_seed.items():
        for claim in claims:
            found.setdefault((claim["claim"], claim["image_attention"]), {})[seed] = claim
    joint = []
    left_out = []
    for (name, mask), own in found.items():
        about = {
            "claim": name,
            "image_attention": mask,
        }
        if lacking := [seed for seed in by_seed if seed not in own]:
            left_out.append(about | {"lacking": lacking})
        if len(own) > 1:
            joint.append(
                about
                | _join_claim(
                    name,
                    own,
                    shared_images,
                    margin,
                )
            )
    correct_for_claims(joint)
    return {
        "claims": joint,
        "left_out": left_out,
    }


def _join_claim(
    name: str,
    by_seed: dict[int, Entry],
    shared_images: bool,
    margin: float,
) -> Entry:
    """Return the columns and the conclusion of a claim over seeds."""
    sign = CLAIMS[name].sign
    verdicts = {
        column_name: join_column(
            sign,
            {seed: claim["verdicts"][column_name] for seed, claim in by_seed.items()},
            shared_images,
            0.0 if column_name == "paper" else margin,
        )
        for column_name in COLUMNS
    }
    paper = verdicts["paper"]  # the numbers of the main runs
    # the seeds that every joint number is a mean over, of those that have the claim
    counts = [entry["seeds"] for entry in verdicts.values() if "seeds" in entry]
    truths = {claim.get("truth") for claim in by_seed.values()}
    return {
        "text": next(iter(by_seed.values()))["text"],
        "value": paper["value"],
        "ci95": paper["ci95"],
        "holds": paper["value"] is not None and judge(sign, paper["value"], paper["ci95"]) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, CLAIMS[name].unlearned),
        "n": {
            "seeds": min(counts, default=0),
            "of": len(by_seed),
        },
        **({"truth": truths.pop()} if len(truths) == 1 and None not in truths else {}),
    }


def join_column(
    sign: int,
    by_seed: dict[int, Entry],
    shared_images: bool,
    margin: float = MARGIN,
) -> Entry:
    """Return the column of all seeds that have a verdict from the same kind of probes, at least two.

    "by_seed" has the values of all seeds; "left_out" says why some are no part of the joint number.
    """
    tested = {seed: entry for seed, entry in by_seed.items() if entry["verdict"] != UNTESTED}
    judged = _same_probes(tested)
    missing = {
        seed: entry.get("reason", "other probes")
        for seed, entry in by_seed.items()
        if seed not in judged
    }
    more: Entry = {"by_seed": {seed: entry["value"] for seed, entry in by_seed.items()}}
    if missing:
        more["left_out"] = missing
    reason = "fewer than two seeds have a verdict"
    for seed, of_seed in [*missing.items()][:1]:
        reason += f"; seed {seed}: {of_seed}"
    entries = [*(judged if len(judged) > 1 else _same_probes(by_seed)).values()]
    if len(entries) < 2 or any(entry["value"] is None for entry in entries):
        return untested(reason, **more)
    more["seeds"] = len(entries)
    # each seed has draws of its own, so that their spread is part of that between seeds
    of_images = [(x["value"], x.get("ci95_without_draws", x["ci95"])) for x in entries]
    value, ci95 = mean_over_seeds(of_images, shared_images)
    if len(judged) < 2:
        return untested(
            reason,
            value,
            ci95,
            **more,
        )
    below = [x["below_optimum"] for x in entries if x.get("below_optimum")]
    if len(below) > 1:
        mean = mean_over_seeds([(x["value"], x["ci95"]) for x in below], shared_images)
        more["below_optimum"] = dict(zip(("value", "ci95"), mean, strict=True))
    return column(
        sign,
        value,
        ci95,
        margin,
        len(entries) - 1,
        **more,
    )


def _same_probes(by_seed: dict[int, Entry]) -> dict[int, Entry]:
    """Return the seeds whose probes are of the most frequent kind."""
    kinds = [entry.get("probes") for entry in by_seed.values()]
    most = max(kinds, key=kinds.count, default=None)
    return {seed: entry for seed, entry in by_seed.items() if entry.get("probes") == most}


def mean_over_seeds(
    estimates: list[tuple[float, list[float]]], shared_images: bool
) -> tuple[float, list[float]]:
    """Return the mean of the values and its 95% interval, from values with their intervals over images.

    Without shared images, the interval is Student's t over the values, never shorter than that of the mean over images
    (the modification of Hartung and Knapp's interval by Roever, Knapp and Friede 2015). With them it is longer.
    """
    values = torch.tensor([value for value, _ in estimates], dtype=torch.float64)
    widths = [high - low for _, (low, high) in estimates]
    halves = torch.tensor(widths, dtype=torch.float64) / 2
    of_images = halves.square().mean().sqrt().item()
    value = values.mean().item()
    quantile = student_quantile(0.975, len(values) - 1)
    of_seeds = quantile * values.std().item() / len(values) ** 0.5
    half = (
        math.hypot(of_seeds, of_images)
        if shared_images
        else max(of_seeds, of_images / len(values) ** 0.5)
    )
    return value, [value - half, value + half]
