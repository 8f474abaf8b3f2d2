"""The parts of the page below its figure: rows and charts that page.html.j2 writes."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from pandas import DataFrame

from probes.analyses.charts import Chart, Curve, Figure, curves_by_layer
from probes.models.sites import is_layer, layer_around, layer_number, part_of
from probes.tasks import SEGMENTATION, TASKS

from .charts import LEAST_STEP, chart_span, span_of, ticks
from .compare import BEST_LAYER
from .readings import ABOUT, SiteAxis, SiteReading, by_site, rows_about
from .tables import Tables
from .words import axis_number, lower_first

Entry = dict[str, Any]
# what each finding looks like: class, how far its circle is filled, and the circle as a character
FINDINGS = {
    "supported": ("ok", "full", "●"),
    "supported by itself": ("ok", "three", "◕"),
    "not learned": ("half", "half", "◐"),
    "also in random layers": ("half", "half", "◐"),
    "artefact of the instrument": ("half", "ring", "◉"),
    "does not hold": ("no", "none", "○"),
    "untested": ("open", "dash", "◌"),
}
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
        least = LEAST_STEP if factor == 100 else 0
        self.low, self.high = span_of([factor * value for value in values], signed, least)

    def at(self, value: float) -> float:
        """Return the place of a value, in per cent."""
        share = (self.factor * value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def rules(self, most: int = 6) -> list[tuple[str, float]]:
        """Return round values as text, and their places."""
        values = ticks(self.low, self.high, most)
        return [(axis_number(x, self.signed), self.at(x / self.factor)) for x in values]


# ------------------------------------------------------------------------------------------------ verdicts
def verdicts(claims: DataFrame, task: str) -> Entry:
    """Return the claims of a task, those that are tested grouped by claim, and the axis of their effects.

    Claims joint over seeds stand for those of the seeds, which are their dots.
    """
    rows = []
    for _, own in claims[claims["task"] == task].groupby(ABOUT_CLAIM, sort=False):
        joint = own[own["seeds"] > 1]
        dots = own.loc[own["seeds"] == 1, "value"].tolist() if len(joint) else []
        shown = joint if len(joint) else own
        rows += shown.assign(dots=[dots] * len(shown)).itertuples()
    tested = [row for row in rows if row.conclusion != "untested"]
    ends = [x for row in tested for x in (row.low, row.high, row.beyond_low, row.beyond_high)]
    return {
        "groups": grouped(tested, "claim"),
        "scale": Scale(ends, 100 if task == SEGMENTATION else 1),
        "rows": rows,
        "tested": tested,
        "margin": TASKS[task].margin,
        "task": task,
    }


def is_right(row: Any) -> bool:
    """Return whether a verdict whose truth is known is right: what was planted is supported, and nothing else."""
    return (row.finding == "supported") == (row.truth == "planted")


def not_tested(claims: DataFrame, has_llm: bool) -> list[Entry]:
    """Return why columns of claims are untested: each reason once, with its claims and the keys of the models."""
    rows = claims[(claims["verdict"] == "untested") & claims["reason"].notna()]
    rows = rows[rows["column"].isin([*COLUMNS] if has_llm else [*COLUMNS][1:])]
    found = []
    for (column, reason), own in rows.groupby(["column", "reason"], sort=False):
        first, *others = own["title"].unique()
        found.append(
            {
                "models": own["model"].unique(),
                "claims": ", ".join([first, *map(lower_first, others)]),
                "column": COLUMNS[column],
                "reason": reason,
            }
        )
    return found


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
    for own in groups:
        others = [reading for reading in readings if reading not in own] * together
        axis = SiteAxis(readings if together else own)
        charts.append(
            by_site(own, axis=axis, masks=masks, others=others, banded=own if banded else ())
        )
    span = chart_span(charts)
    return [
        {
            "readings": own,
            "best": max(own, key=SiteReading.rank),
            "chart": chart._replace(span=span),
        }
        for own, chart in zip(groups, charts, strict=True)
    ]


def grouped(rows: Iterable[Any], name: str) -> dict[Any, list[Any]]:
    """Return readings by "task", "data", or "model.key", or claims by "claim", in their order."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(attrgetter(name)(row), []).append(row)
    return groups


