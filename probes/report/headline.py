"""The first sentences of page and terminal: the answer, and what random models do. "{A}" stands for the model A."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .compare import BEST_LAYER
from .readings import SiteReading, rows_about
from .words import percent, plain, site_number, the_site

HOLDS = "holds"
SUPPORTED = ("supported", "supported by itself")


def headline(
    lead: SiteReading,
    claims: Mapping[str, Any],
    differences: pd.DataFrame,
    many: bool,
) -> tuple[str, list[str]]:
    """Return the answer, and the sentences after it.

    Args:
        lead: What the first sentence is about.
        claims: The lead's claims by name, rows of :func:`probes.report.tables.by_claim`.
        differences: Of models on the lead's data under its mask.
        many: There are several models.
    """
    name = f"{{{lead.model.key}}}"
    best = lead.best.site
    where = its_site(lead.own[best])
    after = []
    if "recovery" in claims:
        after = about_llm(lead, claims)
    elif "over_last" in claims:
        after = about_layers(claims)
        where = name_layer(lead)
    answer = f"{name} segments best at {where}: {percent(lead.best.value)}% mIoU."
    if "over_last" in claims and claims["over_last"].optimum_verdict == HOLDS:
        answer = f"Read {name} at {where}: {percent(lead.best.value)}% mIoU."
    return answer, after + (about_others(lead, differences) if many else [])


def about_llm(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return what the LLM adds to the adapter, and random LLMs."""
    claim = claims["recovery"]
    adds = f"Its LLM adds {plain(claim.value)} points to its adapter"
    if claim.finding in SUPPORTED:
        return [f"{adds}, random LLMs {plain(max(0, claim.random))}."]
    if claim.finding == "not learned":
        return [f"{adds}, but this is not shown to be learned."]
    if claim.finding == "untested":
        return ["Whether its LLM adds to its adapter is untested."]
    drop = claims.get("adapter_drop")
    if drop is not None and drop.optimum_verdict == HOLDS:
        than = ", more than random adapters do" if drop.finding in SUPPORTED else ""
        than = ", as random adapters do" if drop.finding == "not learned" else than
        loses = f"Its adapter loses {plain(drop.value)} points{than}"
        return [f"{loses}, and no LLM layer is shown to recover them."]
    adapter = lead.row("adapter")
    score = f" ({percent(adapter.value)}%)" if adapter and lead.best is not adapter else ""
    return [f"No LLM layer is shown to improve on its adapter{score}."]


def about_layers(claims: Mapping[str, Any]) -> list[str]:
    """Return what the layers of a bare encoder add to its patches, and whether the last one reads less."""
    after = []
    gain = claims.get("layer_gain")
    if gain is not None and gain.finding in SUPPORTED:
        random = (
            f", random layers {plain(max(0, gain.random))}" if gain.random == gain.random else ""
        )
        after.append(f"Its layers add {plain(gain.value)} points to its patches{random}.")
    last = claims["over_last"]
    if last.optimum_verdict != HOLDS:
        return [*after, "The last layer is not shown to read less."]
    after.append(f"It reads {plain(last.value)} points more than the last layer.")
    said = {
        "supported": "Random layers show no such gap.",
        "also in random layers": "Random layers have such a gap, too.",
    }
    return [*after, said[last.finding]] if last.finding in said else after


def name_layer(lead: SiteReading) -> str:
    """Return "layer 9 of 12" of a bare encoder's best site, or its name."""
    number = site_number(lead.own[lead.best.site])
    if not number:
        return its_site(lead.own[lead.best.site])
    return (
        "its last layer" if number == lead.model.depth else f"layer {number} of {lead.model.depth}"
    )


def about_others(lead: SiteReading, differences: pd.DataFrame) -> list[str]:
    """Return how the first other model that differs reads, at the best layers."""
    best = differences[
        (differences["of"] == BEST_LAYER) & (differences["low"] * differences["high"] > 0)
    ]
    for row in best.itertuples():
        more = "more" if row.difference > 0 else "less"
        than = ""
        if row.site != lead.best.site:  # another site than that of the first sentence
            than = f" at its best layer than {{{row.first}}} at its best LLM layer"
        return [f"{{{row.second}}} reads {plain(row.difference)} points {more}{than}."]
    return []


def its_site(site: str) -> str:
    """Return the name of a site in a sentence about the model: its adapter, layer 4."""
    return the_site(site).replace("the ", "its ")


def claims_about(claims: pd.DataFrame, reading: SiteReading) -> dict[str, Any]:
    """Return the claims about a reading by name."""
    return {row.claim: row for row in rows_about(claims, reading).itertuples()}


def plain_text(sentences: Sequence[str], labels: Mapping[str, str]) -> str:
    """Return sentences whose models have key and label, or only the label if there is one model."""
    text = " ".join(sentences)
    for key, label in labels.items():
        text = text.replace(f"{{{key}}}", f"{key} {label}" if len(labels) > 1 else label)
    return text
