"""The parts of the page below its figure: rows and charts that page.html.j2 writes."""

import re
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from pandas import DataFrame, Series, concat

from probes.analyses.charts import Chart, Curve, Figure, curves_by_layer
from probes.models.sites import is_layer, layer_around, layer_number, part_of
from probes.runs.formatting import Entry
from probes.score.effects import BEST_LAYER as BEST_LAYER_TERM
from probes.score.effects import EFFECTS, LAST_LAYER
from probes.tasks import SEGMENTATION

from .charts import chart_span, span_of, ticks
from .readings import ABOUT, ReportView, SiteAxis, SiteReading, by_site, rows_about
from .tables import Tables
from .words import axis_number, lower_first, noun_of, number, points

# what each finding looks like: class, how far its circle is filled, and the circle as a character
FINDINGS = {
    "supported": ("ok", "full", "●"),
    "supported by itself": ("ok", "three", "◕"),
    "better": ("ok", "full", "●"),
    "worse": ("ok", "full", "●"),
    "not learned": ("half", "half", "◐"),
    "artefact of the instrument": ("half", "ring", "◉"),
    "reversed": ("half", "none", "◒"),
    "negligible": ("no", "none", "◎"),
    "no effect": ("no", "none", "○"),
    "undecided": ("open", "dash", "◔"),
    "untested": ("open", "dash", "◌"),
}
# what a verdict says in few words
MEANINGS = {
    "not learned": "random models do it, too",
    "artefact of the instrument": "only probes that are not at their optimum show it",
    "reversed": "the other way, by more than {margin}",
    "negligible": "there, but less than {margin}",
    "no effect": "less than {margin} either way",
    "undecided": "too few {noun}s to tell: {would_show}",
}
# Classes that the page shows: all, or of more than these those at both ends, which gain and lose most
MOST_CLASS_ROWS = 255
END_ROWS = 20
ROUNDS_TO_0 = 0.0005  # as a share, in points 0.0
MOST_WORDS = 20  # of a reason
ABOUT_CLAIM = ["claim", "model", "mask", "data"]
INSIDE = {
    "value": "values",
    "attn": "added by attention",
    "mlp": "added by the MLP",
    "": "output of the layer",
}
COLUMNS = {
    "paper": "as the paper measures it",
    "optimum": "at the optimum of the loss",
    "beyond_random": "beyond random models",
}


class Scale:
    """An axis in per cent of a box, from values in the unit of a task; signed ones have a line at 0."""

    def __init__(self, values: Iterable[float], factor: float = 100, signed: bool = True):
        self.factor = factor
        self.signed = signed
        self.low, self.high = span_of(values, factor, zero=signed)

    def at(self, value: float) -> float:
        """Return the place of a value, in per cent."""
        span = self.high - self.low
        share = (self.factor * value - self.low) / span
        return round(100 * min(1.0, max(0.0, share)), 2)

    def rules(self, most: int = 6) -> list[tuple[str, float]]:
        """Return round values as text, and their places."""
        values = ticks(self.low, self.high, most)
        rules = []
        for value in values:
            text = axis_number(value, self.signed)
            rules.append((text, self.at(value / self.factor)))
        return rules


# ------------------------------------------------------------------------------------------------ verdicts
def verdicts(view: ReportView, task: str) -> Entry:
    """Return the claims of a task, those that are tested grouped by claim, and the axis of their effects.

    Claims joint over seeds stand for those of the seeds, which are their dots.
    """
    rows = []
    claims = view.claims
    claims = claims[(claims["task"] == task) & ~is_about_nothing(claims)]
    margins = {reading.task: reading.margin for reading in view.readings}
    for _, of_claim in claims.groupby(ABOUT_CLAIM, sort=False):
        of_seeds = of_claim["seeds"] == 1
        shown = of_claim
        dots = []
        if not of_seeds.all():
            shown = of_claim[~of_seeds]
            dots = of_claim.loc[of_seeds, "value"].tolist()
        rows += shown.assign(dots=[dots] * len(shown)).itertuples()
    tested = [row for row in rows if row.conclusion != "untested"]
    ends = []
    for row in tested:
        ends += [row.low, row.high, row.beyond_low, row.beyond_high]
    factor = 1
    if task == SEGMENTATION:
        factor = 100
    return {
        "groups": grouped(tested, "claim"),
        "scale": Scale(ends, factor),
        "rows": rows,
        "tested": tested,
        "margin": margins[task],
        "task": task,
    }


def is_about_nothing(claims: DataFrame) -> Series:
    """Return which claims are of an effect that reads 0.0 in all resamplings, as of a best layer that is the last."""
    return claims[["low", "high"]].abs().max(axis=1, skipna=False) < ROUNDS_TO_0


