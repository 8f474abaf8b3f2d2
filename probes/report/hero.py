"""The large figure of the page: scores by site beside random models, the best site, and lines to the photos below."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .charts import Frame, colour_class
from .readings import SiteAxis, SiteReading, by_site
from .words import SIGNS, percent, signed, site_name, site_tick, zone_of

WIDE = ((856, 412), (40, 62, 26, 76))  # size, and margins
WRITTEN = ("encoder", "adapter")  # sites with their whole name at the axis
NARROW = ((358, 270), (34, 46, 26, 46))
TILES = 6
TILE_WIDTH = 13.6  # per cent of the width
MOST_BANDS = 4  # models whose random models are drawn
LEAST_GAP = 0.1  # of the height, from which the bracket is drawn
MOST_COLOURS = 6  # models that are told apart by colour


def choose_tiles(axis: SiteAxis, lead: SiteReading, most: int = TILES) -> list[str]:
    """Return the sites that have photos: all if they are few, else ends of the parts, the best, and others evenly."""
    if len(axis.sites) <= most:
        return axis.sites
    sites = [row.site for row in lead.rows]
    layers = [site for site in sites if site.startswith("layer")]
    ends = [site for site in ("adapter", "encoder") if site in sites]
    chosen = [
        *ends,
        lead.best.site,
        layers[-1] if layers else sites[-1],
        sites[0],
    ]
    chosen = list(dict.fromkeys(chosen))[:most]
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


class Label(NamedTuple):
    """A text of the figure; `anchor` is the end that stands at x."""

    look: str
    x: float
    y: float
    text: str
    anchor: str = "middle"


class Line(NamedTuple):
    """A line of the figure."""

    look: str
    path: str


def large_figure(
    readings: Sequence[SiteReading],
    lead: SiteReading,
    axis: SiteAxis,
    masks: Sequence[str],
    tiles: Sequence[str],
) -> list[tuple[Frame, list[Label | Line]]]:
    """Return the figure at both widths, with what stands above its curves.

    Args:
        readings: Those of the first data set.
        lead: What the first sentence is about.
        axis: Of their sites.
        masks: Their masks.
        tiles: Sites that have photos below, () without photos.
    """
    models = {reading.model.key for reading in readings}
    many = len(models) > 1
    shown = [r for r in readings if r.model is lead.model or len(models) <= MOST_COLOURS]
    own = [r for r in readings if r.model is lead.model]
    chart = by_site(
        sorted(shown, key=lambda reading: reading is lead),
        axis,
        masks,
        [reading for reading in readings if reading not in shown],
        [lead] if many else readings,
        readings if len(models) <= MOST_BANDS else own,
        title=f"{lead.model.label} is best at {site_name(lead.best.site)}:",
        shaded=[axis.sites.index("adapter")] if "adapter" in axis.sites else [],
    )
    drawn = []
    for size, margins in (WIDE, NARROW):
        frame = Frame(chart, size, margins)
        is_wide = (size, margins) == WIDE
        if is_wide and frame.step > 50:
            names = {site: site if site in WRITTEN else site_tick(site) for site in axis.sites}
            frame.names = dict(enumerate(names.values()))
        above = [
            *zone_names(frame, axis),
            *end_labels(
                frame,
                axis,
                shown,
                many,
                len(masks) > 1,
            ),
            *best_site(
                frame,
                axis,
                lead,
                is_wide,
            ),
            *grey_names(
                frame,
                axis,
                shown,
                lead,
                is_wide,
            ),
            Label(
                "ylab",
                2,
                13,
                chart.unit,
                "start",
            ),
            *(
                leaders(
                    frame,
                    axis,
                    lead,
                    tiles,
                )
                if is_wide and tiles
                else ()
            ),
        ]
        drawn.append((frame, above))
    return drawn


def zone_names(frame: Frame, axis: SiteAxis) -> Iterator[Label | Line]:
    """Yield the lines and names of the parts of the models below the axis."""
    for name, places in axis.zones:
        start, end = frame.x(places[0] - 0.5), frame.x(places[-1] + 0.5)
        yield Line("axis", f"M{start + 3:.1f} {frame.base + 0.5:.1f}H{end - 3:.1f}")
        if len(places) > 1:
            more = ", at equal relative depth" * axis.is_relative
            yield Label(
                "zonename",
                (start + end) / 2,
                frame.base + 34,
                name + more,
            )


def end_labels(
    frame: Frame,
    axis: SiteAxis,
    readings: Sequence[SiteReading],
    many: bool,
    several_masks: bool,
) -> Iterator[Label]:
    """Yield the score at the last site of each curve; labels of one place are moved apart, those within below it."""
    by_place: dict[float, list[SiteReading]] = {}
    for reading in readings:
        by_place.setdefault(axis.place(reading, reading.rows[-1].site), []).append(reading)
    for place, own in by_place.items():
        is_last = place == len(axis.sites) - 1
        heights = dodge([frame.y(reading.rows[-1].value) for reading in own], 15)
        for reading, y in zip(own, heights, strict=True):
            words = [reading.model.key] * many
            words += [SIGNS.get(reading.mask, "")] * (several_masks and is_last)
            words.append(percent(reading.rows[-1].value))
            look = f"end {colour_class(reading.model.number)}"
            if is_last or many:
                below = y + (4 if is_last else 17)
                yield Label(
                    look,
                    frame.x(place) + 11,
                    below,
                    " ".join(words),
                    "start",
                )


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


def best_site(
    frame: Frame,
    axis: SiteAxis,
    lead: SiteReading,
    is_wide: bool,
) -> Iterator[Label | Line]:
    """Yield the ring at the best site, its score, and the bracket of what random models do not reach."""
    best = lead.best
    x, y = frame.x(axis.place(lead, best.site)), frame.y(best.value)
    ring = f"M{x - 9.5:.1f} {y}a9.5 9.5 0 1 0 19 0a9.5 9.5 0 1 0-19 0"
    yield Line(f"ring {colour_class(lead.model.number)}", ring)
    anchor, shift = "middle", 0
    if not frame.left + 70 < x < frame.right - 60:
        anchor, shift = ("end", 10) if x > frame.width / 2 else ("start", -10)
    name = f"best: {site_name(best.site)}" if is_wide else "best"
    top = max(22.0, frame.y(best.high) - 9)
    yield Label(
        "best",
        x + shift,
        top,
        f"{name}, {percent(best.value)}%",
        anchor,
    )
    reached = lead.draws.get(best.site, [best.value])
    start, end = y + 12, frame.y(max(reached)) - 2
    if best.minus_random > 0 and end - start > LEAST_GAP * (frame.base - frame.top):
        yield Line("gap", f"M{x} {start:.1f}V{end:.1f}M{x - 4:.1f} {end:.1f}h8")
        said = signed(best.minus_random) + " beyond random" * is_wide
        yield Label(
            "gaptext",
            x - 8,
            (start + end) / 2,
            said,
            "end",
        )


def grey_names(
    frame: Frame,
    axis: SiteAxis,
    readings: Sequence[SiteReading],
    lead: SiteReading,
    is_wide: bool,
) -> Iterator[Label]:
    """Yield the names of the ranges of random models, below them and clear of the lead's band and of other curves."""
    for points in frame.chart.grey:
        point = points[min(len(points) - 1, (len(points) + 1) // 2 - (not is_wide))]
        site = axis.sites[round(point.x)]
        zone = zone_of(site, axis.has_llm)
        name = {
            "LLM layers": "random LLMs",
            "adapter": "random adapters",
        }.get(zone, "random layers")
        if zone == "adapter" and frame.step > 110:
            yield Label(
                "randtext",
                frame.x(point.x) + 18,
                frame.y(point.value) + 4,
                name,
                "start",
            )
        elif zone != "adapter" or is_wide:
            y = frame.y(point.low) + 17
            row = lead.row(site)
            if row and frame.y(row.high) - 14 < y < frame.y(row.low) + 12:
                y = frame.y(row.low) + 15
            others = [frame.y(r.row(site).value) for r in readings if r.row(site) and r is not lead]
            while any(abs(height + 5 - y) < 12 for height in others):
                y += 4
            if y < frame.base - 4:
                yield Label(
                    "randtext",
                    frame.x(point.x),
                    y,
                    name,
                )


def leaders(
    frame: Frame,
    axis: SiteAxis,
    lead: SiteReading,
    tiles: Sequence[str],
) -> Iterator[Line]:
    """Yield the lines from sites to the photos below them."""
    top = frame.height - 34
    for site, share in zip(tiles, tile_places(tiles), strict=True):
        start, end = frame.x(axis.place(lead, site)), share / 100 * frame.width
        line = f"M{start} {top}V{frame.height}"
        if abs(start - end) > 1.5:
            line = f"M{start} {top - 2}v8L{end:.1f} {frame.height - 6}v6"
        yield Line("leader", line)
