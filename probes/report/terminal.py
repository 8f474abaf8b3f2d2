"""The summary that a report ends with: at most 20 lines of 80 columns. Notes and reasons are on the page."""

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from probes.tasks import SEGMENTATION

from .hero import choose_tiles
from .parts import FINDINGS, is_right, model_differences
from .readings import SiteAxis, SiteReading, lead_of, read_readings
from .render import pairs_of
from .tables import Tables, by_claim
from .verdicts import MARGIN, UNTESTED
from .words import MINUS, SIGNS, interval, percent, signed, site_name, site_tick

WIDTH = 80
MOST_LINES = 20
MOST_SITES = (9, 7)  # of one model, of several
PLOT = 25  # columns
CIRCLES = {
    "full": "●",
    "three": "◕",
    "half": "◐",
    "ring": "◉",
    "none": "○",
    "dash": "◌",
}
COLOURS = {
    **dict.fromkeys("●◕", 32),
    **dict.fromkeys("◐◉", 33),
}  # green and yellow
PLAIN = {  # without UTF-8
    **dict.fromkeys("●◕", "[x]"),
    **dict.fromkeys("◐◉", "[/]"),
    "○": "[ ]",
    "◌": "[?]",
}
PLAIN |= dict(
    zip(
        "─−–░┼◂▴▾◣■…",
        "---:+<^vcb.",
        strict=True,
    )
)


def summarize(tables: Tables, answer: str, photos: str) -> list[str]:
    """Return the lines of the summary.

    Args:
        tables: Of the report.
        answer: The first sentences of the page.
        photos: Data set and number of its photos.
    """
    readings = read_readings(tables)
    lead = lead_of(readings)
    place = (lead.task, lead.data, lead.seed)
    front = [reading for reading in readings if (reading.task, reading.data, reading.seed) == place]
    claims = by_claim(tables.claims)
    claims = claims[claims["data"] == lead.data]
    if (joint := claims["seed"].isna()).any():
        claims = claims[joint]
    is_tested = claims["conclusion"] != UNTESTED
    tested = claims[is_tested]
    known = tested[tested["truth"].notna()]
    last = []
    if names := dict.fromkeys(claims[~is_tested]["claim"].str.replace("_", " ")):
        text = f"◌ untested: {', '.join(names)}"
        last.append(
            textwrap.shorten(
                text,
                WIDTH,
                placeholder=" …",
            )
        )
    if len(known):
        right = sum(map(is_right, known.itertuples()))
        last.append(f"The truth is known here: {right} of {len(known)} verdicts are right.")
    last.append(f"{photos}.")
    lines = [*textwrap.wrap(answer, WIDTH), ""]
    # verdicts have five lines at least, with a title and how many there are more
    room = MOST_LINES - len(lines) - len(last) - min(6, len(tested)) - 3
    if len(tables.models) > 1:
        title, *rows = _rows_of_models(
            tables,
            lead,
            front,
        )
        more = [f"... and {len(rows) - room + 1} more models and masks"]
        lines += [title, *(rows if len(rows) <= room else rows[: room - 1] + more)]
    else:
        lines += _rows_of_sites(
            lead,
            choose_tiles(
                SiteAxis(front),
                lead,
                min(MOST_SITES[0], room),
            ),
        )
    lines.append("")
    return (
        lines
        + _rows_of_claims(
            tested,
            front,
            MOST_LINES - len(lines) - len(last),
        )
        + last
    )


def _rows_of_sites(lead: SiteReading, sites: Sequence[str]) -> list[str]:
    """Return a row with a plot of the score and its interval for each site, and what random models read."""
    rows = [row for row in lead.rows if row.site in sites]
    bounds = [x for row in rows for x in (row.low, row.high, row.random) if x == x]
    low = 5 * int(20 * max(0, min(bounds)))
    high = min(100, 5 * (int(20 * max(bounds)) + 1))

    def column(value: float) -> int:
        place = (100 * value - low) / (high - low) * (PLOT - 1)
        return min(max(0, round(place)), PLOT - 1)

    lines = [f"{'':<18} mIoU  {low:<{PLOT - 2}}{high:>2}  random  beyond random"]
    for row in rows:
        plot = [" "] * PLOT
        first, last = column(row.low), column(row.high)
        plot[first : last + 1] = "─" * (last + 1 - first)
        random = ""
        if row.random == row.random:
            random = percent(row.random)
            plot[column(row.random)] = "░" if plot[column(row.random)] == " " else "┼"
        plot[column(row.value)] = "●"
        mark = "◂" if row is lead.best else " "
        beyond = _effect(
            row.minus_random,
            row.minus_low,
            row.minus_high,
        )
        line = f"{site_name(row.site):<17}{mark} {percent(row.value):>4}  {''.join(plot)}"
        lines.append(f"{line}  {random:>6}  {beyond}"[:WIDTH].rstrip())
    return lines


