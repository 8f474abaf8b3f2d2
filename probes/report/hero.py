"""The first screen of the page: the answer in sentences, and the large figure of scores by site beside random models.

In sentences "{A}" stands for the model A. The figure marks the best site, and has lines to the photos below.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from probes.analyses.charts import Chart
from probes.tasks import SEGMENTATION, TASKS

from .charts import Frame, colour_class
from .pictures import has_same_photo
from .ranking import ALIKE, ranking, rivals_of
from .readings import Name, ReportView, SiteReading, by_site, rows_about
from .verdicts import HOLDS, NOT_LEARNED, REVERSED, UNDECIDED
from .words import SIGNS, its_site, number, site_name, site_number, zone_of

UNCONTROLLED = "No random models were solved: whether training put it there is not known."
SUPPORTED = ("supported", "supported by itself")
WIDE = ((856, 412), (40, 62, 26, 76))  # size, and margins
WRITTEN = ("encoder", "adapter")  # sites with their whole name at the axis
NARROW = ((358, 270), (34, 46, 26, 46))
TILES = 6
GREY_NAMES = {"LLM layers": "random LLMs", "adapter": "random adapters"}
MOST_BANDS = 4  # models whose random models are drawn
COMPARISON = 70  # px, of the verdict on several models, above the figure: the maps below are on the first screen still
TICK_ROW = 15  # px
LABEL_WIDTH, LABEL_HEIGHT = 52, 14  # px, of a score at a ring
MOST_STRIPS = 3
LEAST_GAP = 0.1  # of the height, from which the bracket is drawn
MOST_COLOURS = 6  # models that are told apart by colour


# ------------------------------------------------------------------------------------------------ sentences
def headline(view: ReportView) -> list[str]:
    """Return the answer, and the sentences after it."""
    lead = view.lead
    if lead.task != SEGMENTATION:
        task = TASKS[lead.task]
        where = its_site(lead.own[lead.best.site])
        score = f"{task.labels[task.score]} {lead.best.value_text}"
        return [f"{lead.token} is read best at {where}: {score}."]
    rows = rows_about(view.claims, lead)
    claims = {row.claim: row for row in rows.itertuples()}
    if rivals := rivals_of(view):
        return [*ranking(view, rivals), *about_training(lead, claims)]
    return about_one(lead, claims)


def about_one(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return the answer about one model, and what its LLM or its layers add.

    Args:
        lead: What is read.
        claims: The lead's claims by name, rows of :func:`probes.report.tables.by_claim`.
    """
    where = its_site(lead.own[lead.best.site])
    score = f"{lead.best.value_text}% mIoU"
    answer = f"{lead.token} segments best at {where}: {score}."
    if not lead.draws:
        return [answer, UNCONTROLLED]
    if "recovery" in claims:
        return [answer, *about_llm(lead, claims)]
    if "over_last" not in claims:
        return [answer]
    where = name_layer(lead)
    answer = f"{lead.token} segments best at {where}: {score}."
    if claims["over_last"].optimum_verdict == HOLDS:
        answer = f"Read {lead.token} at {where}: {score}."
    return [answer, *about_layers(lead, claims)]


