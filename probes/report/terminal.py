"""The summary that a report ends with: at most 20 lines of 80 columns. Notes and reasons are on the page."""

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from probes.models.sites import ADAPTER, ENCODER, is_layer, layer_number
from probes.tasks import SEGMENTATION, TASKS

from .compare import BEST_LAYER
from .tables import Tables, by_claim
from .verdicts import MARGIN, SUPPORTED, UNTESTED
from .words import MINUS, interval, percent, signed, site_name
from .words import SIGNS as MASKS

WIDTH = 80
MOST_LINES = 20
MOST_SITES = 9
COLUMNS_OF_PLOT = 25
SIGNS = {  # of findings; how far the circle is filled says how many tests are passed
    SUPPORTED: "●",
    "supported by itself": "◕",
    "not learned": "◐",
    "also in random layers": "◐",
    "artefact of the instrument": "◉",
    "does not hold": "○",
    UNTESTED: "◌",
}
PLAIN = {  # without UTF-8
    **dict.fromkeys("●◕", "[x]"),
    **dict.fromkeys("◐◉", "[/]"),
    "○": "[ ]",
    "◌": "[?]",
    **dict.fromkeys("─−–", "-"),
    "░": ":",
    "┼": "+",
    "◂": "<",
    "▴": "^",
    "▾": "v",
    "◣": "c",
    "■": "b",
    "…": ".",
}
COLOURS = {
    **dict.fromkeys("●◕", 32),
    **dict.fromkeys("◐◉", 33),
}  # green and yellow


def summarize(tables: Tables, answer: str, photos: str) -> list[str]:
    """Return the lines of the summary.

    Args:
        tables: Of the report.
        answer: The first sentences of the page.
        photos: Data set and number of its photos.
    """
    front = front_rows(tables)
    lines = [*textwrap.wrap(answer, WIDTH), ""]
    claims = by_claim(tables.claims)
    joint = claims["seed"].isna()
    claims = claims[joint if joint.any() else ~joint]
    claims = claims[claims["data"] == front["data"].iloc[0]]
    tested = claims[claims["conclusion"] != UNTESTED]
    untested = claims[claims["conclusion"] == UNTESTED]
    known = tested[tested["truth"].notna()]
    below = 2 + (len(untested) > 0) + (len(known) > 0)  # blank line, page
    if len(tables.models) > 1:
        lines += _rows_of_models(tables, front)
    else:
        room = MOST_LINES - len(lines) - below - min(5, len(tested)) - 2
        lines += _rows_of_sites(front, min(MOST_SITES, room))
    lines.append("")
    lines += _rows_of_claims(
        tested,
        front,
        MOST_LINES - len(lines) - below + 1,
    )
    if len(untested):
        names = ", ".join(dict.fromkeys(untested["claim"].str.replace("_", " ")))
        lines.append(
            textwrap.shorten(
                f"◌ untested: {names}",
                WIDTH,
                placeholder=" …",
            )
        )
    if len(known):
        right = int(((known["finding"] == SUPPORTED) == (known["truth"] == "planted")).sum())
        lines.append(f"The truth is known here: {right} of {len(known)} verdicts are right.")
    return [*lines, f"{photos}."]


def front_rows(tables: Tables) -> DataFrame:
    """Return the rows of the table of sites that the summary is about: main scores on the first data set and seed."""
    sites = tables.sites
    of_task = sites[sites["main"] & (sites["task"] == SEGMENTATION)]
    of_task = of_task[of_task["metric"] == TASKS[SEGMENTATION].score]
    first = of_task.iloc[0]
    return of_task[(of_task["data"] == first["data"]) & (of_task["seed"] == first["seed"])]


def lead_rows(front: DataFrame) -> DataFrame:
    """Return the rows of the first model under the mask whose best site reads most."""
    first = front[front["model"] == front["model"].iloc[0]]
    return first[first["mask"] == first.loc[first["value"].idxmax(), "mask"]]


