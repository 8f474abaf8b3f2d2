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
from itertools import product
from pathlib import Path

import numpy as np
import torch

from llava_bidir.common.bootstrap import simultaneous_band
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.imports import HINT
from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.runs.compare import knockout_difference
from probes.runs.formatting import Entry
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns, studies_by_model
from probes.score.estimate import student_quantile
from probes.score.strengths import ROWS
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
    COLUMNS,
    HOLDS,
    MARGIN,
    UNTESTED,
    conclude,
    correct_for_claims,
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

    Each entry also has "verdicts", "supported" and "conclusion" of `verdicts.py`; "p" of the conclusion, and "p_holm",
    corrected for the number of claims; "finding", the conclusion after this correction; "truth" if it is known
    (:func:`read_truth`); "text"; "control": the same number for the untrained model, or None; and "n": the images, for
    a knockout also the mistaken patches, that it is a mean over. "value", "ci95" and "holds" are those of the main
    runs, as the paper measures them.
    """
    effects = effects_of_study(study)
    claims = []
    for (name, claim), (mask, run) in product(CLAIMS.items(), study.main_runs.items()):
        case = Case(study=study, name=name, mask=mask, effects=effects)
        number = case.number(name, study.is_solved)
        if not number:
            continue
        judged = case.number(case.judged, study.is_solved) or number
        untrained = case.number(name, study.is_solved, "untrained")
        measured = number.json()
        verdicts = {
            "paper": _paper_column(case),
            "optimum": _optimum_column(case),
            "beyond_random": _beyond_random_column(case),
        }
        images = {"images": run.metrics["images"]}
        if run.groups is not None:
            images["groups"] = run.units
        # what is known of a world is about its classes
        truth = read_truth(run).get(name) if study.task.name == SEGMENTATION else None
        entry = {
            "claim": name,
            "image_attention": mask,
            **measured,
            "holds": judge(claim.sign, **measured)["verdict"] == HOLDS,
            "verdicts": verdicts,
            **conclude(verdicts, claim.unlearned),
            **({"truth": truth} if truth else {}),
            "text": claim.text.replace("mIoU", study.task.labels[study.task.score]),
            "control": untrained and untrained.json(),
            "n": judged.about.get("n", images),
        }
        claims.append(entry)
    correct_for_claims(claims)
    return claims


def _paper_column(case: Case) -> Entry:
    """Return the column "paper" from trained probes, with the distance of the effect from that at the optimum."""
    study = case.study
    number = case.number(case.name, study.is_solved)
    sign = case.claim.sign
    if not case.claim.reads_probes:
        return judge(sign, **number.json())
    if study.is_solved:
        reason = "the number is that of solved probes"
        reason = again(reason, "--fit") if study.task.name == SEGMENTATION else reason
        return untested(reason, **number.json(), probes="solved")
    below = None
    if optimum := case.number(case.name, solved=True):
        pair = study.main_runs[case.mask], study.solved[case.mask]
        if ANALYSIS_OF.get(case.name) != KNOCKOUT or not knockout_difference(*pair):
            below = (optimum - number).json()
    return judge(sign, **number.json(), probes="trained", below_optimum=below)


def _optimum_column(case: Case) -> Entry:
    """Return the column "optimum": at three strengths where the claim has them, else from the chosen probes.

    The three have intervals that hold at all of them together; it is the row where the claim fares worst. Neighbours of
    the chosen strength do not count if the certificates of a site that the effect reads do not hold.
    """
    sign = case.claim.sign
    margin = case.study.task.margin
    rows = {row: case.number(f"{case.name}@{row}", solved=True) for row in ROWS}
    rows = {row: effect for row, effect in rows.items() if effect}
    number = case.number(case.judged, solved=True)
    measured = number.json() if number and not rows else {}
    if reason := why_no_optimum(case, rows):
        return untested(reason, **measured)
    if not rows:
        return judge(sign, **measured, margin=margin)
    drawn = torch.stack([effect.vector for effect in rows.values()], 1)
    bounds = torch.stack(simultaneous_band(drawn[0], drawn[1:]), 1).tolist()
    columns = [
        judge(sign, effect.value, ci95, margin, row=row)
        for (row, effect), ci95 in zip(rows.items(), bounds, strict=True)
        if effect.about["converged"]
    ]
    counts = {"strengths": len(rows), "converged": len(columns)}
    return worst_of(sign, columns, margin) | counts


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
    is_pooled = case.name != "adapter_drop"  # random adapters are the same under both masks
    for solved in (True, False):
        compared = case.minus_draws(solved)
        columns = {}
        for (mask, control), estimate in compared.items():
            if mask == case.mask:
                others = [x for x in compared.values() if x is not estimate and is_pooled]
                columns[control] = judge_draws(
                    sign, compared=estimate, others=others, margin=margin
                )
        if not columns:
            continue
        probes = "solved" if solved else "trained"
        worst = worst_of(sign, [x | {"control": name} for name, x in columns.items()], margin)
        if reason := why_undecided(case, columns, solved):
            return untested(reason, worst["value"], worst["ci95"], probes=probes)
        return worst | {"controls": columns, "probes": probes}
    reasons = [why_no_draws(case, control) for control in case.controls]
    return untested("; ".join(dict.fromkeys(reasons)))


def read_truth(run: ProbeRun) -> dict[str, str]:
    """Return the truth about each claim that the run's data or checkpoint record; {} for those that do not.

    Raises:
        UserError: One of them has another claim or value.
    """
    file = Path(run.manifest["data"]["root"]) / TRUTH_FILE
    of_model = run.training.get("truth", {}).get(file.parent.name, {})
    sources = {str(file): read_json(file) if file.is_file() else {}}
    sources[f"{run.path / 'manifest.json'}: mllm_training.truth"] = of_model
    known = (*CLAIMS, *OTHER_CLAIMS)
    for source, truth in sources.items():
        for claim, value in truth.items():
            if claim not in known or value not in TRUTHS:
                raise UserError(
                    f"{source} says {claim}: {value!r}; expected {' or '.join(TRUTHS)} of one of {', '.join(known)}; "
                    f"{HINT}"
                )
    return sources[str(file)] | of_model


# ------------------------------------------------------------------------------------------------ seeds
def joint_studies(studies: list[StudyRuns], claims: list[list[Entry]]) -> list[Entry]:
    """Return {"task", "model", "dataset", "has_llm", "seeds", "claims", "left_out"} of models with several seeds.

    Claims are those of at least two seeds; "left_out" names those that a seed lacks. They have the keys of
    `evaluate_claims` but "control", and "n" counts seeds; each column has "by_seed", the values of the seeds.
    """
    joint = []
    claims_of = dict(zip(studies, claims, strict=True))
    for members in studies_by_model(study for study in studies if study.seed is not None):
        first = members[0]
        images = [study.first.manifest["data"]["fingerprint"] for study in members]
        seeds = [study.seed for study in members]
        found: dict[tuple[str, str], dict[int, Entry]] = {}
        for study in members:
            for claim in claims_of[study]:
                key = (claim["claim"], claim["image_attention"])
                found.setdefault(key, {})[study.seed] = claim
        own = [
            _join_claim(by_seed, len({*images}) < len(images), first.task.margin)
            for by_seed in found.values()
            if len(by_seed) > 1
        ]
        correct_for_claims(own)
        left_out = [
            {
                "claim": name,
                "image_attention": mask,
                "lacking": [seed for seed in seeds if seed not in by_seed],
            }
            for (name, mask), by_seed in found.items()
            if len(by_seed) < len(seeds)
        ]
        joint.append(
            {
                "task": first.task.name,
                "model": first.name,
                "dataset": first.dataset,
                "has_llm": first.first.has_llm,
                "seeds": seeds,
                "claims": own,
                "left_out": left_out,
            }
        )
    return joint


def _join_claim(by_seed: dict[int, Entry], shared_images: bool, margin: float) -> Entry:
    """Return the columns and the conclusion of a claim over seeds."""
    first = next(iter(by_seed.values()))
    about = {key: first[key] for key in ("claim", "image_attention", "text")}
    claim = CLAIMS[first["claim"]]
    verdicts = {}
    for name in COLUMNS:
        columns = {seed: entry["verdicts"][name] for seed, entry in by_seed.items()}
        least = 0.0 if name == "paper" else margin
        verdicts[name] = join_column(
            claim.sign, by_seed=columns, shared_images=shared_images, margin=least
        )
    # the numbers of the main runs
    measured = {key: verdicts["paper"][key] for key in ("value", "ci95")}
    is_known = measured["value"] is not None
    # the seeds that every joint number is a mean over, of those that have the claim
    counts = [entry["seeds"] for entry in verdicts.values() if "seeds" in entry]
    truths = {entry.get("truth") for entry in by_seed.values()}
    return {
        **about,
        **measured,
        "holds": is_known and judge(claim.sign, **measured)["verdict"] == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, claim.unlearned),
        "n": {"seeds": min(counts, default=0), "of": len(by_seed)},
        **({"truth": truths.pop()} if len(truths) == 1 and None not in truths else {}),
    }


def join_column(
    sign: int, by_seed: dict[int, Entry], shared_images: bool, margin: float = MARGIN
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
    reason = ""
    if len(judged) < 2:
        first = next(iter(missing.items()))
        reason = "fewer than two seeds have a verdict; seed {}: {}".format(*first)
    entries = [*(_same_probes(by_seed) if reason else judged).values()]
    if len(entries) < 2 or any(entry["value"] is None for entry in entries):
        return untested(reason, **more)
    more["seeds"] = len(entries)
    # each seed has draws of its own, so that their spread is part of that between seeds
    of_images = [(x["value"], x.get("ci95_without_draws", x["ci95"])) for x in entries]
    value, ci95 = mean_over_seeds(of_images, shared_images)
    if reason:
        return untested(reason, value=value, ci95=ci95, **more)
    below = [x["below_optimum"] for x in entries if x.get("below_optimum")]
    if len(below) > 1:
        mean = mean_over_seeds([(x["value"], x["ci95"]) for x in below], shared_images)
        more["below_optimum"] = dict(zip(("value", "ci95"), mean, strict=True))
    return judge(sign, value=value, ci95=ci95, margin=margin, df=len(entries) - 1, **more)


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
    values = [value for value, _ in estimates]
    of_images = np.hypot.reduce([(high - low) / 2 for _, (low, high) in estimates])
    count = len(values)
    value = float(np.mean(values))
    of_seeds = student_quantile(0.975, count - 1) * float(np.std(values, ddof=1)) / count**0.5
    half = max(of_seeds, of_images / count)
    if shared_images:
        half = math.hypot(of_seeds, of_images / count**0.5)
    return value, [value - half, value + half]