def model_differences(differences: DataFrame) -> dict[str, Any]:
    """Return by model how it differs from the first: at the best layers, else at the last site that both have."""
    known = differences.dropna(subset="difference")
    rows = [known[known["of"] == of] for of in ("site", BEST_LAYER)]
    return {row.second: row for table in rows for row in table.itertuples()}


def inside_layers(tables: Tables) -> list[Figure]:
    """Return the figure of scores inside the layers, a panel for each model and mask; none if none was probed."""
    table = tables.sites.query("main and metric == 'miou'")
    if table.empty:  # of another task alone
        return []
    table = table[table["site"].map(lambda site: is_layer(layer_around(site)))]
    parts = table["site"].map(lambda site: part_of(site) or "")
    table = table.assign(part=parts, layer=table["site"].map(layer_number))
    charts = []
    for about, own in table.groupby(ABOUT, sort=False):
        if own["part"].any():
            rows = own.sort_values("layer")
            looks = {
                part: Curve([], name, colour, mark="circle", band=True)
                for colour, (part, name) in enumerate(INSIDE.items())
            }
            curves = curves_by_layer(
                rows.to_dict("records"), looks=looks, name="part", value="value"
            )
            ticks = {layer: str(layer) for layer in rows["layer"]}
            charts.append(
                Chart(curves=curves, ticks=ticks, title=", ".join(about[2:4]), unit="mIoU, %")
            )
    text = "Values that a layer's attention reads, and what attention and MLP add, beside the output of the layer."
    return (
        [Figure(name="parts", title="Inside the layers", caption=text, panels=charts)]
        if charts
        else []
    )


# ------------------------------------------------------------------------------------------------ classes
def class_rows(classes: DataFrame, lead: SiteReading, differences: DataFrame) -> Entry | None:
    """Return the IoU of each class at the best site and at a site to compare with, and differences of two models.

    Classes are sorted by how much they gain, or by the difference of the models.
    """
    own = rows_about(classes, lead)
    iou = own.pivot_table(index="class", columns="site", values="iou", sort=False)
    best = lead.best.site
    layers = [row.site for row in lead.rows if lead.is_layer(row.site)]
    last = [] if best.endswith("norm") else layers[-1:]  # a norm repeats the last layer
    ends = [site for site in ("adapter", *last, lead.rows[0].site) if lead.row(site)]
    compared = next((site for site in ends if site != best), best)
    if iou.empty or best == compared:
        return None
    table = DataFrame({"from": iou[lead.own[compared]], "to": iou[lead.own[best]]}).dropna()
    table["photos"] = own.groupby("class")["photos"].first()
    of_class = differences[differences["of"] == "class"]
    pair = {row.name: row for row in of_class.itertuples(index=False)}  # of the last model
    gain = table["to"] - table["from"]
    table["pair"] = [pair.get(name) for name in table.index]
    table["order"] = [x.difference if x else np.inf for x in table["pair"]] if pair else -gain
    table = table.sort_values("order", kind="stable")
    return {
        "rows": table.rename_axis("name").reset_index().to_dict("records"),
        "compared": compared,
        "best": best,
        "scale": Scale([0, *table["from"], *table["to"]], signed=False),
        "pair_scale": scale_of(pair.values()),
        "second": of_class["second"].iloc[-1] if pair else "",
        "more": int((gain >= 0.01).sum()),
    }


# ------------------------------------------------------------------------------------------------ sites
def scale_of(
    rows: Iterable[Any], more: Sequence[float] = (), signed: bool = True, factor: float = 100
) -> Scale:
    """Return the axis of the intervals of rows and of more values."""
    return Scale([*more, *(x for row in rows for x in (row.low, row.high))], factor, signed)