def some_sites(rows: DataFrame, most: int) -> DataFrame:
    """Return the rows of at most so many sites: encoder, adapter, the best and the last layer, and layers between."""
    sites = [*rows["site"]]
    best = rows.loc[rows["value"].idxmax(), "site"]
    kept = [site for site in (best, sites[-1], sites[0], ADAPTER, ENCODER) if site in sites]
    step = max(1, -(-len(sites) // most))
    kept = [*dict.fromkeys([*kept, *sites[::-step]])][:most]
    return rows[rows["site"].isin(kept)]


def _rows_of_sites(front: DataFrame, most: int) -> list[str]:
    """Return a row with a plot of the score and its interval for each site, and what random models read."""
    rows = some_sites(lead_rows(front), most)
    numbers = rows[["low", "high", "random"]].stack()
    low = 5 * int(20 * max(0, numbers.min()))
    high = min(100, 5 * (int(20 * numbers.max()) + 1))
    lines = [f"{'':<18} mIoU  {low:<{COLUMNS_OF_PLOT - 2}}{high:>2}  random  beyond random"]
    best = rows["value"].max()
    for row in rows.itertuples():
        plot = [" "] * COLUMNS_OF_PLOT

        def column(value: float) -> int:
            return round((100 * value - low) / (high - low) * (COLUMNS_OF_PLOT - 1))

        for i in range(column(row.low), column(row.high) + 1):
            plot[max(0, min(i, COLUMNS_OF_PLOT - 1))] = "─"
        random = beyond = ""
        if row.random == row.random:
            at = column(row.random)
            plot[at] = "░" if plot[at] == " " else "┼"
            random = percent(row.random)
            beyond = _effect(
                row.minus_random,
                row.minus_low,
                row.minus_high,
            )
        plot[column(row.value)] = "●"
        mark = "◂" if row.value == best else " "
        line = f"{site_name(row.site):<17}{mark} {percent(row.value):>4}  {''.join(plot)}"
        lines.append(f"{line}  {random:>6}  {beyond}"[:WIDTH].rstrip())
    return lines


def _rows_of_models(tables: Tables, front: DataFrame) -> list[str]:
    """Return a row for each model and mask: scores with ▴ and ▾ beside random models, and the difference from A."""
    lead = lead_rows(front)
    sites = list(dict.fromkeys(front["site"]))
    sites.sort(key=_place)
    if len(sites) > 7:
        kept = {*some_sites(lead, 7)["site"]}
        sites = [site for site in sites if site in kept]
    labels = dict(
        zip(
            tables.models["key"],
            tables.models["label"],
            strict=True,
        )
    )
    several = front["mask"].nunique() > 1
    titles = "".join(f"{_short_site(site):>6}" for site in sites)
    lines = [f"{'mIoU, % ▴▾ vs. random':<21}{titles}   {'minus A':>8}"]
    differences = tables.differences[tables.differences["between"] == "models"]
    for (model, mask), rows in front.groupby(["model", "mask"], sort=False):
        at = {row.site: row for row in rows.itertuples()}
        cells = "".join(_cell(at.get(site)) for site in sites)
        sign = MASKS.get(mask, " ") if several else " "
        line = f"{model} {labels[model]:<16} {sign} {cells}"
        pair = differences[(differences["second"] == model) & (differences["mask"] == mask)]
        pair = pair[(pair["data"] == rows["data"].iloc[0]) & (pair["task"] == SEGMENTATION)]
        best = pair[pair["of"] == BEST_LAYER]
        compared = best if len(best) else pair[pair["of"] == "site"]
        if len(compared):
            line += f"   {signed(compared['difference'].iloc[-1]):>8}"
        lines.append(line[:WIDTH].rstrip())
    return lines


def _cell(row: Any) -> str:
    if row is None:
        return " " * 6
    arrow = " "
    if row.minus_low * row.minus_high > 0 and abs(row.minus_random) >= MARGIN:
        arrow = "▴" if row.minus_random > 0 else "▾"
    return f"{percent(row.value):>5}{arrow}"


def _short_site(site: str) -> str:
    if site in (ENCODER, ADAPTER):
        return {
            ENCODER: "enc",
            ADAPTER: "adapt",
        }[site]
    return str(layer_number(site)) if is_layer(site) else site_name(site)[-5:]


def _place(site: str) -> tuple[int, int]:
    """Return where a site is in the order of a forward, of models of any depth."""
    order = (ENCODER, ADAPTER)
    if site in order:
        return order.index(site) + 1, 0
    number = layer_number(site) if site.rpartition("_")[2].isdecimal() else 0
    return (0 if site.startswith(ENCODER) else 3 if number or is_layer(site) else 4), number


def _rows_of_claims(tested: DataFrame, front: DataFrame, room: int) -> list[str]:
    """Return a row for each verdict: the effect, and what is left of it beyond random models."""
    if not len(tested):
        return []
    words = tested["finding"].str.len().max()
    wide = 41 if words <= 13 else 46
    lines = [f"{'':<{wide}}{'effect, points':<19}beyond random"[:WIDTH]]
    shown = tested if len(tested) < room else tested[: max(1, room - 2)]
    several = (front["model"].nunique() > 1, front["mask"].nunique() > 1)
    for row in shown.itertuples():
        whom = f"{row.model} " * several[0] + f"{MASKS.get(row.mask, ' ')} " * several[1]
        name = row.claim.replace("_", " ") + f", {row.task}" * (row.task != SEGMENTATION)
        head = f"{SIGNS.get(row.finding, '○')} {row.finding:<{words}} {whom}{name}"
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
        lines.append(f"{head:<{wide}}{effect:<19}{beyond or UNTESTED}"[:WIDTH])
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


# ------------------------------------------------------------------------------------------------ printing
def print_summary(lines: Sequence[str], page: Path) -> None:
    """Print a summary and where its page is: signs in colour, unless NO_COLOR is set, without UTF-8 in ASCII."""
    stream = sys.stdout
    can_show = "utf" in (stream.encoding or "").lower()
    is_coloured = can_show and stream.isatty() and not os.environ.get("NO_COLOR")
    last = f"{lines[-1]} {page}"
    for line in (*lines[:-1], last if len(last) <= WIDTH else str(page)):
        if not can_show:
            line = "".join(PLAIN.get(c, c) for c in line)
        elif is_coloured and line[:1] in COLOURS:
            line = f"\033[{COLOURS[line[0]]}m{line[0]}\033[0m{line[1:]}"
        print(line)


def label_answer(sentences: Sequence[str], models: DataFrame) -> str:
    """Return sentences in which "{A}" stands for a model, with its key and label, or the label of the only one."""
    text = " ".join(sentences)
    for key, label in zip(
        models["key"],
        models["label"],
        strict=True,
    ):
        text = text.replace(f"{{{key}}}", f"{key} {label}" if len(models) > 1 else label)
    return text
