"""Figures of `probes knockout` and `probes starvation` beyond the paper's, for the runs that have them."""

from collections.abc import Iterator
from statistics import mean

from llava_bidir.common.bootstrap import random_swaps
from probes.analyses.knockout.effects import effect_entries, read_cases
from probes.report.claims import confused_patches
from probes.report.study import MASKS, Study
from probes.results.probe_run import ProbeRun

from . import knockout_controls
from .style import ReportFigure


def causal_pictures(study: Study) -> Iterator[ReportFigure]:
    """Effects against controls, doses, windows, heads, attention; starvation by class and on turned images."""
    for mask, run in study.trained.items():
        facts = run.analysis("knockout.json")
        if facts and facts.get("effects"):
            facts = where_claims_are_read(run, facts)
        yield from _knockout(mask, facts, run.analysis("knockout_windows.json"))
    pair = study.pair()
    if pair:
        yield from _starvation(pair[1].analysis("starvation.json"))


def where_claims_are_read(run: ProbeRun, facts: dict) -> dict:
    """knockout.json with the effects on images in which as many patches are wrong as the claims ask for; as it is if
    there are no such images.
    """
    least = max(confused_patches(run), facts["min_patches"])
    swaps = random_swaps(run.metrics["images"], seed=facts["seed"], groups=run.groups)
    pools = {"all": None} | {entry["class"]: [entry["class"]] for entry in facts["classes"]}
    found = {name: read_cases(run, least, classes) for name, classes in pools.items()}
    if found["all"] is None:
        return facts
    effects = [e for name, cases in found.items() if cases for e in effect_entries(name, cases, run.weights, swaps)]
    return facts | {"min_patches": least, "effects": effects}


def _knockout(mask: str, facts: dict | None, windows: dict | None) -> Iterator[ReportFigure]:
    section = "Attention knockout"
    if facts and facts.get("effects"):
        least = facts["min_patches"]
        yield ReportFigure(
            f"knockout_controls_{mask}",
            section,
            f"Against controls, {mask}",
            "The change in wrong patches left when a class is hidden, and what remains of it against as many tokens at "
            "random, matched in distance or in the attention they get, where these were run. Right − wrong says how "
            f"specific it is. Images with {least} or more wrong patches; lines: 95% intervals.",
            knockout_controls.knockout_controls(facts),
        )
        doses, shares = knockout_controls.knockout_doses(facts), knockout_controls.attention_shares(facts)
        if doses:
            caption = "The same effect when only a random part of the class's patches is hidden: does more do more?"
            yield ReportFigure(f"knockout_doses_{mask}", section, f"Dose and response, {mask}", caption, doses, "half")
        if shares:
            caption = (
                "Attention of wrong patches in the unmodified model, by what the adapter's probe calls the patch they "
                "look at. Dashed: did they look alike at all that they see."
            )
            yield ReportFigure(
                f"attention_{mask}", section, f"Where wrong patches look, {mask}", caption, shares, "half"
            )
    if windows:
        where, heads = knockout_controls.knockout_windows(windows), knockout_controls.knockout_heads(windows)
        if where:
            caption = (
                "Effect against as many random tokens when only some layers are cut (rows: the window's first layer, "
                "or its last for up to), at the layer read (columns). Look for the window behind which the colour "
                "stays: there patches are corrected."
            )
            yield ReportFigure(
                f"knockout_windows_{mask}", section, f"Which layers correct, {mask}", caption, where, "wide"
            )
        if heads:
            caption = "Effect against as many random tokens when a single head of a single layer is cut."
            yield ReportFigure(f"knockout_heads_{mask}", section, f"Which heads correct, {mask}", caption, heads)


def _starvation(facts: dict | None) -> Iterator[ReportFigure]:
    section = "Context starvation"
    if facts and "by_class" in facts:
        caption = (
            "The gap of the first patches, and what it would be did every patch show the classes in the whole split's "
            "mix: early patches are mostly a few classes. Lines: 95% intervals."
        )
        drawn = knockout_controls.starvation_by_class(facts)
        yield ReportFigure("starvation_by_class", section, "With the classes held fixed", caption, drawn)
    for flip in facts.get("flips", []) if facts else ():
        accuracy = {mask: (mean(facts[mask]), mean(flip[mask])) for mask in MASKS}
        caption = (
            "Left the gap as above, right on images turned before the model sees them. If positions starve, the gap "
            "stays where it is; if it were what images show there, it would turn along. Here it follows "
            f"{flip['follows']}. Turned pictures are read worse: "
            + ", ".join(f"{mask} {old:.0%} → {new:.0%} accuracy" for mask, (old, new) in accuracy.items())
            + "."
        )
        drawn = knockout_controls.starvation_flip(facts, flip)
        yield ReportFigure(
            f"starvation_{flip['flip']}", section, f"Position or content? ({flip['flip']})", caption, drawn
        )
