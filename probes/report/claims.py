"""Evaluate the paper's claims: from the runs of a study to one number each, with a 95% interval and three verdicts.

The verdicts are columns of verdicts.py. The numbers, and what a column lacks for a verdict, are those of measure.py.

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
from itertools import product
from pathlib import Path

import numpy as np
import torch

from llava_bidir.common.bootstrap import simultaneous_band
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.imports import HINT
from probes.analyses.claims import ANALYSIS_OF, CLAIMS, WITHOUT_CONTEXT
from probes.runs.compare import knockout_difference
from probes.runs.formatting import Entry
from probes.runs.read import ProbeRun
from probes.runs.study import PAPER_MASKS, StudyRuns, studies_by_model
from probes.score.estimate import Estimate, student_quantile
from probes.tasks import SEGMENTATION

from .measure import (
    GAIN,
    KNOCKOUT,
    Case,
    again,
    effects_of_study,
    why_no_draws,
    why_no_optimum,
    why_undecided,
)
from .verdicts import (
    HOLDS,
    MARGIN,
    UNTESTED,
    VERDICT_COLUMNS,
    conclude,
    correct_for_claims,
    find,
    judge,
    judge_draws,
    untested,
    worst_of,
)

TRUTH_FILE = "truth.json"
TRUTHS = ("planted", "absent")
OTHER_CLAIMS = ("answers", "depth")  # which a report does not judge


def evaluate_claims(study: StudyRuns) -> list[Entry]:
    """Return all claims that the runs of a study allow: {"claim", "image_attention", "value", "ci95", "holds", ...}.

    Each entry also has "verdicts", "supported", "conclusion" and "finding" of `verdicts.py`, with "detectable" if it is
    undecided; "p" of the conclusion, and "p_holm", corrected for the number of claims; "truth" if it is known
    (:func:`read_truth`); "text"; "control": the same number for the untrained model, or None; and "n": the images, for
    a knockout also the mistaken patches, that it is a mean over. "value", "ci95" and "holds" are those of the main
    runs, as the paper measures them.
    """
    effects = effects_of_study(study)
    claims = []
    names = [*CLAIMS]
    if study.with_context:
        names = [WITHOUT_CONTEXT[study.first.cut]]
    for name, mask in product(names, study.main_runs):
        case = Case(study=study, name=name, mask=mask, effects=effects)
        if number := case.number(study.is_solved):
            claims.append(_judge_claim(case, number=number, run=study.main_runs[case.masks[0]]))
    correct_for_claims(claims)
    for (
        under_cut
    ) in study.cuts.values():  # beside the claims of the model as it is, which stay as they are
        if under_cut.with_context:
            claims += evaluate_claims(under_cut)
    return claims


def _judge_claim(case: Case, number: Estimate, run: ProbeRun) -> Entry:
    """Return the entry of a claim, without its correction, from the number of the main run."""
    study = case.study
    claim = case.claim
    measured = number.json()
    verdicts = {
        "paper": _paper_column(case, number),
        "optimum": _optimum_column(case),
        "beyond_random": _beyond_random_column(case),
    }
    entry = {
        "claim": case.name,
        "image_attention": case.masks[0],
        **measured,
        "holds": judge(claim.sign, **measured)["verdict"] == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, claim.unlearned),
    }
    entry |= find(
        claim.sign,
        verdicts,
        conclusion=entry["conclusion"],
        margin=study.task.margin,
        units=case.counts[0],
    )
    # what is known of a world is about its classes, and about the paper's masks where two are compared
    if study.task.name == SEGMENTATION and case.masks in ((case.mask,), PAPER_MASKS):
        truth = read_truth(run)
        if case.name in truth:
            entry["truth"] = truth[case.name]
    entry["text"] = _text_of(case)
    untrained = case.number(study.is_solved, weights="untrained")
    entry["control"] = untrained and untrained.json()
    images = {"images": run.metrics["images"]}
    if run.groups is not None:
        images["groups"] = run.units
    judged = case.judged_number(study.is_solved) or number
    entry["n"] = judged.about.get("n", images)
    return entry


def _text_of(case: Case) -> str:
    """Return the sentence of a claim, with its masks and the name of the task's score."""
    claim = case.claim
    text = claim.text
    if claim.between_masks:
        text = text.format(first=case.masks[0], second=case.mask)
    task = case.study.task
    return text.replace("mIoU", task.labels[task.score])


