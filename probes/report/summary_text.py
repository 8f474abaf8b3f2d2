"""Summarise the numbers of a study in sentences for the page."""

from typing import Any

from .mask_comparison import ALPHA
from .path import EVERYWHERE, NOWHERE
from .probe_sensitivity import EFFECTS

MASKS_SECTION = "Bidirectional vs. causal attention"
SCALE_SECTION = "Sensitivity to feature scale"
SEEDS_SECTION = "Probe seeds"
PATH_SECTION = "Probes at every strength of regularisation"

PATH_EFFECTS = {"recovery_trained": "recovery minus that of the untrained model"}
INSTRUMENT_NAMES = {"closed_form": "closed form", "optimum": "optimum"}
MEASURE_NAMES = {"miou": "mIoU", "cross_entropy": "cross-entropy"}


def format_percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in percent, without the sign %."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def format_points(value: float | None, digits: int = 1) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def format_p(value: float | None) -> str:
    """Return a p-value with three decimals, or four below 0.01."""
    return "–" if value is None else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def format_interval(ci95: list[float], digits: int = 1) -> str:
    """Return an interval in percentage points."""
    return f"[{format_points(ci95[0], digits)}, {format_points(ci95[1], digits)}]"


def summarize_claims(claims: list[dict[str, Any]]) -> str:
    """Return one sentence: how many claims hold and which do not."""
    failing: dict[str, list[str]] = {}
    for claim in claims:
        if not claim["holds"]:
            failing.setdefault(claim["claim"].replace("_", " "), []).append(claim["image_attention"])
    count = sum(claim["holds"] for claim in claims)
    names = ", ".join(f"{name} ({' and '.join(masks)})" for name, masks in failing.items())
    return f"{count} of {len(claims)} claims hold" + (f"; not supported: {names}." if count and failing else ".")


def summarize_sections(results: dict[str, Any]) -> dict[str, list[str]]:
    """Return sentences by section, from one study's part of results.json."""
    return {
        MASKS_SECTION: summarize_mask_comparison(results["paired"]) if results["paired"] else [],
        SCALE_SECTION: [
            f"{mask.capitalize()}: {' '.join(scale['verdict'].values())}" for mask, scale in results["scale"].items()
        ],
        PATH_SECTION: summarize_path(results["path"]),
        SEEDS_SECTION: [line for mask, seeds in results["seeds"].items() for line in summarize_seeds(mask, seeds)],
    }


def summarize_mask_comparison(comparison: dict[str, Any]) -> list[str]:
    """Return how many sites differ between the masks, the differences of the effects, and the power of the test."""
    sites, units = comparison["sites"], f"{comparison['images']} images"
    if comparison["groups"]:
        units = f"{comparison['groups']} groups of images ({comparison['images']} images)"
    significant = [entry["difference"] for entry in sites if entry["p_corrected"] < ALPHA]
    better, worse = (sum(sign * difference > 0 for difference in significant) for sign in (1, -1))
    lines = [
        f"Bidirectional attention is significantly better at {better} and worse at {worse} of {len(sites)} sites "
        f"(corrected p < {ALPHA}; {comparison['permutations']} permutations of {units})."
    ]
    lines += [
        f"The {EFFECTS[entry['effect']]} differs by {format_points(entry['difference'])} pp, 95% interval "
        f"{format_interval(entry['ci95'])} (p = {format_p(entry['p'])})."
        for entry in comparison["effects"]
    ]
    if comparison["smallest_p"] > ALPHA:
        lines.append(
            f"With so few groups no p-value can be smaller than {format_p(comparison['smallest_p'])}: the test cannot "
            "reject any null hypothesis, and the intervals are unreliable."
        )
    return lines


def summarize_path(verdicts: list[dict[str, Any]]) -> list[str]:
    """Return two sentences: the effects that hold at every strength of regularisation, and all others."""
    if not verdicts:
        return []
    everywhere, elsewhere = {}, {}
    for verdict in verdicts:
        name = f"{(EFFECTS | PATH_EFFECTS)[verdict['effect']]} in {MEASURE_NAMES[verdict['measure']]}"
        case = f"{verdict['image_attention']}, {INSTRUMENT_NAMES[verdict['instrument']]}"
        if verdict["verdict"] == EVERYWHERE:
            everywhere.setdefault(name, []).append(case)
        else:
            elsewhere.setdefault(name, []).append(f"{case}: {_describe_strengths(verdict)}")
    join = lambda cases_by_name: "; ".join(f"{name} ({'; '.join(cases)})" for name, cases in cases_by_name.items())
    return [
        f"Above zero at every strength of regularisation: {join(everywhere) or 'none of the effects'}.",
        f"Not at every strength: {join(elsewhere) or 'none of the effects'}.",
    ]


def _describe_strengths(verdict: dict[str, Any]) -> str:
    """Return at which strengths an effect holds, and how many have not converged."""
    strengths, missing = [row["strength"] for row in verdict["estimates"]], len(verdict["not_converged"])
    text = verdict["verdict"]
    if text != NOWHERE:
        ranges = format_ranges(strengths, verdict["holds"])
        text = f"at {len(verdict['holds'])} of {len(strengths)}, {ranges}"
    return f"{text}; {missing} of {len(strengths)} not converged" if missing else text


def format_ranges(grid: list[float], chosen: list[float]) -> str:
    """Return the chosen values of a grid, neighbours as a range: "1e-06 to 0.001, 0.1"."""
    ranges: list[list[float]] = []
    for before, value in zip([None, *grid], grid, strict=False):
        if value in chosen:
            ranges = [*ranges[:-1], [*ranges[-1], value]] if before in chosen else [*ranges, [value]]
    return ", ".join(f"{x[0]:.2g} to {x[-1]:.2g}" if len(x) > 1 else f"{x[0]:.2g}" for x in ranges)


def summarize_seeds(mask: str, entries: list[dict[str, Any]]) -> list[str]:
    """Return the spread of drop-off and recovery over probe seeds."""
    return [
        f"{mask.capitalize()}: {EFFECTS[entry['of']]} {format_points(entry['mean'])} pp on average over "
        f"{entry['seeds']} seeds, from {format_points(entry['lowest'])} to {format_points(entry['highest'])} (standard "
        f"deviation {format_percent(entry['sd'], 2)} pp); 95% interval over images {format_interval(entry['ci95'])}."
        for entry in entries
        if entry["of"] in EFFECTS
    ]
