"""Scores by site as the page draws them: models under masks on data sets, on one axis, random models in grey."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from probes.analyses.charts import Chart, Curve, Point
from probes.models.sites import part_of
from probes.tasks import SEGMENTATION, TASKS

from .tables import Tables
from .words import percent, site_name, site_number, site_tick, zone_of

PARTS = ("encoder_", "encoder", "adapter", "layer_", "final_norm")
IN_ENCODER = {"final_norm": "encoder_norm"}  # of a bare encoder beside an MLLM
ABOUT = [
    "task",
    "data",
    "model",
    "mask",
    "seed",
]


@dataclass(frozen=True)
class Model:
    """A model of the report: `number` counts from 0, `about` is its long name, `depth` the number of its last layer."""

    key: str
    label: str
    about: str
    number: int
    has_llm: bool
    depth: int


@dataclass(frozen=True)
class SiteReading:
    """A trained model under a mask on a data set.

    Args:
        model: The model.
        mask: Its attention mask.
        data: Name of the data set.
        task: What is read.
        seed: Of the training of probes and model.
        rows: Of the table of sites, in the order of the forward.
        draws: Scores of the models with random weights by site.
        own: The model's own names of the sites, those of a bare encoder's layers beside an MLLM differ.
        pictures: Content of the run's pictures.npz.
    """

    model: Model
    mask: str
    data: str
    task: str
    seed: int
    rows: Sequence[Any]
    draws: dict[str, list[float]]
    own: dict[str, str]
    pictures: dict[str, np.ndarray]

    @cached_property
    def best(self) -> Any:
        """The row of the best site."""
        sign = TASKS[self.task].sign
        return max(self.rows, key=lambda row: sign * row.value)

    def is_layer(self, site: str) -> bool:
        """Return whether a site is a layer of the LLM or of the bare encoder."""
        return self.own.get(site, "").startswith("layer_")

    def row(self, site: str) -> Any:
        """Return the row of a site, None without one."""
        return next((row for row in self.rows if row.site == site), None)


def read_models(models: pd.DataFrame) -> dict[str, Model]:
    """Return the models of the table by key, in the order given."""
    return {
        row.key: Model(
            row.key,
            row.label,
            row.about,
            number,
            row.has_llm,
            site_number(row.last_layer or "") or 0,
        )
        for number, row in enumerate(models.itertuples())
    }


def read_readings(
    tables: Tables, pictures: Mapping[tuple, dict[str, np.ndarray]] | None = None
) -> list[SiteReading]:
    """Return the readings of the report's main runs, in the order of the table of sites.

    Args:
        tables: Of the report.
        pictures: Of the runs, by task, data, key of the model, mask and seed.
    """
    models = read_models(tables.models)
    has_llm = any(model.has_llm for model in models.values())
    table = tables.sites
    is_score = table["metric"] == table["task"].map(lambda task: TASKS[task].score)
    main = table[table["main"] & is_score & ~table["site"].map(lambda site: bool(part_of(site)))]
    readings = []
    for about, rows in main.groupby(ABOUT, sort=False):
        task, data, key, mask, seed = about
        own = {site: site for site in rows["site"]}
        if has_llm and not models[key].has_llm:
            own = {IN_ENCODER.get(x, x.replace("layer_", "encoder_")): x for x in own}
        shown = {site: name for name, site in own.items()}
        of_run = tables.draws[(tables.draws[ABOUT[:4]] == list(about[:4])).all(axis=1)]
        scores = of_run.groupby("site")["value"].agg(list).to_dict()
        named = rows.assign(site=rows["site"].map(shown)).itertuples()
        found = (pictures or {}).get(about, {})
        readings.append(
            SiteReading(
                models[key],
                mask,
                data,
                task,
                seed,
                list(named),
                {shown[site]: values for site, values in scores.items() if site in shown},
                own,
                found,
            )
        )
    return readings


def rows_about(table: pd.DataFrame, reading: SiteReading) -> pd.DataFrame:
    """Return the rows of a table about a reading's run."""
    own = reading.task, reading.data, reading.model.key, reading.mask, reading.seed
    return table[(table[ABOUT] == list(own)).all(axis=1)]


def lead_of(readings: Sequence[SiteReading]) -> SiteReading:
    """Return what the first sentence is about: the first model under the mask whose best site reads most."""
    sign = TASKS[readings[0].task].sign
    own = [r for r in readings if r.model is readings[0].model and r.data == readings[0].data]
    return max(own, key=lambda reading: sign * reading.best.value)


def in_order(sites: Iterable[str]) -> list[str]:
    """Return sites in the order of the forward."""

    def place(site: str) -> tuple[int, int]:
        number = site_number(site)
        kind = site if number is None else site.rpartition("_")[0] + "_"
        if kind == "encoder_norm":
            return 0, 10**6
        return PARTS.index(kind), number or 0

    return sorted({*sites}, key=place)


