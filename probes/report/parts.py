"""The parts of the page below its figure: rows and charts that page.html.j2 writes."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

from probes.analyses.charts import Chart, Curve, Figure, Point
from probes.models.sites import is_layer, layer_around, layer_number, part_of
from probes.tasks import SEGMENTATION, TASKS

from .charts import LEAST_STEP, chart_span, span_of, ticks
from .compare import BEST_LAYER
from .readings import ABOUT, SiteAxis, SiteReading, by_site, rows_about
from .tables import Tables
from .words import axis_number, lower_first

Entry = dict[str, Any]
# what each finding looks like: class, and how far its circle is filled
FINDINGS = {
    "supported": ("ok", "full"),
    "supported by itself": ("ok", "three"),
    "not learned": ("half", "half"),
    "also in random layers": ("half", "half"),
    "artefact of the instrument": ("half", "ring"),
    "does not hold": ("no", "none"),
    "untested": ("open", "dash"),
}
ABOUT_CLAIM = [
    "claim",
    "model",
    "mask",
    "data",
]
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

    def __init__(
        self,
        values: Iterable[float],
        factor: float = 100,
        signed: bool = True,
    ):
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
def verdicts(claims: pd.DataFrame, task: str) -> Entry:
    """Return the tested claims of a task, grouped by claim, the axis of their effects, and the untested ones.

    Claims joint over seeds stand for those of the seeds, which are their dots.
    """
    entries = []
    for _, rows in claims[claims["task"] == task].groupby(ABOUT_CLAIM, sort=False):
        joint = rows[rows["seeds"] > 1]
        dots = rows.loc[rows["seeds"] == 1, "value"].tolist() if len(joint) else []
        shown = joint if len(joint) else rows
        entries += [
            {
                "row": row,
                "dots": dots,
            }
            for row in shown.itertuples()
        ]
    tested = [entry for entry in entries if entry["row"].conclusion != "untested"]
    groups: dict[str, list[Entry]] = {}
    for entry in tested:
        groups.setdefault(entry["row"].claim, []).append(entry)
    ends = [
        getattr(entry["row"], name)
        for entry in tested
        for name in ("low", "high", "beyond_low", "beyond_high")
    ]
    return {
        "groups": groups,
        "scale": Scale(ends, 100 if task == SEGMENTATION else 1),
        "rows": [entry["row"] for entry in entries],
        "tested": [entry["row"] for entry in tested],
        "untested": list(dict.fromkeys(x["row"].title for x in entries if x not in tested)),
        "margin": TASKS[task].margin,
        "task": task,
    }


def is_right(row: Any) -> bool:
    """Return whether a verdict whose truth is known is right: what was planted is supported, and nothing else."""
    return (row.finding == "supported") == (row.truth == "planted")


def not_tested(claims: pd.DataFrame, has_llm: bool) -> list[Entry]:
    """Return why columns of claims are untested: each reason once, with its claims and the keys of the models."""
    rows = claims[(claims["verdict"] == "untested") & claims["reason"].notna()]
    rows = rows[rows["column"].isin([*COLUMNS] if has_llm else [*COLUMNS][1:])]
    found = []
    for (column, reason), own in rows.groupby(["column", "reason"], sort=False):
        first, *others = dict.fromkeys(own["title"])
        titles = ", ".join([first, *map(lower_first, others)])
        entry = {
            "models": own["model"].unique(),
            "claims": titles,
        }
        found.append(
            entry
            | {
                "column": COLUMNS[column],
                "reason": reason,
            }
        )
    return found


# ------------------------------------------------------------------------------------------------ models and data sets
def panels(
    readings: Iterable[SiteReading],
    masks: Sequence[str],
    axis: SiteAxis | None = None,
    banded: bool = False,
) -> list[Entry]:
    """Return a chart for each model, with one axis of scores, and the model's best reading.

    Args:
        readings: Of one task.
        masks: All masks of the page.
        axis: Of the sites; other models are then drawn thin, else each has an axis of its own.
        banded: Draw intervals.
    """
    charts = []
    groups = [*grouped(readings, "model.key").values()]
    for own in groups:
        others = [reading for group in groups if group is not own for reading in group]
        chart = by_site(
            own, axis or SiteAxis(own), masks, others if axis else (), own if banded else ()
        )
        charts.append(chart)
    span = chart_span(charts)
    sign = TASKS[groups[0][0].task].sign
    return [
        {
            "readings": own,
            "best": max(own, key=lambda reading: sign * reading.best.value),
            "chart": chart._replace(span=span),
        }
        for own, chart in zip(groups, charts, strict=True)
    ]


def grouped(readings: Iterable[SiteReading], name: str) -> dict[Any, list[SiteReading]]:
    """Return readings by "task", "data", or "model.key", in their order."""
    groups: dict[Any, list[SiteReading]] = {}
    for reading in readings:
        groups.setdefault(attrgetter(name)(reading), []).append(reading)
    return groups


def model_differences(differences: pd.DataFrame) -> dict[str, Any]:
    """Return by model how it differs from the first: at the best layers, else at the last site that both have."""
    rows = differences[
        differences["of"].isin([BEST_LAYER, "site"]) & differences["difference"].notna()
    ]
    rows = rows.sort_values("of", key=lambda of: of == BEST_LAYER, kind="stable")
    return {row.second: row for row in rows.itertuples()}


def inside_layers(tables: Tables) -> list[Figure]:
    """Return the figure of scores inside the layers, a panel for each model and mask; none if none was probed."""
    table = tables.sites[tables.sites["main"] & (tables.sites["metric"] == "miou")]
    table = table[table["site"].map(lambda site: is_layer(layer_around(site)))]
    parts = table["site"].map(lambda site: part_of(site) or "")
    charts = []
    for about, rows in table.groupby(ABOUT, sort=False):
        curves = []
        for colour, (part, name) in enumerate(INSIDE.items()):
            own = rows[parts[rows.index] == part].itertuples()
            points = [
                Point(
                    layer_number(x.site),
                    x.value,
                    x.low,
                    x.high,
                )
                for x in own
            ]
            curves.append(
                Curve(
                    sorted(points),
                    name,
                    colour,
                    mark="circle",
                    band=True,
                )
            )
        ticks = {
            layer: str(layer) for layer in sorted({int(p.x) for c in curves for p in c.points})
        }
        charts += [
            Chart(
                curves,
                ticks,
                ", ".join(about[2:4]),
                "mIoU, %",
            )
        ] * any(parts[rows.index])
    text = "Values that a layer's attention reads, and what attention and MLP add, beside the output of the layer."
    return (
        [
            Figure(
                "parts",
                "Inside the layers",
                text,
                charts,
            )
        ]
        if charts
        else []
    )


# ------------------------------------------------------------------------------------------------ classes
def class_rows(classes: pd.DataFrame, lead: SiteReading, differences: pd.DataFrame) -> Entry | None:
    """Return the IoU of each class at the best site and at a site to compare with, and differences of two models.

    Classes are sorted by how much they gain, or by the difference of the models.
    """
    own = rows_about(classes, lead)
    table = own.pivot_table(
        index="class",
        columns="site",
        values="iou",
        sort=False,
    )
    best = lead.best.site
    is_norm = best.endswith("norm")  # which repeats the last layer
    layers = [row.site for row in lead.rows if lead.is_layer(row.site) and not is_norm]
    ends = ["adapter"] * bool(lead.row("adapter")) + layers[::-1] + [lead.rows[0].site]
    compared = next((site for site in ends if site != best), best)
    if table.empty or best == compared:
        return None
    table = pd.DataFrame(
        {
            "from": table[lead.own[compared]],
            "to": table[lead.own[best]],
        }
    ).dropna()
    table["photos"] = own.drop_duplicates("class").set_index("class")["photos"]
    of_class = differences[differences["of"] == "class"]
    pair = {row.name: row for row in of_class.itertuples(index=False)}  # of the last model
    gain = table["to"] - table["from"]
    order = pd.Series({x: pair[x].difference if x in pair else np.inf for x in table.index})
    table = table.loc[(order if pair else -gain).sort_values(kind="stable").index]
    return {
        "rows": [
            {
                "name": name,
                "pair": pair.get(name),
            }
            | dict(row)
            for name, row in table.iterrows()
        ],
        "compared": compared,
        "best": best,
        "scale": Scale([0, *table["from"], *table["to"]], signed=False),
        "pair_scale": Scale([x for row in pair.values() for x in (row.low, row.high)]),
        "second": of_class["second"].iloc[-1] if pair else "",
        "more": int((gain >= 0.01).sum()),
    }


# ------------------------------------------------------------------------------------------------ sites
def beyond(row: Any) -> str:
    """Return ▲ if a site reads better than random models: by a point at least, in an interval without 0; ▼ worse."""
    if not (abs(row.minus_random) >= 0.01 and row.minus_low * row.minus_high > 0):
        return ""
    return "▲" if row.minus_random > 0 else "▼"


def site_scale(lead: SiteReading) -> Scale:
    """Return the axis of a reading's scores and of its random models."""
    draws = [value for values in lead.draws.values() for value in values]
    return Scale([*(x for row in lead.rows for x in (row.low, row.high)), *draws], signed=False)
