"""The first screen of the page: the answer in sentences, and the large figure of scores by site beside random models.

In sentences "{A}" stands for the model A. The figure marks the best site, and has lines to the photos below.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from probes.tasks import SEGMENTATION, TASKS

from .charts import Frame, colour_class
from .compare import BEST_LAYER
from .readings import ReportView, SiteReading, by_site
from .words import SIGNS, number, site_name, site_number, site_tick, the_site, zone_of

HOLDS = "holds"
SUPPORTED = ("supported", "supported by itself")
WIDE = ((856, 412), (40, 62, 26, 76))  # size, and margins
WRITTEN = ("encoder", "adapter")  # sites with their whole name at the axis
NARROW = ((358, 270), (34, 46, 26, 46))
TILES = 6
GREY_NAMES = {"LLM layers": "random LLMs", "adapter": "random adapters"}
MOST_BANDS = 4  # models whose random models are drawn
LEAST_GAP = 0.1  # of the height, from which the bracket is drawn
MOST_COLOURS = 6  # models that are told apart by colour


# ------------------------------------------------------------------------------------------------ sentences
def headline(lead: SiteReading, claims: Mapping[str, Any], differences: pd.DataFrame) -> list[str]:
    """Return the answer, and the sentences after it.

    Args:
        lead: What the first sentence is about.
        claims: The lead's claims by name, rows of :func:`probes.report.tables.by_claim`.
        differences: Of models on the lead's data under its mask.
    """
    name = f"{{{lead.model.key}}}"
    if lead.task != SEGMENTATION:
        task = TASKS[lead.task]
        where = its_site(lead.own[lead.best.site])
        score = f"{task.labels[task.score]} {lead.best.value_text}"
        return [f"{name} is read best at {where}: {score}."]
    best = lead.best.site
    where = its_site(lead.own[best])
    after = []
    if "recovery" in claims:
        after = about_llm(lead, claims)
    elif "over_last" in claims:
        after = about_layers(claims)
        where = name_layer(lead)
    answer = f"{name} segments best at {where}: {lead.best.value_text}% mIoU."
    if "over_last" in claims and claims["over_last"].optimum_verdict == HOLDS:
        answer = f"Read {name} at {where}: {lead.best.value_text}% mIoU."
    return [answer, *after, *about_others(lead, differences)]


def about_llm(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return what the LLM adds to the adapter, and random LLMs."""
    claim = claims["recovery"]
    adds = f"Its LLM adds {number(claim.value)} points to its adapter"
    if claim.finding in SUPPORTED:
        return [f"{adds}, random LLMs {number(max(0, claim.random))}."]
    if claim.finding == "not learned":
        return [f"{adds}, but this is not shown to be learned."]
    if claim.finding == "untested":
        return ["Whether its LLM adds to its adapter is untested."]
    drop = claims.get("adapter_drop")
    if drop is not None and drop.optimum_verdict == HOLDS:
        than = ", more than random adapters do" if drop.finding in SUPPORTED else ""
        than = ", as random adapters do" if drop.finding == "not learned" else than
        loses = f"Its adapter loses {number(drop.value)} points{than}"
        return [f"{loses}, and no LLM layer is shown to recover them."]
    adapter = lead.row("adapter")
    score = f" ({adapter.value_text}%)" if adapter and lead.best is not adapter else ""
    return [f"No LLM layer is shown to improve on its adapter{score}."]


def about_layers(claims: Mapping[str, Any]) -> list[str]:
    """Return what the layers of a bare encoder add to its patches, and whether the last one reads less."""
    after = []
    gain = claims.get("layer_gain")
    if gain is not None and gain.finding in SUPPORTED:
        random = number(max(0, gain.random))
        adds = f"Its layers add {number(gain.value)} points to its patches"
        after.append(f"{adds}, random layers {random}.")
    last = claims["over_last"]
    if last.optimum_verdict != HOLDS:
        return [*after, "The last layer is not shown to read less."]
    after.append(f"It reads {number(last.value)} points more than the last layer.")
    said = {
        "supported": "Random layers show no such gap.",
        "also in random layers": "Random layers have such a gap, too.",
    }
    return [*after, said[last.finding]] if last.finding in said else after