def about_training(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return what training has added to the lead, in a sentence, beside other models and masks."""
    if not lead.draws:
        return [UNCONTROLLED]
    said = about_gain(claims)
    if "recovery" in claims:
        said = about_llm(lead, claims)
    return [text.replace("Its ", f"{lead.token}'s ", 1) for text in said]


def about_llm(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return what the LLM adds to the adapter, and random LLMs."""
    claim = claims["recovery"]
    adds = f"Its LLM adds {number(claim.value)} points to its adapter"
    if said := about_added(claim, adds, "random LLMs"):
        return said
    if claim.finding == "untested":
        return ["Whether its LLM adds to its adapter is untested."]
    improves, recovers = "is shown to improve", "is shown to recover"
    if claim.finding in ALIKE:
        improves, recovers = "improves", "recovers"
    drop = claims.get("adapter_drop")
    if drop is not None and drop.optimum_verdict == HOLDS:
        than = ""
        if drop.finding in SUPPORTED:
            than = ", more than random adapters do"
        elif drop.finding == NOT_LEARNED:
            than = ", as random adapters do"
        loses = f"Its adapter loses {number(drop.value)} points{than}"
        return [f"{loses}, and no LLM layer {recovers} them."]
    if claim.finding == REVERSED:
        return [f"Its LLM layers read {number(-claim.value)} points less than its adapter."]
    adapter = lead.row("adapter")
    score = ""
    if adapter and lead.best is not adapter:
        score = f" ({adapter.value_text}%)"
    return [f"No LLM layer {improves} on its adapter{score}."]


def about_gain(claims: Mapping[str, Any]) -> list[str]:
    """Return what the layers of a bare encoder add to its patches."""
    gain = claims.get("layer_gain")
    if gain is None:
        return []
    if gain.finding == "untested":
        return ["Whether training put it there is untested."]
    adds = f"Its layers add {number(gain.value)} points to its patches"
    return about_added(gain, adds, "random layers")


def about_added(claim: Any, adds: str, random: str) -> list[str]:
    """Return what a part adds, beside what random ones add; [] of a claim that does not hold."""
    if claim.finding in SUPPORTED:
        return [f"{adds}, {random} {number(max(0, claim.random))}."]
    if claim.finding == NOT_LEARNED:
        return [f"{adds}, as {random} do."]
    if claim.finding == UNDECIDED and claim.optimum_verdict == HOLDS:
        return [f"{adds}, but this is not shown to be learned."]
    return []


def about_layers(lead: SiteReading, claims: Mapping[str, Any]) -> list[str]:
    """Return what the layers of a bare encoder add to its patches, and whether the last one reads less."""
    after = []
    if claims.get("layer_gain") is not None and claims["layer_gain"].finding in SUPPORTED:
        after += about_gain(claims)
    last = claims["over_last"]
    if site_number(lead.own[lead.best.site]) == lead.model.depth:
        return after
    if last.finding in ALIKE:
        return [*after, "The last layer reads as much."]
    if last.optimum_verdict != HOLDS:
        return [*after, "The last layer is not shown to read less."]
    after.append(f"It reads {number(last.value)} points more than the last layer.")
    said = {
        "supported": "Random layers show no such gap.",
        NOT_LEARNED: "Random layers have such a gap, too.",
    }
    if last.finding in said:
        after.append(said[last.finding])
    return after


def name_layer(lead: SiteReading) -> str:
    """Return "layer 9 of 12" of a bare encoder's best site, or its name."""
    site = lead.own[lead.best.site]
    layer = site_number(site)
    if not layer:
        return its_site(site)
    if layer == lead.model.depth:
        return "its last layer"
    return f"layer {layer} of {lead.model.depth}"


def plain_text(sentences: Sequence[str], names: Mapping[str, Name]) -> str:
    """Return sentences whose models and readings have letter and label, or only the label without letters."""
    text = " ".join(sentences)
    for token, name in names.items():
        text = text.replace(f"{{{token}}}", f"{name.letter} {name.text}".strip())
    return text


# ------------------------------------------------------------------------------------------------ figure
class Strip(NamedTuple):
    """A row of pictures below the figure: what the probes of a reading see at its own sites."""

    reading: SiteReading
    best: str
    sites: list[str]


def strips(view: ReportView) -> list[Strip]:
    """Return the rows of pictures: of the lead and of the best others, in the order of the command."""
    compared = [view.lead, *(rival.reading for rival in rivals_of(view))]
    shown = [reading for reading in compared if has_same_photo(reading, view.lead)]
    rows = []
    for reading in view.front:
        if reading in shown[:MOST_STRIPS]:
            best = view.best(reading).site
            rows.append(Strip(reading, best=best, sites=choose_sites(reading, best)))
    return rows


def choose_sites(reading: SiteReading, best: str, most: int = TILES) -> list[str]:
    """Return sites of a reading: all if they are few, else ends of the parts, the best, and others evenly."""
    sites = [row.site for row in reading.rows]
    layers = [site for site in sites if site.startswith("layer")]
    *_, last = layers or sites
    wanted = dict.fromkeys(["adapter", "encoder", best, last, sites[0]])
    chosen = [site for site in wanted if site in sites][:most]
    while len(chosen) < min(most, len(sites)):
        taken = [sites.index(site) for site in chosen]
        rest = [i for i in range(len(sites)) if i not in taken]
        distances = {i: min(abs(i - j) for j in taken) for i in rest}
        farthest = max(rest, key=distances.__getitem__)
        chosen.append(sites[farthest])
    return [site for site in sites if site in chosen]


def tile_places(tiles: Sequence[str]) -> list[float]:
    """Return where the middles of tiles are, in per cent of the wide figure's width."""
    (width, _), (left, right, *_) = WIDE
    step = (width - left - right) / len(tiles)
    middles = [left + (i + 0.5) * step for i in range(len(tiles))]
    return [round(100 * middle / width, 2) for middle in middles]


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
    shown, chart = _chart_of(view)
    drawn = []
    for size, margins in (WIDE, NARROW):
        is_wide = (size, margins) == WIDE
        rows = tick_rows(view, shown)
        more = TICK_ROW * max(0, len(rows) - 1)
        width, height = size
        if is_wide and len(shown) in (2, 3):  # of more, the list of models is as high as the figure
            height -= COMPARISON
        *above_and_beside, below = margins
        frame = Frame(chart, (width, height + more), (*above_and_beside, below + more))
        if rows:
            frame.names = {}
        elif is_wide and frame.step > 50:
            for i, site in enumerate(view.axis.sites):
                if site in WRITTEN:
                    frame.names = frame.names | {i: site}
        above = [
            *ticks_of_rows(frame, rows),
            *best_sites(frame, view, readings=shown, is_wide=is_wide),
            *beyond_random(frame, view, is_wide),
            *grey_names(frame, view=view, readings=shown, is_wide=is_wide),
            Mark(look="ylab", x=2, y=13, text=chart.unit, anchor="start"),
        ]
        drawn.append((frame, above))
    return drawn


def _chart_of(view: ReportView) -> tuple[list[SiteReading], Chart]:
    """Return the readings that have colours, and the chart of all."""
    lead = view.lead
    of_lead = [reading for reading in view.front if reading.model is lead.model]
    models = len({reading.model.key for reading in view.front})
    shown = view.front
    if models > MOST_COLOURS:
        shown = of_lead
    banded = shown
    if models > 1:
        banded = [lead]
    random = of_lead
    if models <= MOST_BANDS:
        random = view.front
    chart = by_site(
        sorted(shown, key=lambda reading: reading is lead),
        view.axis,
        view.masks,
        others=[reading for reading in view.front if reading not in shown],
        banded=banded,
        random=random,
        title=f"{lead.model.label} is best at {site_name(view.best(lead).site)}:",
        shaded=[i for i, site in enumerate(view.axis.sites) if site == "adapter"],
    )
    return shown, chart


class TickRow(NamedTuple):
    """The sites of models of one depth, below the figure: letters and colour of the first, names by place."""

    letters: str
    number: int
    names: dict[float, str]


def tick_rows(view: ReportView, readings: Sequence[SiteReading]) -> list[TickRow]:
    """Return a row of ticks for each depth, if models differ in it."""
    if not view.axis.is_relative:
        return []
    by_sites: dict[tuple, list[SiteReading]] = {}
    for reading in readings:
        sites = tuple(reading.own.values())
        by_sites.setdefault((reading.model.depth, sites), []).append(reading)
    rows = []
    for same in by_sites.values():
        first = same[0]
        letters = "".join(dict.fromkeys(reading.model.key for reading in same))
        rows.append(TickRow(letters, first.model.number, view.axis.ticks(first)))
    return rows


def ticks_of_rows(frame: Frame, rows: Sequence[TickRow]) -> Iterator[Mark]:
    """Yield the letters and ticks of rows; a tick that would run into the one before is left out."""
    for i, row in enumerate(rows):
        look = f"tick {colour_class(row.number)}"
        y = frame.base + 16 + TICK_ROW * i
        yield Mark(look=look, x=frame.left - 10, y=y, text=row.letters, anchor="end")
        for x, name in frame.labels_of(row.names):
            yield Mark(look=look, x=x, y=y, text=name)


def best_sites(
    frame: Frame, view: ReportView, readings: Sequence[SiteReading], is_wide: bool
) -> Iterator[Mark]:
    """Yield a ring at the best site of each reading with its score, which is moved off those of others."""
    rings = {}
    for reading in readings:
        if reading in view.compared:
            best = view.best(reading)
            x = frame.x(view.axis.place(reading, best.site))
            rings[reading] = (x, frame.y(best.value))
    written: list[tuple[float, float]] = []
    from_the_top = sorted(rings, key=lambda reading: rings[reading][1])
    for reading in from_the_top:
        x, y = rings[reading]
        colour = colour_class(reading.model.number)
        best = view.best(reading)
        yield Mark(
            f"ring {colour}", path=f"M{x - 9.5:.1f} {y}a9.5 9.5 0 1 0 19 0a9.5 9.5 0 1 0-19 0"
        )
        if len(rings) == 1:
            name = "best"
            if is_wide:
                name = f"best: {site_name(reading.own[best.site])}"
            top = max(22.0, frame.y(best.high) - 9)
            anchor, shift = anchor_at(frame, x)
            text = f"{name}, {best.value_text}" + "%" * (reading.task == SEGMENTATION)
            yield Mark(look="best", x=x + shift, y=top, text=text, anchor=anchor)
            continue
        beside = [other for place, other in written if abs(place - x) < LABEL_WIDTH]
        height = free_height(y, beside)
        written.append((x, height))
        letter = view.names[reading.model.key].letter
        sign = ""
        if len(view.masks) > 1:
            sign = SIGNS.get(reading.mask, reading.mask)
        text = " ".join(filter(None, (letter, sign, best.value_text)))
        yield Mark(look=f"end {colour}", x=x, y=height, text=text)


def free_height(y: float, taken: Sequence[float]) -> float:
    """Return the height of a label above a ring, or below it where others are."""
    for height in (y - 15, y + 25, y - 31, y + 41):
        if all(abs(height - other) >= LABEL_HEIGHT for other in taken):
            return height
    return y - 15


def anchor_at(frame: Frame, x: float) -> tuple[str, float]:
    """Return the anchor of a long label and how far it is moved, so that it stays in the figure."""
    if frame.left + 70 < x < frame.right - 60:
        return "middle", 0
    if x > frame.width / 2:
        return "end", 10
    return "start", -10


def beyond_random(frame: Frame, view: ReportView, is_wide: bool) -> Iterator[Mark]:
    """Yield the bracket of what random models do not reach at the lead's best site."""
    best = view.best(view.lead)
    x = frame.x(view.axis.place(view.lead, best.site))
    y = frame.y(best.value)
    reached = view.lead.draws.get(best.site, [best.value])
    start, end = y + 12, frame.y(max(reached)) - 2
    least = LEAST_GAP * (frame.base - frame.top)
    if not best.minus_random > 0 or end - start <= least:
        return
    yield Mark("gap", path=f"M{x} {start:.1f}V{end:.1f}M{x - 4:.1f} {end:.1f}h8")
    text = best.minus_random_text
    if is_wide:
        text += " beyond random"
    middle = (start + end) / 2
    # beside a curve in the left half, where there is room
    anchor = "end"
    shift = -8
    if x - frame.left < 130:
        anchor = "start"
        shift = 8
    yield Mark(look="gaptext", x=x + shift, y=middle, text=text, anchor=anchor)


def grey_names(
    frame: Frame, view: ReportView, readings: Sequence[SiteReading], is_wide: bool
) -> Iterator[Mark]:
    """Yield the names of the ranges of random models, below them and clear of the lead's band and of other curves."""
    lead = view.lead
    for points in frame.chart.grey:
        middle = (len(points) + is_wide) // 2
        point = points[min(len(points) - 1, middle)]
        site = view.axis.sites[round(point.x)]
        zone = zone_of(site, view.axis.has_llm)
        name = GREY_NAMES.get(zone, "random layers")
        x = frame.x(point.x)
        y = frame.y(point.low) + 17
        if zone == "adapter":
            height = frame.y(point.value) + 4
            if frame.step > 110:
                yield Mark(look="randtext", x=x + 18, y=height, text=name, anchor="start")
                continue
            if not is_wide:
                continue
        row = lead.row(site)
        if row:
            band_top = frame.y(row.high) - 14
            band_base = frame.y(row.low) + 12
            if band_top < y < band_base:
                y = band_base + 3
        rows = [reading.row(site) for reading in readings if reading is not lead]
        rows.append(lead.position)
        heights = [frame.y(row.value) for row in rows if row]
        while any(abs(height + 5 - y) < 12 for height in heights):
            y += 4
        if y < frame.base - 4:
            yield Mark(look="randtext", x=x, y=y, text=name)
