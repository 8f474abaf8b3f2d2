"""The sentences that page and terminal begin with: where a model reads best, and where it differs from random ones."""

from collections.abc import Mapping
from typing import Any

from probes.models.sites import is_layer
from probes.results.formatting import format_interval, format_points

from .encoder_layers import describe_best_layer
from .site_table import describe_sites, name_site


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


def describe_table(results: Mapping[str, Any]) -> list[str]:
    """Return what the rows of best and last layer of an encoder differ by, and why a verdict counts otherwise; or []."""
    best = results.get("best_layer")
    if not best or best["site"] == best["last"] or best["over_last_ci95"] is None:
        return []
    scores = {row["site"]: row["miou"] for row in results["sites"] if is_layer(row["site"])}
    difference = format_points(scores[best["site"]] - scores[best["last"]])
    counted = f"{format_points(best['over_last'])} {format_interval(best['over_last_ci95'])}"
    return [
        f"The rows of {name_site(best['site'])} and {name_site(best['last'])} differ by {difference} points, which is "
        f"too much for a verdict: these images have chosen {name_site(best['site'])}. With layers chosen on other "
        f"images, the difference is {counted}."
    ]