def _rows_of_models(tables: Tables, lead: SiteReading, front: Sequence[SiteReading]) -> list[str]:
    """Return a row for each model and mask: scores with ▴ and ▾ beside random models, and the difference from A."""
    sites = choose_tiles(
        SiteAxis(front),
        lead,
        MOST_SITES[1],
    )
    names = {
        "encoder": "enc",
        "adapter": "adapt",
    }
    titles = "".join(f"{names.get(site) or site_tick(site):>6}" for site in sites)
    lines = [f"{'mIoU, % ▴▾ vs. random':<21}{titles}   {'minus A':>8}"]
    differences = model_differences(pairs_of(tables, lead))
    has_masks = len({reading.mask for reading in front}) > 1
    for reading in front:
        model = reading.model
        sign = SIGNS.get(reading.mask, " ") if has_masks else " "
        cells = "".join(_cell(reading.row(site)) for site in sites)
        found = differences.get(model.key)
        difference = ""
        if found is not None and found.mask == reading.mask:
            difference = signed(found.difference)
        lines.append(f"{model.key} {model.label:<16} {sign} {cells}   {difference:>8}".rstrip())
    return [line[:WIDTH] for line in lines]


def _cell(row: Any) -> str:
    if row is None:
        return " " * 6
    arrow = " "
    if row.minus_low * row.minus_high > 0 and abs(row.minus_random) >= MARGIN:
        arrow = "▴" if row.minus_random > 0 else "▾"
    return f"{percent(row.value):>5}{arrow}"


def _rows_of_claims(tested: DataFrame, front: Sequence[SiteReading], room: int) -> list[str]:
    """Return a row for each verdict: the effect, and what is left of it beyond random models."""
    if not len(tested):
        return []
    words = tested["finding"].str.len().max()
    shown = tested if len(tested) < room else tested[: max(1, room - 2)]
    many = len({reading.model.key for reading in front}) > 1
    has_masks = len({reading.mask for reading in front}) > 1
    rows = [("", "effect, points", "beyond random")]
    for row in shown.itertuples():
        whom = f"{row.model} " * many + f"{SIGNS.get(row.mask, ' ')} " * has_masks
        name = row.claim.replace("_", " ") + f", {row.task}" * (row.task != SEGMENTATION)
        circle = CIRCLES[FINDINGS[row.finding][1]]
        head = f"{circle} {row.finding:<{words}} {whom}{name}"
        effect = _effect(
            row.value,
            row.low,
            row.high,
            row.task,
        )
        beyond = _effect(
            row.beyond_value,
            row.beyond_low,
            row.beyond_high,
            row.task,
        )
        rows.append((head, effect, beyond or UNTESTED))
    names, effects, beyonds = (max(map(len, column)) for column in zip(*rows, strict=True))
    names = min(names, WIDTH - 2 - effects - beyonds)
    lines = [f"{x[:names]:<{names}} {y:<{effects}} {z}" for x, y, z in rows]
    if len(shown) < len(tested):
        lines.append(f"... and {len(tested) - len(shown)} more verdicts")
    return lines


def _effect(
    value: float,
    low: float,
    high: float,
    task: str = SEGMENTATION,
) -> str:
    """Return a difference and its interval, in points or in the unit of a task; "" without one."""
    if value != value:
        return ""
    if task == SEGMENTATION:
        return f"{signed(value)} {interval(low, high)}".rstrip()
    text = f"{value:+.3g}" if low != low else f"{value:+.3g} [{low:.3g}, {high:.3g}]"
    return text.replace("-", MINUS)


def print_summary(lines: Sequence[str], page: Path) -> None:
    """Print a summary and where its page is: signs in colour, unless NO_COLOR is set, without UTF-8 in ASCII."""
    can_show = "utf" in (sys.stdout.encoding or "").lower()
    is_coloured = can_show and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    last = f"{lines[-1]} {page}"
    for line in (*lines[:-1], last if len(last) <= WIDTH else str(page)):
        if not can_show:
            line = "".join(PLAIN.get(c, c) for c in line)
        elif is_coloured and line[:1] in COLOURS:
            line = f"\033[{COLOURS[line[0]]}m{line[0]}\033[0m{line[1:]}"
        print(line)
