"""Join the claims of runs with several seeds: the unit is a training, not an image.

The interval of a joint number is for the mean over seeds: Student's t over the values of the seeds. Their spread
includes that of random draws, which each seed has for itself, and of images where each seed has its own. Images that
seeds share are not part of it; their interval and that over seeds are then added as the sides of a right angle.
"""

import math
from typing import Any

import scipy.stats
import torch

from probes.analyses.claims import CLAIMS
from probes.results.study import StudyRuns, studies_by_model

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


def joint_studies(studies: list[StudyRuns], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each model and dataset with several seeds: {"model", "dataset", "seeds", "claims", "left_out"}.

    Claims have the keys of `evaluate_claims` but "control", and "n" counts seeds; each column has "by_seed", the values
    of the seeds.
    """
    claims = {study.slug: result["claims"] for study, result in zip(studies, results, strict=True)}

    def data(members):
        return {study.first.manifest["data"]["fingerprint"] for study in members}

    def shared(members):
        return len(data(members)) < len(members)  # some seeds have the same validation images

    return [
        {
            "model": members[0].name,
            "dataset": members[0].dataset,
            "seeds": [study.seed for study in members],
        }
        | _joint_claims(
            {study.seed: claims[study.slug] for study in members},
            shared(members),
            members[0].task.margin,
        )
        for members in studies_by_model(study for study in studies if study.seed is not None)
    ]


def _joint_claims(
    claims_by_seed: dict[int, list[dict[str, Any]]],
    shared_images: bool,
    margin: float,
) -> dict[str, list[dict[str, Any]]]:
    """Return the "claims" of at least two seeds, and those that a seed lacks, "left_out" of it."""
    by_key = {
        seed: {(c["claim"], c["image_attention"]): c for c in x}
        for seed, x in claims_by_seed.items()
    }
    joint = []
    left_out = []
    for claim, mask in dict.fromkeys(key for claims in by_key.values() for key in claims):
        if lacking := [seed for seed, claims in by_key.items() if (claim, mask) not in claims]:
            left_out.append(
                {
                    "claim": claim,
                    "image_attention": mask,
                    "lacking": lacking,
                }
            )
        entries = {
            seed: claims[claim, mask] for seed, claims in by_key.items() if (claim, mask) in claims
        }
        if len(entries) < 2:
            continue
        sign = CLAIMS[claim].sign
        text = next(iter(entries.values()))["text"]
        truths = {entry.get("truth") for entry in entries.values()}
        columns = {
            name: {seed: entry["verdicts"][name] for seed, entry in entries.items()}
            for name in COLUMNS
        }
        verdicts = {
            name: join_column(sign, by_seed, shared_images, margin)
            for name, by_seed in columns.items()
        }
        # the numbers of the main runs
        value = verdicts["paper"]["value"]
        ci95 = verdicts["paper"]["ci95"]
        entry = {
            "claim": claim,
            "image_attention": mask,
            "text": text,
            "value": value,
            "ci95": ci95,
            "holds": value is not None and judge(sign, value, ci95) == HOLDS,
            "verdicts": verdicts,
            **conclude(verdicts, CLAIMS[claim].unlearned),
            "n": _count_seeds(verdicts, len(entries)),
        }
        if len(truths) == 1 and None not in truths:
            entry["truth"] = truths.pop()
        joint.append(entry)
    correct_for_claims(joint)
    return {"claims": joint, "left_out": left_out}


def _count_seeds(verdicts: dict[str, dict[str, Any]], seeds: int) -> dict[str, int]:
    """Return the seeds that every joint number of a claim is a mean over, "of" those that have the claim."""
    joined = [entry["seeds"] for entry in verdicts.values() if entry.get("seeds")]
    return {"seeds": min(joined, default=0), "of": seeds}


def join_column(
    sign: int,
    by_seed: dict[int, dict[str, Any]],
    shared_images: bool,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """Return the column of all seeds that have a verdict from the same kind of probes, at least two.

    "by_seed" has the values of all seeds; "left_out" says why some are no part of the joint number.
    """

    def join(entries):
        return mean_over_seeds(
            [(entry["value"], entry["ci95"]) for entry in entries], shared_images
        )

    judged = _same_probes(
        {seed: entry for seed, entry in by_seed.items() if entry["verdict"] != UNTESTED}
    )
    missing = {
        seed: entry.get("reason", "other probes")
        for seed, entry in by_seed.items()
        if seed not in judged
    }
    more = {"by_seed": {seed: entry["value"] for seed, entry in by_seed.items()}}
    more |= {"left_out": missing} if missing else {}
    reason = "".join(
        [
            "fewer than two seeds have a verdict",
            *(f"; seed {k}: {x}" for k, x in [*missing.items()][:1]),
        ]
    )
    entries = [*(judged if len(judged) > 1 else _same_probes(by_seed)).values()]
    if len(entries) < 2 or any(entry["value"] is None for entry in entries):
        return untested(reason, **more)
    more["seeds"] = len(entries)
    # each seed has draws of its own, so that their spread is part of that between seeds
    value, ci95 = join(
        [entry | {"ci95": entry.get("ci95_without_draws", entry["ci95"])} for entry in entries]
    )
    if len(judged) < 2:
        return untested(reason, value, ci95, **more)
    if "p" in entries[0]:
        return margin_column(
            sign,
            value,
            ci95,
            len(entries) - 1,
            margin,
            **more,
        )
    # the column "paper"
    below = [entry["below_optimum"] for entry in entries if entry.get("below_optimum")]
    more["below_optimum"] = (
        dict(zip(("value", "ci95"), join(below), strict=True)) if len(below) > 1 else None
    )
    return column(sign, value, ci95, **more)


def _same_probes(by_seed: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
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
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    of_seeds = quantile * values.std().item() / len(values) ** 0.5
    half = (
        math.hypot(of_seeds, of_images)
        if shared_images
        else max(of_seeds, of_images / len(values) ** 0.5)
    )
    return value, [value - half, value + half]
