"""Join the claims of runs with several seeds: the unit is a training, not an image.

The interval of a joint number is for the mean over seeds: Student's t over the values of the seeds. Their spread
includes that of random draws, which each seed has for itself, and of images where each seed has its own. Images that
seeds share are not part of it; their interval and that over seeds are then added as the sides of a right angle.
"""

import math

import torch

from probes.analyses.claims import CLAIMS
from probes.ops.quantiles import student_quantile
from probes.runs.formatting import Entry
from probes.runs.study import StudyRuns, studies_by_model

from .verdicts import (
    COLUMNS,
    HOLDS,
    MARGIN,
    UNTESTED,
    column,
    conclude,
    correct_for_claims,
    judge,
    margin_column,
    untested,
)


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
        joint.append(about | _joint_claims(by_seed, shares_images, members[0].task.margin))
    return joint


def _joint_claims(
    claims_by_seed: dict[int, list[Entry]],
    shared_images: bool,
    margin: float,
) -> dict[str, list[Entry]]:
    """Return the "claims" of at least two seeds, and those that a seed lacks, "left_out" of it."""
    by_key: dict[tuple[str, str], dict[int, Entry]] = {}
    for seed, claims in claims_by_seed.items():
        for claim in claims:
            key = (claim["claim"], claim["image_attention"])
            by_key.setdefault(key, {})[seed] = claim
    joint = []
    left_out = []
    for (name, mask), by_seed in by_key.items():
        about = {
            "claim": name,
            "image_attention": mask,
        }
        if lacking := [seed for seed in claims_by_seed if seed not in by_seed]:
            left_out.append(about | {"lacking": lacking})
        if len(by_seed) > 1:
            joint.append(
                about
                | _joint_claim(
                    name,
                    by_seed,
                    shared_images,
                    margin,
                )
            )
    correct_for_claims(joint)
    return {
        "claims": joint,
        "left_out": left_out,
    }


def _joint_claim(
    name: str,
    by_seed: dict[int, Entry],
    shared_images: bool,
    margin: float,
) -> Entry:
    """Return the columns and the conclusion of a claim over seeds."""
    sign = CLAIMS[name].sign
    verdicts = {}
    for column_name in COLUMNS:
        columns = {seed: claim["verdicts"][column_name] for seed, claim in by_seed.items()}
        verdicts[column_name] = join_column(
            sign,
            columns,
            shared_images,
            margin,
        )
    # the numbers of the main runs
    value = verdicts["paper"]["value"]
    ci95 = verdicts["paper"]["ci95"]
    # the seeds that every joint number is a mean over, of those that have the claim
    counts = [column["seeds"] for column in verdicts.values() if column.get("seeds")]
    entry = {
        "text": next(iter(by_seed.values()))["text"],
        "value": value,
        "ci95": ci95,
        "holds": value is not None and judge(sign, value, ci95) == HOLDS,
        "verdicts": verdicts,
        **conclude(verdicts, CLAIMS[name].unlearned),
        "n": {
            "seeds": min(counts, default=0),
            "of": len(by_seed),
        },
    }
    truths = {claim.get("truth") for claim in by_seed.values()}
    if len(truths) == 1 and None not in truths:
        entry["truth"] = truths.pop()
    return entry


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
    if "p" in entries[0]:
        df = len(entries) - 1
        return margin_column(
            sign,
            value,
            ci95,
            df,
            margin,
            **more,
        )
    # the column "paper"
    below = [x["below_optimum"] for x in entries if x.get("below_optimum")]
    more["below_optimum"] = None
    if len(below) > 1:
        mean = mean_over_seeds([(x["value"], x["ci95"]) for x in below], shared_images)
        more["below_optimum"] = {
            "value": mean[0],
            "ci95": mean[1],
        }
    return column(
        sign,
        value,
        ci95,
        **more,
    )


def _same_probes(by_seed: dict[int, Entry]) -> dict[int, Entry]:
    """Return the seeds whose probes are of the most frequent kind."""
    kinds = [entry.get("probes") for entry in by_seed.values()]
    return {
        seed: x for seed, x in by_seed.items() if x.get("probes") == max(kinds, key=kinds.count)
    }


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
