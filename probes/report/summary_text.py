"""Summarise the numbers of a study in sentences for the page."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import error_context
from probes.results.formatting import (
    format_difference,
    format_interval,
    format_p,
    format_points,
)

from .verdicts import ALPHA, FAILS, HOLDS, MARGIN, REVERSED, SUPPORTED, UNTESTED, measured_effect

COLUMN_TITLES = {
    "paper": "As the paper measures it",
    "optimum": "At the optimum",
    "beyond_random": "Beyond random",
}
MARKS = {
    HOLDS: "✓",
    FAILS: "✗",
    REVERSED: "✗",
    UNTESTED: "–",
}
# a bootstrap interval of the mean of 10 normal numbers has the true one in 90% of cases, of 2 in 50%
FEW_IMAGES = 10
EFFECT_NAMES = {"adapter_drop": "drop-off", "recovery": "recovery"}


def format_count(n: dict[str, int]) -> str:
    """Return the number of seeds or images that a claim is a mean over."""
    if "seeds" not in n:
        return f"{n['images']} images"
    fewer = n["seeds"] < n.get("of", n["seeds"])
    return f"{n['seeds']} of {n['of']} seeds" if fewer else f"{n['seeds']} seeds"


def summarize_claims(claims: list[dict[str, Any]]) -> str:
    """Return how many claims are supported, and which; the numbers of other conclusions, and of untested claims."""
    tested = [claim for claim in claims if claim["supported"] is not None]
    supported = [claim for claim in tested if claim["finding"] == SUPPORTED]
    several = len({claim["image_attention"] for claim in claims}) > 1
    names = ", ".join(
        claim["claim"].replace("_", " ") + f" {claim['image_attention']}" * several
        for claim in supported
    )
    parts = [f"{len(supported)} supported" + (f" ({names})" if names else "")]
    others = Counter(claim["finding"] for claim in tested if claim["finding"] != SUPPORTED)
    for finding, count in others.most_common():
        parts.append(f"{count} {finding if count == 1 else finding.replace('does not', 'do not')}")
    if len(claims) > len(tested):
        parts.append(f"{len(claims) - len(tested)} untested")
    counted = "1 claim" if len(claims) == 1 else f"{len(claims)} claims"
    return f"Of {counted}: {', '.join(parts)}."


def group_claims(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {"text", "source", "truth", "by_mask": {mask: claim}} for each claim that is tested under some mask.

    "source" is the place in the paper or what is subtracted from what; "truth" that of a world in which it is known.
    """
    grouped: dict[str, dict[str, Any]] = {}
    for claim in claims:
        text, _, source = claim["text"].partition(": ")
        entry = {
            "text": text,
            "source": source,
            "truth": claim.get("truth"),
            "by_mask": {},
        }
        grouped.setdefault(claim["claim"], entry)["by_mask"][claim["image_attention"]] = claim

    def tested(entry):
        return any(claim["conclusion"] != UNTESTED for claim in entry["by_mask"].values())

    return [entry for entry in grouped.values() if tested(entry)]