def _paper_column(case: Case, number: Estimate) -> Entry:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    study = case.study
    sign = case.claim.sign
    if not case.claim.reads_probes:
        return judge(sign, **number.json())
    if study.is_solved:
        reason = "the number is that of solved probes"
        if study.task.name == SEGMENTATION:
            reason = again(reason, option="--fit")
        return untested(reason, **number.json(), probes="solved")
    below_optimum = None
    if optimum := case.number(solved=True):
        pair = study.main_runs[case.mask], study.solved[case.mask]
        if ANALYSIS_OF.get(case.name) != KNOCKOUT or not knockout_difference(*pair):
            below_optimum = (optimum - number).json()
    return judge(sign, **number.json(), probes="trained", below_optimum=below_optimum)


def _optimum_column(case: Case) -> Entry:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes.

    The three have intervals that hold at all of them together; it is the row where the claim fares worst. The 90%
    interval spans those of all three, since what is absent is so at each. Neighbours of the chosen strength do not
    count if the certificates of a site that the effect reads do not hold.
    """
    sign = case.claim.sign
    margin = case.study.task.margin
    rows = case.numbers_by_strength()
    number = case.judged_number(solved=True)
    measured = {}
    if number and not rows:
        measured = number.json()
    if reason := why_no_optimum(case, rows):
        return untested(reason, **measured)
    if not rows:
        return judge(sign, **measured, margin=margin, ci90=number.widened(case.counts))
    vectors = torch.stack([effect.vector for effect in rows.values()], 1)
    band = simultaneous_band(vectors[0], vectors[1:])
    bounds = torch.stack(band, 1).tolist()
    columns = []
    lows = []
    highs = []
    for (row, effect), ci95 in zip(rows.items(), bounds, strict=True):
        if effect.about["converged"]:
            column = judge(sign, value=effect.value, ci95=ci95, margin=margin, row=row)
            columns.append(column)
            low, high = effect.widened(case.counts)
            lows.append(low)
            highs.append(high)
    counts = {"strengths": len(rows), "converged": len(columns)}
    return worst_of(sign, columns, margin) | {"ci90": [min(lows), max(highs)], **counts}


def _beyond_random_column(case: Case) -> Entry:
    """Return the column "beyond_random": with solved probes where the controls have them, else with trained ones.

    The drop at the adapter is compared with random adapters, all other claims with both kinds of random LLMs. The
    column is of the control beyond which the claim fares worst; "controls" has those of all. A model that has learned
    nothing resembles one kind of random weights and not another one: a random LLM whose attention is sharper than that
    of all draws of one kind can read more than these.
    """
    if case.name == GAIN:  # minus other random weights, it is the recovery again
        case = replace(case, name="recovery")
    sign = case.claim.sign
    margin = case.study.task.margin
    for solved in (True, False):
        columns = _columns_of_controls(case, solved)
        if not columns:
            continue
        probes = "solved" if solved else "trained"
        named = [column | {"control": control} for control, column in columns.items()]
        worst = worst_of(sign, named, margin)
        if reason := why_undecided(case, compared=columns, solved=solved):
            return untested(reason, value=worst["value"], ci95=worst["ci95"], probes=probes)
        column = worst | {"controls": columns, "probes": probes}
        main_run = case.study.main_runs[case.mask]
        layers = case.study.compared_layers(main_run)
        if len(layers) < len(main_run.layers) and case.name != "adapter_drop":
            column["layers"] = layers
        return column
    reasons = dict.fromkeys(why_no_draws(case, control) for control in case.controls)
    return untested("; ".join(reasons))


def _columns_of_controls(case: Case, solved: bool) -> dict[str, Entry]:
    """Return the column of each control that the claim was compared with, from probes of one kind."""
    compared = case.minus_draws(solved)
    columns = {}
    for (mask, control), estimate in compared.items():
        if mask != case.mask:
            continue
        others = []
        if case.name != "adapter_drop":  # random adapters are the same under both masks
            others = [other for other in compared.values() if other is not estimate]
        columns[control] = judge_draws(
            case.claim.sign,
            compared=estimate,
            others=others,
            margin=case.study.task.margin,
            counts=case.counts,
        )
    return columns


def read_truth(run: ProbeRun) -> dict[str, str]:
    """Return the truth about each claim that the run's data or checkpoint record; {} for those that do not.

    Raises:
        UserError: One of them has another claim or value.
    """
    file = Path(run.manifest["data"]["root"]) / TRUTH_FILE
    truth_of_data = {}
    if file.is_file():
        truth_of_data = read_json(file)
    truths_of_model = run.training.get("truth", {})
    truth_of_model = truths_of_model.get(file.parent.name, {})
    sources = {
        str(file): truth_of_data,
        f"{run.path / 'manifest.json'}: mllm_training.truth": truth_of_model,
    }
    claims = (*CLAIMS, *OTHER_CLAIMS)
    for source, truth in sources.items():
        for claim, value in truth.items():
            if claim not in claims or value not in TRUTHS:
                raise UserError(
                    f"{source} says {claim}: {value!r}; expected {' or '.join(TRUTHS)} of one of {', '.join(claims)}; "
                    f"{HINT}"
                )
    return truth_of_data | truth_of_model


# ------------------------------------------------------------------------------------------------ seeds
def joint_studies(studies: list[StudyRuns], claims: list[list[Entry]]) -> list[Entry]:
    """Return {"task", "model", "dataset", "has_llm", "seeds", "claims", "left_out"} of models with several seeds.

    Claims are those of at least two seeds; "left_out" names those that a seed lacks. They have the keys of
    `evaluate_claims` but "control", and "n" counts seeds; each column has "by_seed", the values of the seeds.
    """
    claims_of = dict(zip(studies, claims, strict=True))
    seeded = [study for study in studies if study.seed is not None]
    return [_join_seeds(members, claims_of) for members in studies_by_model(seeded)]


def _join_seeds(members: list[StudyRuns], claims_of: dict[StudyRuns, list[Entry]]) -> Entry:
    """Return the claims of a model joint over the studies of its seeds."""
    first = members[0]
    images = {study.first.manifest["data"]["fingerprint"] for study in members}
    seeds = [study.seed for study in members]
    claims_by_seed: dict[tuple[str, str, str], dict[int, Entry]] = {}
    for study in members:
        for claim in claims_of[study]:
            key = (claim["claim"], claim["image_attention"], claim["text"])
            claims_by_seed.setdefault(key, {})[study.seed] = claim
    claims = []
    left_out = []
    for (name, mask, _), by_seed in claims_by_seed.items():
        if len(by_seed) > 1:
            claim = _join_claim(
                by_seed,
                shared_images=len(images) < len(members),
                margin=first.task.margin,
                units=min(study.first.units for study in members),
            )
            claims.append(claim)
        if lacking := [seed for seed in seeds if seed not in by_seed]:
            left_out.append({"claim": name, "image_attention": mask, "lacking": lacking})
    correct_for_claims(claims)
    return {
        "task": first.task.name,
        "model": first.name,
        "dataset": first.dataset,
        "has_llm": first.first.has_llm,
        "seeds": seeds,
        "claims": claims,
        "left_out": left_out,
    }


def _join_claim(by_seed: dict[int, Entry], shared_images: bool, margin: float, units: int) -> Entry:
    """Return the columns, the conclusion and the finding of a claim over seeds, of so many images at least."""
    first = next(iter(by_seed.values()))
    claim = CLAIMS[first["claim"]]
    verdicts = {}
    for name in VERDICT_COLUMNS:
        columns = {}
        for seed, entry in by_seed.items():
            columns[seed] = entry["verdicts"][name]
        least = margin
        if name == "paper":
            least = 0.0
        verdicts[name] = join_column(
            claim.sign, by_seed=columns, shared_images=shared_images, margin=least
        )
    # the numbers of the main runs
    measured = {key: verdicts["paper"][key] for key in ("value", "ci95")}
    is_measured = measured["value"] is not None
    # the seeds that every joint number is a mean over, of those that have the claim
    counts = [column["seeds"] for column in verdicts.values() if "seeds" in column]
    joint = {
        "claim": first["claim"],
        "image_attention": first["image_attention"],
        "text": first["text"],
        **measured,
        "holds": is_measured and judge(claim.sign, **measured)["verdict"] == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, claim.unlearned),
        "n": {"seeds": min(counts, default=0), "of": len(by_seed)},
    }
    joint |= find(claim.sign, verdicts, conclusion=joint["conclusion"], margin=margin, units=units)
    truths = {entry.get("truth") for entry in by_seed.values()}
    if len(truths) == 1 and None not in truths:
        joint["truth"] = truths.pop()
    return joint


def join_column(
    sign: int, by_seed: dict[int, Entry], shared_images: bool, margin: float = MARGIN
) -> Entry:
    """Return the column of all seeds that have a verdict from the same kind of probes, at least two.

    "by_seed" has the values of all seeds; "left_out" says why some are no part of the joint number.
    """
    columns, left_out = _judged_columns(by_seed)
    values = {seed: column["value"] for seed, column in by_seed.items()}
    more: Entry = {"by_seed": values}
    if left_out:
        more["left_out"] = left_out
    reason = ""
    if len(columns) < 2:
        seed, why = next(iter(left_out.items()))
        reason = f"fewer than two seeds have a verdict; seed {seed}: {why}"
        columns = [*_same_probes(by_seed).values()]
    has_no_value = [column["value"] is None for column in columns]
    if len(columns) < 2 or any(has_no_value):
        return untested(reason, **more)
    more["seeds"] = len(columns)
    # each seed has draws of its own, so that their spread is part of that between seeds
    over_images = []
    for column in columns:
        interval = column.get("ci95_without_draws", column["ci95"])
        over_images.append((column["value"], interval))
    value, ci95 = mean_over_seeds(over_images, shared_images)
    if reason:
        return untested(reason, value=value, ci95=ci95, **more)
    below = [x["below_optimum"] for x in columns if x.get("below_optimum")]
    if len(below) > 1:
        pairs = [(x["value"], x["ci95"]) for x in below]
        below_value, below_ci95 = mean_over_seeds(pairs, shared_images)
        more["below_optimum"] = {"value": below_value, "ci95": below_ci95}
    df = len(columns) - 1
    _, more["ci90"] = mean_over_seeds(over_images, shared_images, level=0.9)
    return judge(sign, value=value, ci95=ci95, margin=margin, df=df, **more)


def _judged_columns(by_seed: dict[int, Entry]) -> tuple[list[Entry], dict[int, str]]:
    """Return the columns that have a verdict, of one kind of probes, and why other seeds are left out."""
    tested = {}
    for seed, column in by_seed.items():
        if column["verdict"] != UNTESTED:
            tested[seed] = column
    judged = _same_probes(tested)
    left_out = {}
    for seed, column in by_seed.items():
        if seed not in judged:
            left_out[seed] = column.get("reason", "other probes")
    return [*judged.values()], left_out


def _same_probes(by_seed: dict[int, Entry]) -> dict[int, Entry]:
    """Return the seeds whose probes are of the most frequent kind."""
    kinds = [column.get("probes") for column in by_seed.values()]
    most_frequent = max(kinds, key=kinds.count, default=None)
    return {
        seed: column for seed, column in by_seed.items() if column.get("probes") == most_frequent
    }


def mean_over_seeds(
    estimates: list[tuple[float, list[float]]], shared_images: bool, level: float = 0.95
) -> tuple[float, list[float]]:
    """Return the mean of the values and its interval, from values with their 95% intervals over images.

    The level is that of seeds. Without shared images, the interval is Student's t over the values, never shorter
    than that of the mean over images (the modification of Hartung and Knapp's interval by Roever, Knapp and Friede
    2015). With them it is longer.
    """
    values = [value for value, _ in estimates]
    halves = [(high - low) / 2 for _, (low, high) in estimates]
    of_images = np.hypot.reduce(halves)
    count = len(values)
    value = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / count**0.5
    of_seeds = student_quantile((1 + level) / 2, count - 1) * error
    half = max(of_seeds, of_images / count)
    if shared_images:
        half = math.hypot(of_seeds, of_images / count**0.5)
    return value, [value - half, value + half]
