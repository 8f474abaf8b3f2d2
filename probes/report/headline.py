"""The sentences that page and terminal begin with: where a model reads best, and where it differs from random ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from probes.models.sites import FINAL_NORM, PATCHES, is_layer, part_of
from probes.runs.formatting import format_difference, format_points

from .encoder_layers import describe_best_layer
from .site_table import describe_sites, join_words, name_site
from .verdicts import measured_effect

# At which strengths of regularisation a verdict at the optimum counts, by the row where the claim fares worst
AT_ROW = {
    "chosen": ", with an interval for the chosen strengths of regularisation and their neighbours together",
    "stronger": ", with stronger regularisation than cross-validation chose, where it is smallest",
    "weaker": ", with weaker regularisation than cross-validation chose, where it is smallest",
}


def describe_study(results: Mapping[str, Any]) -> list[str]:
    """Return the first sentences about a study: of an encoder first its best layer, then its sites.

    Args:
        results: Content of results.json of a study.
    """
    rows = results["sites"]
    best = results.get("best_layer")
    if not best:
        return describe_sites(rows)
    sentence = describe_best_layer(best)
    highest = max(rows, key=lambda row: row["miou"])["site"]
    # final norm and parts of layers can read more than any layer
    return [
        f"{sentence[0].upper()}{sentence[1:]}.",
        *describe_sites(rows, name_best=highest != best["site"]),
    ]


def kinds_of_sites(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return where the encoders of a report were probed: "the patch embeddings, layers and the final norm".

    Args:
        studies: Content of results.json of each study.
    """
    sites = {row["site"] for study in studies for row in study["sites"]}
    named = [name_site(PATCHES)] * (PATCHES in sites)
    named += ["layers"] * any(is_layer(site) and site != PATCHES for site in sites)
    named += ["parts of layers"] * any(part_of(site) for site in sites)
    named += [name_site(FINAL_NORM)] * (FINAL_NORM in sites)
    return join_words(named or ["several layers side by side"])


def describe_table(results: Mapping[str, Any]) -> list[str]:
    """Return what an encoder's best and last layer differ by in the table, and what a verdict counts; else []."""
    best = results.get("best_layer")
    if not best or best["site"] == best["last"] or best["over_last_ci95"] is None:
        return []
    (claim,) = (claim for claim in results["claims"] if claim["claim"] == "over_last")
    columns = claim["verdicts"]
    row = columns["optimum"].get("row")
    scores = {row["site"]: row["miou"] for row in results["sites"] if is_layer(row["site"])}
    difference = format_points(scores[best["site"]] - scores[best["last"]])
    layer = name_site(best["site"])
    lines = [
        f"The rows of {layer} and {name_site(best['last'])} differ by {difference} points, on the images that have "
        f"chosen {layer}. The verdict counts the difference of layers chosen on other images{AT_ROW.get(row, '')}: "
        f"{format_difference(measured_effect(claim))}."
    ]
    if row in ("stronger", "weaker") and columns["paper"].get("probes") == "solved":
        lines.append(f"At the chosen strengths, that difference is {format_difference(claim)}.")
    return [" ".join(lines)]