def is_right(row: Any) -> bool:
    """Return whether a verdict whose truth is known is right: what was planted is supported, and nothing else."""
    return (row.finding == "supported") == (row.truth == "planted")


def explain(view: ReportView, row: Any) -> str:
    """Return what a verdict needs beside it: what it means, and how the curves differ from its number."""
    margins = {reading.task: reading.margin for reading in view.readings}
    meaning = MEANINGS.get(row.finding, "").format(
        margin=points(margins[row.task], row.task),
        noun=noun_of(row.data),
        would_show=shows_from(row),
    )
    return "; ".join(filter(None, (meaning, as_read(view, row))))


def shows_from(row: Any) -> str:
    """Return the smallest effect that would have been shown of what a row is about."""
    return f"would show from {points(row.would_show, row.task)}"


def as_read(view: ReportView, row: Any) -> str:
    """Return the difference that the curves show, where it is not that of a claim by the margin at least.

    A claim's best layer is chosen on other images than it is read on; curves have the best layer of all.
    """
    if row.claim not in EFFECTS:
        return ""
    about = row.task, row.data, row.model, row.mask, row.seed
    readings = {reading.about: reading for reading in view.readings}
    if about not in readings:
        return ""
    reading = readings[about]
    ends = []
    for term in EFFECTS[row.claim]:
        site = term
        if term == LAST_LAYER:
            site = reading.model.last_layer
        names = [name for name, of_model in reading.own.items() if of_model == site]
        if term == BEST_LAYER_TERM:
            ends.append(reading.best_layer)
        else:
            ends += map(reading.row, names)
    if len(ends) < 2:
        return ""
    first, second = ends
    difference = first.value - second.value
    if abs(difference - row.value) < reading.margin:
        return ""
    shown = number(difference, row.task, has_sign=True)
    read = f"{first.value_text} − {second.value_text} = {shown} as read"
    return f"{read}; {row.value_text} with the layer chosen on other {noun_of(row.data)}s"


def not_tested(claims: DataFrame, has_llm: bool) -> list[Entry]:
    """Return why columns of claims are untested: each reason once, with its claims and the keys of the models."""
    is_untested = claims["verdict"] == "untested"
    rows = claims[is_untested & claims["reason"].notna()]
    columns = [*COLUMNS]
    if not has_llm:
        columns.remove("paper")
    rows = rows[rows["column"].isin(columns)]
    reasons = []
    for (column, reason), same in rows.groupby(["column", "reason"], sort=False):
        first, *others = same["title"].unique()
        reasons.append(
            {
                "models": same["model"].unique(),
                "claims": ", ".join([first, *map(lower_first, others)]),
                "column": COLUMNS[column],
                "reason": in_few_words(reason),
            }
        )
    return reasons


def in_few_words(reason: str) -> str:
    """Return the end of a reason that has at most 20 words; results.json has all of it."""
    if len(reason.split()) > MOST_WORDS:
        reason = reason.partition("; ")[0]
    parts = re.split(r": (?!\d)", reason)
    while len(parts) > 1 and len(": ".join(parts).split()) > MOST_WORDS:
        parts = parts[1:]
    words = ": ".join(parts).split()
    if len(words) > MOST_WORDS:
        words = [*words[:MOST_WORDS], "…"]
    return " ".join(words)


def step_in_few_words(line: str) -> str:
    """Return a line about steps that were left out, with its reason in few words."""
    steps, _, reason = line.partition(": ")
    return f"{steps}: {in_few_words(reason)}"


# ------------------------------------------------------------------------------------------------ models and data sets
def panels(
    readings: Iterable[SiteReading],
    masks: Sequence[str],
    together: bool = False,
    banded: bool = False,
) -> list[Entry]:
    """Return a chart for each model, with one axis of scores, and the model's best reading.

    Args:
        readings: Of one task.
        masks: All masks of the page.
        together: All have one axis of sites, and the other models are drawn thin.
        banded: Draw intervals.
    """
    groups = [*grouped(readings, "model.key").values()]
    charts = []
    for of_model in groups:
        others = []
        axis = SiteAxis(of_model)
        if together:
            others = [reading for reading in readings if reading not in of_model]
            axis = SiteAxis(readings)
        shaded = []
        if banded:
            shaded = of_model
        chart = by_site(of_model, axis=axis, masks=masks, others=others, banded=shaded)
        charts.append(chart._replace(ticks=axis.ticks(of_model[0])))
    span = chart_span(charts)
    return [
        {
            "best": max(of_model, key=SiteReading.rank),
            "readings": of_model,
            "chart": chart._replace(span=span),
        }
        for of_model, chart in zip(groups, charts, strict=True)
    ]


