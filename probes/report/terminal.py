"""The summary that a report ends with: at most 20 lines of 80 columns. Notes and reasons are on the page."""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from probes.runs.read import ProbeRun
from probes.tasks import SEGMENTATION, TASKS

from .charts import LEAST_STEP, span_of
from .hero import choose_tiles, plain_text
from .parts import FINDINGS, is_right, model_differences
from .readings import ReportView, SiteReading
from .verdicts import UNTESTED
from .words import SIGNS, noun_of, site_name, site_tick

WIDTH = 80
MOST_LINES = 20
MOST_SITES = (9, 7)  # of one model, of several
PLOT = 25  # columns
ARROWS = {"▲": "▴", "▼": "▾"}
COLOURS = {"●": 32, "◕": 32, "◐": 33, "◉": 33}  # green and yellow


def summarize(view: ReportView, sentences: Sequence[str], run: ProbeRun) -> list[str]:
    """Return the lines of the summary.

    Args:
        view: Of the report's tables.
        sentences: The first ones of the page.
        run: Whose photos are read.
    """
    lead = view.lead
    front = [reading for reading in view.front if reading.seed == lead.seed]
    claims = view.claims[view.claims["data"] == lead.data]
    if (joint := claims["seed"].isna()).any():
        claims = claims[joint]
    is_tested = claims["conclusion"] != UNTESTED
    tested = claims[is_tested]
    last = []
    if names := dict.fromkeys(claims[~is_tested]["claim"].str.replace("_", " ")):
        text = f"◌ untested: {', '.join(names)}"
        last.append(textwrap.shorten(text, WIDTH, placeholder=" …"))
    if known := [is_right(row) for row in tested.itertuples() if isinstance(row.truth, str)]:
        last.append(f"The truth is known here: {sum(known)} of {len(known)} verdicts are right.")
    if run.units < 10:
        last.append("Intervals are too short: there are fewer than ten photos, or groups.")
    images = run.metrics["images"]
    last.append(f"{lead.data}, {images} {noun_of(lead.data)}{'s' * (images != 1)}.")
    labels = {key: model.label for key, model in view.models.items()}
    lines = [*textwrap.wrap(plain_text(sentences, labels), WIDTH), ""]
    # verdicts have five lines at least, with a title and how many there are more
    room = MOST_LINES - len(lines) - len(last) - min(6, len(tested)) - 3
    if len(labels) > 1:
        title, *rows = _rows_of_models(view, front)
        if len(rows) > room:
            rows[room - 1 :] = [f"... and {len(rows) - room + 1} more models and masks"]
        lines += [title, *rows]
    else:
        lines += _rows_of_sites(lead, choose_tiles(view, min(MOST_SITES[0], room)))
    lines.append("")
    lines += _rows_of_claims(tested, front, MOST_LINES - len(lines) - len(last))
    return [line[:WIDTH].rstrip() for line in lines + last]


def _rows_of_sites(lead: SiteReading, sites: Sequence[str]) -> Iterator[str]:
    """Yield a row with a plot of the score and its interval for each site, and what random models read."""
    rows = [row for row in lead.rows if row.site in sites]
    factor, least, score = 100, LEAST_STEP, "mIoU"
    if lead.task != SEGMENTATION:
        factor, least, score = 1, 0, TASKS[lead.task].score
    ends = [factor * x for row in rows for x in (row.low, row.high, row.random)]
    low, high = span_of(ends, least=least)

    def column(value: float) -> int:
        place = (factor * value - low) / (high - low) * (PLOT - 1)
        return min(max(0, round(place)), PLOT - 1)

    yield f"{'':<18} {score:>4}  {low:<{PLOT - 2}g}{high:>2g}  random  beyond random"
    for row in rows:
        plot = [" "] * PLOT
        first, last = column(row.low), column(row.high)
        plot[first : last + 1] = "─" * (last + 1 - first)
        if row.random_text:
            place = column(row.random)
            plot[place] = "░" if plot[place] == " " else "┼"
        plot[column(row.value)] = "●"
        mark = "◂" if row is lead.best else " "
        line = f"{site_name(row.site):<17}{mark} {row.value_text:>4}  {''.join(plot)}"
        yield f"{line}  {row.random_text:>6}  {row.minus_random_text} {row.minus_random_ci}"