def name_layer(lead: SiteReading) -> str:
    """Return "layer 9 of 12" of a bare encoder's best site, or its name."""
    site = lead.own[lead.best.site]
    layer = site_number(site)
    if not layer:
        return its_site(site)
    depth = lead.model.depth
    return "its last layer" if layer == depth else f"layer {layer} of {depth}"


def about_others(lead: SiteReading, differences: pd.DataFrame) -> list[str]:
    """Return how the first other model that differs reads, at the best layers."""
    is_clear = differences["low"] * differences["high"] > 0
    for row in differences[is_clear & (differences["of"] == BEST_LAYER)].itertuples():
        more = "more" if row.difference > 0 else "less"
        than = ""
        if row.site != lead.best.site:  # another site than that of the first sentence
            than = f" at its best layer than {{{row.first}}} at its best LLM layer"
        return [f"{{{row.second}}} reads {number(abs(row.difference))} points {more}{than}."]
    return []


def its_site(site: str) -> str:
    """Return the name of a site in a sentence about the model: its adapter, layer 4."""
    return the_site(site).replace("the ", "its ")


def plain_text(sentences: Sequence[str], labels: Mapping[str, str]) -> str:
    """Return sentences whose models have key and label, or only the label if there is one model."""
    text = " ".join(sentences)
    for key, label in labels.items():
        text = text.replace(f"{{{key}}}", f"{key} {label}" if len(labels) > 1 else label)
    return text


# ------------------------------------------------------------------------------------------------ figure
def choose_tiles(view: ReportView, most: int = TILES) -> list[str]:
    """Return the sites that have photos: all if they are few, else ends of the parts, the best, and others evenly."""
    if len(view.axis.sites) <= most:
        return view.axis.sites
    sites = [row.site for row in view.lead.rows]
    layers = [site for site in sites if site.startswith("layer")]
    wanted = ["adapter", "encoder", view.lead.best.site, (layers or sites)[-1], sites[0]]
    chosen = list(dict.fromkeys(site for site in wanted if site in sites))[:most]
    while len(chosen) < min(most, len(sites)):
        taken = [sites.index(site) for site in chosen]
        rest = [i for i in range(len(sites)) if i not in taken]
        chosen.append(sites[max(rest, key=lambda i: min(abs(i - j) for j in taken))])
    return [site for site in sites if site in chosen]


def tile_places(tiles: Sequence[str]) -> list[float]:
    """Return where the middles of tiles are, in per cent of the wide figure's width."""
    (width, _), (left, right, *_) = WIDE
    step = (width - left - right) / len(tiles)
    return [round(100 * (left + (i + 0.5) * step) / width, 2) for i in range(len(tiles))]


class Mark(NamedTuple):
    """A text of the figure, whose `anchor` is the end that stands at x, or a line with a path."""

    look: str
    x: float = 0
    y: float = 0
    text: str = ""
    anchor: str = "middle"
    path: str = ""


def large_figure(view: ReportView) -> list[tuple[Frame, list[Mark]]]:
    """Return the figure at both widths, with what stands above its curves."""
    lead = view.lead
    sites = view.axis.sites
    models = len({reading.model.key for reading in view.front})
    own = [reading for reading in view.front if reading.model is lead.model]
    shown = view.front if models <= MOST_COLOURS else own
    chart = by_site(
        sorted(shown, key=lambda reading: reading is lead),
        view.axis,
        view.masks,
        [reading for reading in view.front if reading not in shown],
        [lead] if models > 1 else shown,
        view.front if models <= MOST_BANDS else own,
        title=f"{lead.model.label} is best at {site_name(lead.best.site)}:",
        shaded=[i for i, site in enumerate(sites) if site == "adapter"],
    )
    drawn = []
    for size, margins in (WIDE, NARROW):
        frame = Frame(chart, size, margins)
        is_wide = (size, margins) == WIDE
        if is_wide and frame.step > 50:
            frame.names = {
                i: site if site in WRITTEN else site_tick(site) for i, site in enumerate(sites)
            }
        above = [
            *end_labels(frame, view=view, readings=shown, many=models > 1),
            *best_site(frame, view, is_wide),
            *grey_names(frame, view=view, readings=shown, is_wide=is_wide),
            Mark(look="ylab", x=2, y=13, text=chart.unit, anchor="start"),
        ]
        drawn.append((frame, above))
    return drawn


