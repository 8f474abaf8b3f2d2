"""The summary that a report ends with: at most 20 lines of 80 columns. Notes and reasons are on the page."""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pandas import DataFrame

from llava_bidir.common.errors import UserError
from llava_bidir.common.exported_masks import has_own_mask
from probes.runs.compare import check_one_lab
from probes.runs.read import ProbeRun
from probes.tasks import SEGMENTATION, TASKS

from .charts import span_of
from .hero import choose_sites, plain_text
from .parts import FINDINGS, is_about_nothing, is_right
from .ranking import rivals_of
from .readings import MainRun, ReportView, SiteReading
from .verdicts import FEWEST_UNITS, UNTESTED
from .words import SIGNS, lower_first, noun_of, site_name, site_number

WIDTH = 80
MOST_LINES = 20
MOST_SITES = 9
PLOT = 25  # columns
NAMES = 22  # columns
COLOURS = {"●": 32, "◕": 32, "◐": 33, "◉": 33}  # green and yellow


def summarize(view: ReportView, sentences: Sequence[str], run: ProbeRun) -> list[str]:
    """Return the lines of the summary.

    Args:
        view: Of the report's tables.
        sentences: The first ones of the page.
        run: Whose photos are read.
    """
    lead = view.lead
    claims = view.claims[view.claims["data"] == lead.data]
    is_joint = claims["seed"].isna()
    if is_joint.any():
        claims = claims[is_joint]
    claims = claims[~is_about_nothing(claims)]
    is_tested = claims["conclusion"] != UNTESTED
    tested = claims[is_tested]
    last = list(_last_lines(view, claims=claims, run=run))
    lines = [*textwrap.wrap(plain_text(sentences, view.names), WIDTH), ""]
    # verdicts have two lines at least, with a title and how many there are more
    for_verdicts = 3 + min(3, len(tested))
    room = MOST_LINES - len(lines) - len(last) - for_verdicts
    if len(view.compared) > 1:
        title, *rows = _rows_of_readings(view)
        if len(rows) > room:
            rows[room - 1 :] = [f"... and {len(rows) - room + 1} more models and masks"]
        lines += [title, *rows]
    else:
        most = min(MOST_SITES, room)
        lines += _rows_of_sites(lead, choose_sites(lead, lead.best.site, most))
    lines.append("")
    lines += _rows_of_claims(view, tested, MOST_LINES - len(lines) - len(last))
    return [line[:WIDTH].rstrip() for line in lines + last]


def _last_lines(view: ReportView, claims: DataFrame, run: ProbeRun) -> Iterator[str]:
    """Yield what was not tested, what the signs mean, and of which photos all is."""
    lead = view.lead
    is_tested = claims["conclusion"] != UNTESTED
    signs = []
    for finding in dict.fromkeys(claims[is_tested]["finding"]):
        signs.append(f"{FINDINGS[finding][2]} {finding}")
    if len(view.masks) > 1:
        signs += [f"{SIGNS[mask]} {mask}" for mask in view.masks if mask in SIGNS]
    if signs:
        yield "  ".join(signs)
    untested = {}
    for row in claims[~is_tested].itertuples():
        letter = view.names[row.model].letter
        untested[f"{letter} {lower_first(row.title)}".strip()] = None
    if untested:
        text = f"◌ untested: {', '.join(untested)}"
        yield textwrap.shorten(text, WIDTH, placeholder=" …")
    right = []
    for row in claims[is_tested].itertuples():
        if isinstance(row.truth, str):
            right.append(is_right(row))
    if right:
        yield f"The truth is known here: {sum(right)} of {len(right)} verdicts are right."
    if run.units < FEWEST_UNITS:
        yield f"Nothing is decided: there are fewer than {FEWEST_UNITS} photos, or groups."
    images = run.metrics["images"]
    noun = noun_of(lead.data) + "s" * (images != 1)
    yield f"{lead.data}, {images} {noun}."


def _rows_of_sites(lead: SiteReading, sites: Sequence[str]) -> Iterator[str]:
    """Yield a row with a plot of the score and its interval for each site, and what random models read."""
    rows = [row for row in lead.rows if row.site in sites]
    factor, score = 100, "mIoU"
    if lead.task != SEGMENTATION:
        factor, score = 1, TASKS[lead.task].score
    ends = []
    for row in rows:
        ends += [row.low, row.high, row.random]
    low, high = span_of(ends, factor)

    def column(value: float) -> int:
        last = PLOT - 1
        share = (factor * value - low) / (high - low)
        return min(max(0, round(share * last)), last)

    yield f"{'':<18} {score:>4}  {low:<{PLOT - 2}g}{high:>2g}  random  beyond random"
    for row in rows:
        plot = [" "] * PLOT
        first, last = column(row.low), column(row.high)
        plot[first : last + 1] = "─" * (last + 1 - first)
        if row.random_text:
            place = column(row.random)
            over = {" ": "░"}
            plot[place] = over.get(plot[place], "┼")
        plot[column(row.value)] = "●"
        mark = " "
        if row is lead.best:
            mark = "◂"
        line = f"{site_name(row.site):<17}{mark} {row.value_text:>4}  {''.join(plot)}"
        yield f"{line}  {row.random_text:>6}  {row.minus_random_text} {row.minus_random_ci}"


