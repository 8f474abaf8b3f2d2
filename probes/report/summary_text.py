"""What a section says in words, worked out from the numbers; nothing here is fixed beforehand."""

from typing import Any

from .mask_comparison import ALPHA
from .probe_sensitivity import EFFECTS


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def span(ci95: list[float], digits: int = 1) -> str:
    return f"[{points(ci95[0], digits)}, {points(ci95[1], digits)}]"


def remarks_of(facts: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by section, of one study's part of results.json."""
    found = {"Bidirectional against causal": paired_remarks(facts["paired"]) if facts["paired"] else []}
    found["The scale of the features"] = [
        f"{mask.capitalize()}: {' '.join(scale['verdict'].values())}" for mask, scale in facts["scale"].items()
    ]
    found["Probe seeds"] = [line for mask, entries in facts["seeds"].items() for line in seed_remarks(mask, entries)]
    return found


def paired_remarks(paired: dict[str, Any]) -> list[str]:
    sites = paired["sites"]
    units = f"{paired['images']} images"
    if paired["groups"]:
        units = f"{paired['groups']} groups of images ({paired['images']} in all), swapped and drawn as wholes"
    clear = [entry for entry in sites if entry["p_corrected"] < ALPHA]
    signs = [sum(entry["difference"] * sign > 0 for entry in clear) for sign in (1, -1)]
    effects = ", ".join(
        f"the {EFFECTS[entry['effect']]} differs by {points(entry['difference'])} {span(entry['ci95'])} pp "
        f"(p = {p_value(entry['p'])})"
        for entry in paired["effects"]
    )
    lines = [
        f"Of {len(sites)} sites bidirectional attention is better at {signs[0]} and worse at {signs[1]} "
        f"(corrected p < {ALPHA}; {paired['permutations']} permutations of {units})"
        + (f"; {effects}." if effects else ".")
    ]
    if paired["smallest_p"] > ALPHA:
        lines.append(
            f"With so few groups no p-value can be smaller than {p_value(paired['smallest_p'])}: the test cannot "
            "reject anything, and the intervals are of little worth too."
        )
    return lines


def seed_remarks(mask: str, entries: list[dict[str, Any]]) -> list[str]:
    """Drop-off and recovery over probe seeds."""
    return [
        f"{mask.capitalize()}: {EFFECTS[entry['of']]} {points(entry['mean'])} on average over {entry['seeds']} seeds, "
        f"from {points(entry['lowest'])} to {points(entry['highest'])} (standard deviation {percent(entry['sd'], 2)} "
        f"pp); over images {span(entry['ci95'])}."
        for entry in entries
        if entry["of"] in EFFECTS
    ]
