"""Summarise the numbers of a study in sentences for the page."""

from collections import Counter
from typing import Any

from .answers import answers_by_mask, summarize_answers
from .mask_comparison import ALPHA
from .path import EVERYWHERE, NOWHERE
from .verdicts import FAILS, HOLDS, NO_CONTROL, NOT_CONVERGED, REVERSED

MASKS_SECTION = "Bidirectional vs. causal attention"
ANSWERS_SECTION = "Answers"
PATH_SECTION = "Probes at every strength of regularisation"

COLUMN_TITLES = {"paper": "As the paper measures it", "optimum": "At the optimum", "beyond_random": "Beyond random"}
MARKS = {HOLDS: "✓", FAILS: "✗", REVERSED: "✗", NOT_CONVERGED: "–", NO_CONTROL: "–"}
EFFECT_NAMES = {"adapter_drop": "drop-off", "recovery": "recovery"}
EFFECT_NAMES |= {"recovery_trained": "recovery minus that of the untrained model"}
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


def format_difference(entry: dict[str, Any]) -> str:
    """Return an entry's value and interval in percentage points, "" without them."""
    missing = entry["value"] is None or entry["ci95"] is None
    return "" if missing else f"{format_points(entry['value'])} {format_interval(entry['ci95'])}"


def format_count(n: dict[str, int]) -> str:
    """Return the number of seeds, classes or images that a claim is a mean over."""
    unit = next(unit for unit in ("seeds", "classes", "images") if unit in n)
    return f"{n[unit]} {unit}"


def shift_sentences(inference: dict[str, dict[str, Any]]) -> list[str]:
    """Return a sentence per mask about pairs of classes in which hiding either one moves the read-out the same way."""
    return [
        f"Criterion shift, {mask}: hiding either class moves the read-out towards "
        + ", ".join(f"{entry['towards']} in {' / '.join(entry['classes'])}" for entry in shifted)
        + "; there the effects are no evidence for anchors."
        for mask, result in inference.items()
        if (shifted := [entry for entry in result["criterion_shifts"] or [] if entry["shift"]])
    ]


def summarize_claims(claims: list[dict[str, Any]]) -> str:
    """Return one sentence: how many claims are supported, and why the others are not."""
    supported = [claim for claim in claims if claim["supported"]]
    failures = Counter(
        f"{entry['verdict']} ({COLUMN_TITLES[name].lower()})"
        for claim in claims
        if not claim["supported"]
        for name, entry in claim["verdicts"].items()
        if entry["verdict"] != HOLDS
    )
    text = f"{len(supported)} of {len(claims)} claims are supported"
    if supported:
        text += ": " + ", ".join(f"{c['claim'].replace('_', ' ')} ({c['image_attention']})" for c in supported)
    why = ", ".join(f"{count} × {reason}" for reason, count in failures.most_common())
    return f"{text}. The others: {why}." if why else f"{text}."


def verdict_reasons(verdicts: dict[str, dict[str, Any]]) -> list[str]:
    """Return why columns of a claim have no verdict."""
    return [f"{COLUMN_TITLES[k]}: {v['verdict']}, {v['reason']}" for k, v in verdicts.items() if "reason" in v]


def format_claims(claims: list[dict[str, Any]]) -> str:
    """Return the claims as a table for the terminal: value, interval and verdict in each column; why some have none."""
    rows = [["claim", "attention", *COLUMN_TITLES.values(), "supported", ""]]
    for claim in claims:
        cells = [f"{format_difference(v)} {v['verdict']}".strip() for v in claim["verdicts"].values()]
        yes = "yes" if claim["supported"] else "no"
        rows.append([claim["claim"], claim["image_attention"], *cells, yes, f"({format_count(claim['n'])})"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reasons = dict.fromkeys(reason for claim in claims for reason in verdict_reasons(claim["verdicts"]))
    return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + list(reasons))


def summarize_sections(results: dict[str, Any]) -> dict[str, list[str]]:
    """Return sentences by section, from one study's part of results.json."""
    return {
        MASKS_SECTION: summarize_mask_comparison(results["paired"]) if results["paired"] else [],
        PATH_SECTION: summarize_path(results["path"]),
        ANSWERS_SECTION: summarize_answers(answers_by_mask(results)),
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


def summarize_path(verdicts: list[dict[str, Any]]) -> list[str]:
    """Return the effects that hold at every strength of regularisation, all others, and which strengths there are."""
    if not verdicts:
        return []
    everywhere, elsewhere = {}, {}
    for verdict in verdicts:
        name = f"{EFFECT_NAMES[verdict['effect']]} in {MEASURE_NAMES[verdict['measure']]}"
        case = f"{verdict['image_attention']}, {INSTRUMENT_NAMES[verdict['instrument']]}"
        if verdict["verdict"] == EVERYWHERE:
            everywhere.setdefault(name, []).append(case)
        else:
            elsewhere.setdefault(name, []).append(f"{case}: {_describe_strengths(verdict)}")
    join = lambda cases_by_name: "; ".join(f"{name} ({'; '.join(cases)})" for name, cases in cases_by_name.items())
    return [
        f"Above zero at every strength of regularisation: {join(everywhere) or 'none of the effects'}.",
        f"Not at every strength: {join(elsewhere) or 'none of the effects'}.",
        f"Strengths: {_list_strengths(verdicts)}.",
    ]


def _list_strengths(verdicts: list[dict[str, Any]]) -> str:
    """Return the strengths of each instrument: "4 in closed form, 1e-06 to 1"."""
    grids = {v["instrument"]: sorted(row["strength"] for row in v["estimates"]) for v in verdicts}
    names = {"closed_form": "in closed form", "optimum": "at the optimum"}
    return "; ".join(f"{len(grid)} {names[key]}, {format_ranges(grid, grid)}" for key, grid in grids.items())


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