class SiteAxis:
    """The places of the sites of readings on one axis; layers of models of another depth at equal relative depth."""

    def __init__(self, readings: Sequence[SiteReading]):
        self.has_llm = any(reading.model.has_llm for reading in readings)
        self.depths: dict[bool, int] = {}
        for model in (r.model for r in readings if any(map(r.is_layer, r.own))):
            self.depths[model.has_llm] = max(model.depth, self.depths.get(model.has_llm, 0))
        sites = [row.site for r in readings for row in r.rows if not self.is_moved(r, row.site)]
        self.sites = in_order(sites)
        self.is_relative = any(self.is_moved(r, row.site) for r in readings for row in r.rows)

    def is_moved(self, reading: SiteReading, site: str) -> bool:
        """Return whether a site is a layer of a model that has fewer than others."""
        model = reading.model
        return reading.is_layer(site) and model.depth < self.depths[model.has_llm]

    def place(self, reading: SiteReading, site: str) -> float:
        """Return the place of a site of a reading."""
        if not self.is_moved(reading, site):
            return self.sites.index(site)
        start, _, number = site.rpartition("_")
        same = [x for x in self.sites if x.startswith(f"{start}_") and site_number(x) is not None]
        depth = self.depths[reading.model.has_llm] * int(number) / reading.model.depth
        return float(np.interp(depth, [*map(site_number, same)], [*map(self.sites.index, same)]))

    @property
    def zones(self) -> list[tuple[str, list[int]]]:
        """The parts of the models, each with the places of its sites."""
        zones: dict[str, list[int]] = {}
        for place, site in enumerate(self.sites):
            zones.setdefault(zone_of(site, self.has_llm), []).append(place)
        return list(zones.items())


def by_site(
    readings: Sequence[SiteReading],
    axis: SiteAxis,
    masks: Sequence[str],
    others: Sequence[SiteReading] = (),
    banded: Sequence[SiteReading] = (),
    random: Sequence[SiteReading] | None = None,
    **about: Any,
) -> Chart:
    """Return the chart of scores by site: the one figure of models, masks, data sets and tasks.

    Args:
        readings: The last one is on top.
        axis: Places of the sites.
        masks: If these are several, points have the shapes of masks, and causal lines are dashed.
        others: Drawn thin.
        banded: Those whose intervals are drawn.
        random: Those whose random models are drawn, by default all.
        about: Fields of the chart.
    """
    first = readings[0]
    is_segmentation = first.task == SEGMENTATION
    curves = [
        curve_of(
            reading,
            axis,
            masks,
            style="thin",
            mark="",
        )
        for reading in others
    ]
    curves += [
        curve_of(
            r,
            axis,
            masks,
            band=any(r is x for x in banded),
        )
        for r in readings
    ]
    ticks = {i: axis_tick(site) for i, site in enumerate(axis.sites)}
    task = TASKS[first.task]
    return Chart(
        curves,
        ticks,
        unit="mIoU, %" if is_segmentation else task.labels[task.score],
        grey=grey_of(readings if random is None else random, axis),
        scale=100 if is_segmentation else 1,
        **about,
    )


def axis_tick(site: str) -> str:
    """Return the name of a site at the axis of a small chart."""
    return {
        "encoder": "enc",
        "adapter": "ad",
    }.get(site) or site_tick(site)


def curve_of(
    reading: SiteReading,
    axis: SiteAxis,
    masks: Sequence[str],
    **look: Any,
) -> Curve:
    """Return the curve of a reading."""
    scale = 100 if reading.task == SEGMENTATION else 1
    points = [
        Point(
            axis.place(reading, row.site),
            row.value,
            row.low,
            row.high,
            f"{reading.model.label}, {site_name(reading.own.get(row.site, row.site))}: "
            + " to ".join(f"{scale * x:.3g}" for x in (row.low, row.high)),
        )
        for row in reading.rows
    ]
    several = len(masks) > 1
    own = {
        "style": "dashed" if several and reading.mask == "causal" else "line",
        "mark": reading.mask if several and reading.model.has_llm else "circle",
    }
    return Curve(
        points,
        reading.model.label,
        reading.model.number,
        **own | look,
    )


def grey_of(readings: Sequence[SiteReading], axis: SiteAxis) -> list[list[Point]]:
    """Return the ranges of random models with their means.

    Layers fan out from the trained value of the site before them, where random LLMs start; random adapters stand alone.
    """
    ranges: dict[tuple[str, bool], list[Point]] = {}
    for site in axis.sites:
        own = [r for r in readings if site in r.draws]
        values = [value for r in own for value in r.draws[site]]
        if not values:
            continue
        title = f"random models: {percent(min(values))} to {percent(max(values))}"
        point = Point(
            axis.sites.index(site), float(np.mean(values)), min(values), max(values), title
        )
        start = ranges.setdefault((zone_of(site, axis.has_llm), site == "adapter"), [])
        before = axis.sites[axis.sites.index(site) - 1]
        starts = [r.row(before).value for r in own if r.row(before)]
        if not start and site != "adapter" and starts and axis.sites.index(site):
            start.append(
                Point(
                    point.x - 1,
                    float(np.mean(starts)),
                    min(starts),
                    max(starts),
                )
            )
        start.append(point)
    return list(ranges.values())