def _rows_of_readings(view: ReportView) -> Iterator[str]:
    """Yield a row for each model and mask: its best layer and score, and how it differs from the lead."""
    lead = view.lead
    letter, label = view.names[lead.token.strip("{}")]
    minus = f"minus {letter or label}"[:20]
    score = "mIoU"
    if lead.task != SEGMENTATION:
        score = TASKS[lead.task].score
    yield f"{'':<{NAMES}} best layer  {score:>4}  {minus:<20} {'':<10} random"
    rivals = {rival.reading: rival for rival in rivals_of(view)}
    for reading in view.compared:
        named = view.names[reading.token.strip("{}")]
        name = " ".join(filter(None, named))
        best = view.best(reading)
        row = f"{name[:NAMES]:<{NAMES}} {_place(reading, best.site):>10} {best.value_text:>5}"
        difference = verdict = ""
        if reading in rivals:
            rival = rivals[reading].reversed
            difference = " ".join(rival.text)
            verdict = rival.finding or "–"
        yield f"{row}  {difference:<20} {verdict:<10} {best.random_text:>6}"


def _place(reading: SiteReading, site: str) -> str:
    """Return a site of a reading in a narrow column: 11 of 12, encoder 8."""
    name = reading.own[site]
    if site_number(name) and reading.is_layer(site) and reading.model.depth:
        return f"{site_number(name)} of {reading.model.depth}"
    return site_name(name).replace("encoder layer", "encoder")


def _rows_of_claims(view: ReportView, tested: DataFrame, room: int) -> Iterator[str]:
    """Yield a row for each verdict: the effect, and what is left of it beyond random models."""
    if not len(tested):
        return
    shown = tested
    if len(tested) >= room:
        shown = tested[: max(1, room - 2)]
    rows = [("", "effect, points", "beyond random")]
    for row in shown.itertuples():
        title = row.title
        if row.task != SEGMENTATION:
            title = f"{title}, {row.task}"
        whom = [view.names[row.model].letter]
        difference = row.what.partition(",")[0]
        if len(view.masks) > 2 and difference.partition(" − ")[0] in view.masks:
            whom.append(difference)  # with the sign of the first mask, rows would be alike
        elif len(view.masks) > 1:
            whom.append(SIGNS.get(row.mask, row.mask))
        *_, circle = FINDINGS[row.finding]
        head = " ".join(filter(None, (circle, *whom, title)))
        effect = f"{row.value_text} {row.value_ci}".strip()
        beyond = f"{row.beyond_value_text} {row.beyond_value_ci}".strip()
        if row.beyond_random_verdict == UNTESTED:  # it can have a number
            beyond = UNTESTED
        rows.append((head, effect, beyond))
    columns = zip(*rows, strict=True)
    names, effects, beyonds = (max(map(len, column)) for column in columns)
    room_for_names = WIDTH - 2 - effects - beyonds
    names = min(names, room_for_names)
    for name, effect, beyond in rows:
        if len(name) > names:
            name = f"{name[: names - 1]}…"
        yield f"{name:<{names}} {effect:<{effects}} {beyond}"
    if len(shown) < len(tested):
        yield f"... and {len(tested) - len(shown)} more verdicts, on the page"


def lab_command(view: ReportView, runs: Mapping[tuple, MainRun]) -> str:
    """Return the command that opens the lead and the best other model that one lab can show beside it."""
    lead = runs[view.lead.about].run
    rivals = [runs[rival.reading.about].run for rival in rivals_of(view)]
    shown = [lead]
    for run in rivals:
        with suppress(UserError):
            check_one_lab(lead, run)
            shown.append(run)
    shown = shown[:2]
    words = ["probes lab", *(str(run.path) for run in shown)]
    if any(".py:" in run.metrics["mllm"] or has_own_mask(run.metrics) for run in shown):
        words.append("--trust true")
    return " ".join(words)


def print_summary(lines: Sequence[str], page: Path, lab: str = "") -> None:
    """Print a summary and what to do next: signs in colour, unless NO_COLOR is set, "?" where the encoding has none.

    Args:
        lines: The summary.
        page: The page.
        lab: A command, see :func:`lab_command`.
    """
    encoding = sys.stdout.encoding or "utf8"
    is_coloured = "utf" in encoding.lower() and sys.stdout.isatty()
    is_coloured = is_coloured and not os.environ.get("NO_COLOR")
    following = [f"Next:  open {page}"]
    if lab:
        following.append(f"       {lab}")
    for line in (*lines, *following):
        if is_coloured and line[:1] in COLOURS:
            line = f"\033[{COLOURS[line[0]]}m{line[0]}\033[0m{line[1:]}"
        print(line.encode(encoding, "replace").decode(encoding))