def end_labels(
    frame: Frame, view: ReportView, readings: Sequence[SiteReading], many: bool
) -> Iterator[Mark]:
    """Yield the score at the last site of each curve; labels of one place are moved apart, those within below it."""
    by_place: dict[float, list[SiteReading]] = {}
    for reading in readings:
        by_place.setdefault(view.axis.place(reading, reading.rows[-1].site), []).append(reading)
    for place, own in by_place.items():
        is_last = place == len(view.axis.sites) - 1
        if not (is_last or many):
            continue
        heights = dodge([frame.y(reading.rows[-1].value) for reading in own], 15)
        for reading, y in zip(own, heights, strict=True):
            words = [reading.model.key] * many
            words += [SIGNS.get(reading.mask, "")] * (len(view.masks) > 1 and is_last)
            text = " ".join([*words, reading.rows[-1].value_text])
            look = f"end {colour_class(reading.model.number)}"
            below = y + (4 if is_last else 17)
            yield Mark(look=look, x=frame.x(place) + 11, y=below, text=text, anchor="start")


def dodge(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights moved apart to `gap`, in their order."""
    moved = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for _ in range(60):
        for a, b in zip(order, order[1:], strict=False):
            missing = gap - (moved[b] - moved[a])
            if missing > 0:
                moved[a] -= missing / 2
                moved[b] += missing / 2
    return moved


def best_site(frame: Frame, view: ReportView, is_wide: bool) -> Iterator[Mark]:
    """Yield the ring at the best site, its score, and the bracket of what random models do not reach."""
    lead = view.lead
    best = lead.best
    x, y = frame.x(view.axis.place(lead, best.site)), frame.y(best.value)
    ring = f"M{x - 9.5:.1f} {y}a9.5 9.5 0 1 0 19 0a9.5 9.5 0 1 0-19 0"
    yield Mark(f"ring {colour_class(lead.model.number)}", path=ring)
    anchor, shift = "middle", 0
    if not frame.left + 70 < x < frame.right - 60:
        anchor, shift = ("end", 10) if x > frame.width / 2 else ("start", -10)
    name = f"best: {site_name(best.site)}" if is_wide else "best"
    top = max(22.0, frame.y(best.high) - 9)
    text = f"{name}, {best.value_text}" + "%" * (lead.task == SEGMENTATION)
    yield Mark(look="best", x=x + shift, y=top, text=text, anchor=anchor)
    reached = lead.draws.get(best.site, [best.value])
    start, end = y + 12, frame.y(max(reached)) - 2
    if best.minus_random > 0 and end - start > LEAST_GAP * (frame.base - frame.top):
        yield Mark("gap", path=f"M{x} {start:.1f}V{end:.1f}M{x - 4:.1f} {end:.1f}h8")
        said = best.minus_random_text + " beyond random" * is_wide
        yield Mark(look="gaptext", x=x - 8, y=(start + end) / 2, text=said, anchor="end")


def grey_names(
    frame: Frame, view: ReportView, readings: Sequence[SiteReading], is_wide: bool
) -> Iterator[Mark]:
    """Yield the names of the ranges of random models, below them and clear of the lead's band and of other curves."""
    lead = view.lead
    for points in frame.chart.grey:
        point = points[min(len(points) - 1, (len(points) + 1) // 2 - (not is_wide))]
        site = view.axis.sites[round(point.x)]
        zone = zone_of(site, view.axis.has_llm)
        name = GREY_NAMES.get(zone, "random layers")
        x, y = frame.x(point.x), frame.y(point.low) + 17
        if zone == "adapter" and frame.step > 110:
            yield Mark(
                look="randtext", x=x + 18, y=frame.y(point.value) + 4, text=name, anchor="start"
            )
        elif zone != "adapter" or is_wide:
            row = lead.row(site)
            if row and frame.y(row.high) - 14 < y < frame.y(row.low) + 12:
                y = frame.y(row.low) + 15
            others = [frame.y(r.row(site).value) for r in readings if r.row(site) and r is not lead]
            while any(abs(height + 5 - y) < 12 for height in others):
                y += 4
            if y < frame.base - 4:
                yield Mark(look="randtext", x=x, y=y, text=name)