def grouped(rows: Iterable[Any], name: str) -> dict[Any, list[Any]]:
    """Return readings by "task", "data", or "model.key", or claims by "claim", in their order."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(attrgetter(name)(row), []).append(row)
    return groups


def inside_layers(tables: Tables) -> list[Figure]:
    """Return the figure of scores inside the layers, a panel for each model and mask; none if none was probed."""
    sites = tables.sites
    table = sites.query("main and metric == 'miou'")
    if table.empty:  # of another task alone
        return []
    is_inside = table["site"].map(lambda site: is_layer(layer_around(site)))
    table = table[is_inside]
    parts = table["site"].map(lambda site: part_of(site) or "")
    table = table.assign(part=parts, layer=table["site"].map(layer_number))
    looks = {}
    for colour, (part, name) in enumerate(INSIDE.items()):
        looks[part] = Curve([], name, colour, mark="circle", band=True)
    charts = []
    for about, rows in table.groupby(ABOUT, sort=False):
        if not rows["part"].any():
            continue
        rows = rows.sort_values("layer")
        chart = Chart(
            curves=curves_by_layer(
                rows.to_dict("records"), looks=looks, name="part", value="value"
            ),
            ticks={layer: str(layer) for layer in rows["layer"]},
            title=", ".join(about[2:4]),
            unit="mIoU, %",
        )
        charts.append(chart)
    if not charts:
        return []
    text = "Values that a layer's attention reads, and what attention and MLP add, beside the output of the layer."
    return [Figure(name="parts", title="Inside the layers", caption=text, panels=charts)]


# ------------------------------------------------------------------------------------------------ classes
def class_rows(view: ReportView) -> Entry | None:
    """Return the IoU of each class at the lead's best site and at one to compare with, and differences of two models.

    Classes are sorted by how much they gain, or by the difference of the models.
    """
    lead = view.lead
    best = view.best(lead).site
    of_lead = rows_about(view.tables.classes, lead)
    iou = of_lead.pivot_table(index="class", columns="site", values="iou", sort=False)
    compared = _site_to_compare(lead, best)
    if iou.empty or best == compared:
        return None
    columns = {"from": iou[lead.own[compared]], "to": iou[lead.own[best]]}
    table = DataFrame(columns).dropna()
    table["photos"] = of_lead.groupby("class")["photos"].first()
    gain = table["to"] - table["from"]
    differences = _class_differences(view)
    by_class = {row.name: row for row in differences.itertuples(index=False)}
    table["pair"] = [by_class.get(name) for name in table.index]
    table["order"] = -gain
    if by_class:
        table["order"] = [getattr(row, "difference", np.inf) for row in table["pair"]]
    table = table.sort_values("order", kind="stable")
    count = len(table)
    if count > MOST_CLASS_ROWS:
        table = concat([table[:END_ROWS], table[-END_ROWS:]])
    first, second = "", ""
    if by_class:
        first, second = differences[["first", "second"]].iloc[-1]
    return {
        "count": count,
        "rows": table.rename_axis("name").reset_index().to_dict("records"),
        "compared": compared,
        "best": best,
        "scale": Scale([0, *table["from"], *table["to"]], signed=False),
        "pair_scale": scale_of(by_class.values()),
        "first": first,
        "second": second,
        "more": int((gain >= 0.01).sum()),
    }


def _site_to_compare(lead: SiteReading, best: str) -> str:
    """Return the adapter, the last layer, or the first site, whichever is not the best one."""
    layers = [row.site for row in lead.rows if lead.is_layer(row.site)]
    last = layers[-1:]
    if best.endswith("norm"):  # it repeats the last layer
        last = []
    for site in ("adapter", *last, lead.rows[0].site):
        if site != best and lead.row(site):
            return site
    return best


def _class_differences(view: ReportView) -> DataFrame:
    """Return the differences by class of the lead and the first model; of the first one, with the last model."""
    of_class = view.pairs[view.pairs["of"] == "class"]
    key = view.lead.model.key
    of_lead = of_class[of_class["second"] == key]
    if len(of_lead):
        return of_lead
    return of_class[of_class["first"] == key]


# ------------------------------------------------------------------------------------------------ sites
def scale_of(
    rows: Iterable[Any], more: Sequence[float] = (), signed: bool = True, factor: float = 100
) -> Scale:
    """Return the axis of the intervals of rows and of more values."""
    ends = [*more]
    for row in rows:
        ends += [row.low, row.high]
    return Scale(ends, factor=factor, signed=signed)