def _rows_of_models(view: ReportView, front: Sequence[SiteReading]) -> Iterator[str]:
    """Yield a row for each model and mask: scores with ▴ and ▾ beside random models, and the difference from A."""
    sites = choose_tiles(view, MOST_SITES[1])
    names = {"encoder": "enc", "adapter": "adapt"}
    titles = "".join(f"{names.get(site) or site_tick(site):>6}" for site in sites)
    task = view.lead.task
    score = "mIoU, %"
    if task != SEGMENTATION:
        score = TASKS[task].score
    yield f"{f'{score} ▴▾ vs. random':<21}{titles}   {'minus A':>8}"
    differences = model_differences(view.pairs)
    for reading in front:
        model = reading.model
        cells = ""
        for row in map(reading.row, sites):
            cells += f"{row.value_text:>5}{ARROWS.get(row.arrow, ' ')}" if row else " " * 6
        found = differences.get(model.key)
        is_paired = found is not None and found.mask == reading.mask
        difference = found.difference_text if is_paired else ""
        yield f"{model.key} {model.label:<16} {_sign(reading, front):<2}{cells}   {difference:>8}"


def _sign(about: Any, front: Sequence[SiteReading]) -> str:
    """Return the sign of the mask of a reading or claim, if there are several."""
    return SIGNS.get(about.mask, " ") if len({reading.mask for reading in front}) > 1 else ""


def _rows_of_claims(tested: DataFrame, front: Sequence[SiteReading], room: int) -> Iterator[str]:
    """Yield a row for each verdict: the effect, and what is left of it beyond random models."""
    words = tested["finding"].str.len().max()
    shown = tested if len(tested) < room else tested[: max(1, room - 2)]
    many = len({reading.model.key for reading in front}) > 1
    rows = [("", "effect, points", "beyond random")]
    for row in shown.itertuples():
        whom = [row.model] * many + [_sign(row, front)]
        name = row.claim.replace("_", " ") + f", {row.task}" * (row.task != SEGMENTATION)
        circle = FINDINGS[row.finding][2]
        head = " ".join(filter(None, (circle, f"{row.finding:<{words}}", *whom, name)))
        beyond = f"{row.beyond_value_text} {row.beyond_value_ci}".strip()
        if row.beyond_random_verdict == UNTESTED:  # it can have a number
            beyond = UNTESTED
        rows.append((head, f"{row.value_text} {row.value_ci}".strip(), beyond))
    names, effects, beyonds = (max(map(len, column)) for column in zip(*rows, strict=True))
    names = min(names, WIDTH - 2 - effects - beyonds)
    if len(tested):
        yield from (f"{x[:names]:<{names}} {y:<{effects}} {z}" for x, y, z in rows)
    if len(shown) < len(tested):
        yield f"... and {len(tested) - len(shown)} more verdicts"


def print_summary(lines: Sequence[str], page: Path) -> None:
    """Print a summary and where its page is: signs in colour, unless NO_COLOR is set, "?" where it has none."""
    encoding = sys.stdout.encoding or "utf8"
    is_coloured = "utf" in encoding.lower() and sys.stdout.isatty()
    last = f"{lines[-1]} {page}"
    for line in (*lines[:-1], last if len(last) <= WIDTH else str(page)):
        if is_coloured and line[:1] in COLOURS and not os.environ.get("NO_COLOR"):
            line = f"\033[{COLOURS[line[0]]}m{line[0]}\033[0m{line[1:]}"
        print(line.encode(encoding, "replace").decode(encoding))