def truth_rows(parts: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each claim of the page's studies whose truth is known."""
    return [
        {
            "model": part["study"].title,
            "claim": claim["claim"].replace("_", " "),
            "attention": claim["image_attention"],
            "truth": claim["truth"],
            "found": claim["finding"],
            "effect": ", beyond random ".join(format_effect(claim)),
        }
        for part in parts
        for claim in part["results"]["claims"]
        if "truth" in claim
    ]


def format_effect(claim: dict[str, Any]) -> list[str]:
    """Return the effect that the conclusion is about: at the optimum, and where it holds there also beyond random."""
    optimum = claim["verdicts"]["optimum"]
    beyond = claim["verdicts"]["beyond_random"]
    effects = [measured_effect(claim)]
    effects += [beyond] if optimum["verdict"] == HOLDS and beyond["ci95"] else []
    return [format_difference(effect) for effect in effects]


def claim_notes(claims: list[dict[str, Any]], margin: str = f"{100 * MARGIN:g} point") -> list[str]:
    """Return what a reader of the claims must know: the margin, their number, and verdicts that are not independent."""
    tested = [claim["p_holm"] for claim in claims if claim["p_holm"] is not None]
    beyond = [
        entry for c in claims if (entry := c["verdicts"]["beyond_random"])["verdict"] != UNTESTED
    ]
    notes = [f"At the optimum and beyond random, an effect counts from {margin}."]
    if any(len(entry.get("controls", ())) > 1 for entry in beyond):
        notes.append(
            "Beyond random: beyond layers of random weights that change the states as much, and beyond the trained "
            "weights in random order. The number is of those beyond which a claim fares worst."
        )
    counts = [claim["n"] for claim in claims]
    for unit, unit_text in (("images", "validation images"), ("groups", "groups of images")):
        fewest = min((count[unit] for count in counts if unit in count), default=FEW_IMAGES)
        if fewest < FEW_IMAGES:
            notes.append(
                f"{fewest} {unit_text} tell next to nothing: such intervals are too short, and a verdict is no more "
                f"than a trial of the command. Add images; from {FEW_IMAGES} {unit} on, intervals mean something."
            )
    if len(tested) > 1:
        notes.append(
            f"{len(tested)} claims are tested. One is called supported if p, corrected for their number (Holm), is "
            f"below {ALPHA}, and supported by itself if only the uncorrected p is."
        )
    if any("same_as" in entry for entry in beyond):
        notes.append(
            "Recovery and recovery trained share the column beyond random: one confirmation, not two."
        )
    if any("same_draws_as" in entry for entry in beyond):
        notes.append(
            "Random adapters are the same under both masks: one confirmation of the adapter's drop, not two."
        )
    return notes


def verdict_reasons(verdicts: dict[str, dict[str, Any]]) -> list[str]:
    """Return why columns of a claim are untested, and which seeds are left out of joint ones."""
    reasons = [
        f"{COLUMN_TITLES[k]}: {v['verdict']}, {v['reason']}"
        for k, v in verdicts.items()
        if "reason" in v
    ]
    return reasons + [
        f"{COLUMN_TITLES[name]}: without seed {seed}, {reason}"
        for name, entry in verdicts.items()
        if "reason" not in entry
        for seed, reason in entry.get("left_out", {}).items()
    ]


def describe_column(entry: dict[str, Any]) -> str:
    """Return what stands beside a verdict: the distance from the optimum, or the smallest effect that it would find."""
    notes = []
    if "row" in entry and entry["converged"] < entry["strengths"]:
        notes.append(f"converged at {entry['converged']} of {entry['strengths']} strengths")
    if entry.get("below_optimum"):
        notes.append(f"below the optimum by {format_difference(entry['below_optimum'])}")
    if len(entry.get("controls", ())) > 1:
        notes.append(f"beyond {entry['control']} layers")
    if "detectable" in entry:
        notes.append(f"detectable: {100 * entry['detectable']:.1f}")
    return "; ".join(notes)


def summarize_mask_comparison(comparison: dict[str, Any]) -> list[str]:
    """Return how many sites differ between the masks, the differences of the effects, and the power of the test."""
    sites = comparison["sites"]
    units = f"{comparison['images']} images"
    if comparison["groups"]:
        units = f"{comparison['groups']} groups of images ({comparison['images']} images)"
    significant = [entry["difference"] for entry in sites if entry["p_corrected"] < ALPHA]
    better = sum(difference > 0 for difference in significant)
    worse = sum(difference < 0 for difference in significant)
    lines = [
        f"Bidirectional attention is significantly better at {better} and worse at {worse} of {len(sites)} sites "
        f"(corrected p < {ALPHA}; {comparison['permutations']} permutations of {units}).",
        "This compares one model per mask. What another training run would change is not in these intervals.",
    ]
    lines += [
        f"The {EFFECT_NAMES[entry['effect']]} differs by {format_points(entry['difference'])} pp, 95% interval "
        f"{format_interval(entry['ci95'])} (p = {format_p(entry['p'])})."
        for entry in comparison["effects"]
    ]
    if comparison["smallest_p"] > ALPHA:
        lines.append(
            f"With so few groups no p-value can be smaller than {format_p(comparison['smallest_p'])}: the test cannot "
            "reject any null hypothesis, and the intervals are unreliable."
        )
    return lines


def edge_notes(at_edge: dict[str, list[str]]) -> list[str]:
    """Return which sites have their lowest cross-validated loss at an end of the path of strengths.

    Args:
        at_edge: Names of the sites by mask; the mask is named if there are several.
    """
    notes = []
    for mask, sites in at_edge.items():
        subject = f"Under {mask} attention, the" if len(at_edge) > 1 else "The"
        if sites:
            notes.append(
                f"{subject} cross-validated loss is lowest at an end of the path at "
                f"{', '.join(sites)}: the optimum may be beyond it."
            )
    return notes


def total_wall_s(timings: Path) -> float:
    """Return the wall time of a log of lines "start end step": the length of the union of its intervals.

    Raises:
        UserError: The log does not exist, or has other lines.
    """
    with error_context(timings):
        lines = [line.split()[:2] for line in timings.read_text().splitlines() if line.strip()]
        intervals = sorted((float(start), float(end)) for start, end in lines)
    total = 0.0
    until = 0.0
    for start, end in intervals:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
