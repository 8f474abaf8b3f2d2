"""Scores by site as the page draws them: models under masks on data sets, on one axis, random models in grey."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probes.analyses.charts import Chart, Curve, Point
from probes.models.sites import is_on_main_path
from probes.runs.read import ProbeRun
from probes.tasks import SEGMENTATION, TASKS

from .position import main_rows, position_curves
from .sites import random_part
from .tables import Tables, by_claim
from .words import LINES, SIGNS, number, shown, site_name, site_number, site_tick, zone_of

PARTS = ("encoder_", "encoder_norm", "encoder", "adapter", "layer_", "final_norm")
IN_ENCODER = {"final_norm": "encoder_norm"}  # of a bare encoder beside an MLLM
ABOUT = ["task", "data", "model", "mask", "seed"]


@dataclass(frozen=True, eq=False)
class SiteReading:
    """A trained model under a mask on a data set.

    Args:
        model: Row of the table of models, with its `number` from 0 and `depth`, the number of its last layer.
        mask: Its attention mask.
        data: Name of the data set.
        task: What is read.
        seed: Of the training of probes and model.
        rows: Of the table of sites, with their text, in the order of the forward.
        draws: Scores of the models with random weights by site.
        own: The model's own names of the sites, those of a bare encoder's layers beside an MLLM differ.
        pictures: Content of the run's pictures.npz.
        images: How many photos it was scored on.
        resize: How these became squares.
        margin: Smallest difference that counts.
        label: What its user calls it, if that names a mask of a model.
        position: Row of position alone, None if it was not solved.
        blank: Rows of the table of sites of the same model on blank pictures.
    """

    model: Any
    mask: str
    data: str
    task: str
    seed: int
    rows: Sequence[Any]
    draws: dict[str, list[float]]
    own: dict[str, str]
    pictures: dict[str, np.ndarray]
    images: int
    resize: str
    margin: float
    label: str | None = None
    position: Any = None
    blank: Sequence[Any] = ()

    @property
    def about(self) -> tuple:
        """Task, data, key of the model, mask and seed."""
        return self.task, self.data, self.model.key, self.mask, self.seed

    @property
    def token(self) -> str:
        """What stands for it in a sentence: {A:causal}."""
        return f"{{{self.model.key}:{self.mask}}}"

    @property
    def best_layer(self) -> Any:
        """The row of the best layer, of a model without probed layers of its best site."""
        layers = [row for row in self.rows if self.is_layer(row.site)]
        return self._best_of(layers or self.rows)

    @cached_property
    def best(self) -> Any:
        """The row of the best site."""
        return self._best_of(self.rows)

    def _best_of(self, rows: Sequence[Any]) -> Any:
        sign = TASKS[self.task].sign
        return max(rows, key=lambda row: sign * row.value)

    def rank(self) -> float:
        """Return the best score of a layer, the higher the better."""
        return TASKS[self.task].sign * self.best_layer.value

    def is_layer(self, site: str) -> bool:
        """Return whether a site is a layer of the LLM or of the bare encoder."""
        return self.own.get(site, "").startswith("layer_")

    def row(self, site: str) -> Any:
        """Return the row of a site, None without one."""
        return next((row for row in self.rows if row.site == site), None)


class Name(NamedTuple):
    """A model or a reading in a sentence: its letter, "" where there is one model, and its label."""

    letter: str
    text: str


@dataclass(frozen=True, eq=False)
class ReportView:
    """What page and terminal show of the tables of a report.

    Args:
        tables: Of the report.
        models: Models by key, in the order given.
        readings: Of the report's main runs, in the order of the table of sites.
    """

    tables: Tables
    models: dict[str, Any]
    readings: list[SiteReading]

    @cached_property
    def claims(self) -> pd.DataFrame:
        """A row for each claim, with text."""
        return shown(by_claim(self.tables.claims))

    @cached_property
    def lead(self) -> SiteReading:
        """What reads best of the first task and data, at its best layer if several are compared: the first sentence."""
        first = self.readings[0]
        about = (first.task, first.data)
        same = [reading for reading in self.readings if (reading.task, reading.data) == about]
        return max(same, key=SiteReading.rank)

    @property
    def compared(self) -> list[SiteReading]:
        """The readings of the lead's task, data and seed, the lead among them."""
        return [reading for reading in self.front if reading.seed == self.lead.seed]

    def best(self, reading: SiteReading) -> Any:
        """Return the row of a reading's best site: where several are compared, of its best layer."""
        if len(self.compared) > 1:
            return reading.best_layer
        return reading.best

    @cached_property
    def names(self) -> dict[str, Name]:
        """What stands for models ("A") and their readings ("A:causal") in sentences."""
        is_lettered = len(self.models) > 1
        names = {}
        for key, model in self.models.items():
            letter = key * is_lettered
            names[key] = Name(letter, model.label)
            readings = [reading for reading in self.compared if reading.model is model]
            for reading in readings:
                text = model.label
                if reading.label:
                    text = reading.label
                elif len(readings) > 1:
                    text = f"{model.label} {reading.mask}"
                names[f"{key}:{reading.mask}"] = Name(letter, text)
        return names

    @property
    def front(self) -> list[SiteReading]:
        """The readings of the lead's task and data."""
        place = self.lead.task, self.lead.data
        return [reading for reading in self.readings if (reading.task, reading.data) == place]

    @cached_property
    def axis(self) -> "SiteAxis":
        """Their sites."""
        return SiteAxis(self.front)

    @property
    def masks(self) -> list[str]:
        """The masks of the LLMs among these."""
        of_llms = [reading for reading in self.front if reading.model.has_llm]
        return list(dict.fromkeys(reading.mask for reading in of_llms))

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """The differences on the lead's task and data, of its seed if there are several, with text."""
        return shown(self.differences_beside(self.lead))

    def differences_beside(self, reading: SiteReading) -> pd.DataFrame:
        """Return the differences on a reading's task and data, of its seed if there are several."""
        table = self.tables.differences
        is_same_seed = table["seed"].isna() | (table["seed"] == reading.seed)
        is_same_task = table["task"] == reading.task
        is_same_data = table["data"] == reading.data
        return table[is_same_seed & is_same_task & is_same_data]

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Those of models, under the lead's mask if there are some."""
        table = self.comparisons[self.comparisons["between"] == "models"]
        is_same_mask = table["mask"] == self.lead.mask
        if is_same_mask.any():
            return table[is_same_mask]
        return table


class MainRun(NamedTuple):
    """A run that a reading is of, and the content of its pictures.npz."""

    run: ProbeRun
    pictures: dict[str, np.ndarray]


def read_view(tables: Tables, runs: Mapping[tuple, MainRun]) -> ReportView:
    """Return what is shown of tables and of main runs, by task, data, key of the model, mask and seed."""
    models = _numbered_models(tables)
    has_llm = tables.models["has_llm"].any()
    margins = {about[0]: main_run.run.task.margin for about, main_run in runs.items()}
    table = shown(tables.sites, margins)
    main_scores = table["task"].map(lambda task: TASKS[task].score)
    is_shown = (table["metric"] == main_scores) & table["site"].map(is_on_main_path)
    main = table[table["main"] & is_shown]
    draws = tables.draws.groupby([*ABOUT[:4], "site"])["value"].agg(list).to_dict()
    positions = _positions(tables)
    of_blank = table[(table["weights"] == "blank") & is_shown]
    readings = []
    for about, rows in main.groupby(ABOUT, sort=False):
        task, data, key, mask, seed = about
        main_run = runs[about]
        is_beside_llm = has_llm and not models[key].has_llm
        sites = _names_of_sites(rows["site"], is_beside_llm)
        of_draws = {}
        for name, site in sites.items():
            if (*about[:4], site) in draws:
                of_draws[name] = draws[*about[:4], site]
        reading = SiteReading(
            model=models[key],
            mask=mask,
            data=data,
            task=task,
            seed=seed,
            rows=list(rows.assign(site=list(sites)).itertuples()),
            draws=of_draws,
            own=sites,
            pictures=main_run.pictures,
            images=main_run.run.metrics["images"],
            resize=main_run.run.metrics["image_resize"],
            margin=margins[task],
            label=main_run.run.label,
            position=positions.get(about),
            blank=_rows_of_blank(of_blank, about, sites),
        )
        readings.append(reading)
    return ReportView(tables, models, readings=readings)


def _numbered_models(tables: Tables) -> dict[str, Any]:
    """Return the rows of models by key, each with its number and the depth of its last layer."""
    depths = [site_number(site or "") or 0 for site in tables.models["last_layer"]]
    numbered = tables.models.assign(number=range(len(depths)), depth=depths)
    return {row.key: row for row in numbered.itertuples()}


def _positions(tables: Tables) -> dict[tuple, Any]:
    """Return the rows of position alone by task, data, key of the model, mask and seed."""
    positions = {}
    for row in shown(main_rows(tables.position)).itertuples():
        positions[row.task, row.data, row.model, row.mask, row.seed] = row
    return positions


def _rows_of_blank(table: pd.DataFrame, about: tuple, sites: Mapping[str, str]) -> list[Any]:
    """Return the rows of a model on blank pictures, with the page's names of its sites."""
    rows = table[(table[ABOUT] == list(about)).all(axis=1)]
    names = {own: name for name, own in sites.items()}
    return list(rows.assign(site=rows["site"].map(names)).itertuples())


def _names_of_sites(sites: Iterable[str], is_beside_llm: bool) -> dict[str, str]:
    """Return a model's sites by the page's names of them; those of a bare encoder may stand beside an MLLM's."""
    if is_beside_llm:
        return {_site_beside_llm(site): site for site in sites}
    return {site: site for site in sites}


def _site_beside_llm(site: str) -> str:
    """Return the name of a bare encoder's site beside the sites of an MLLM."""
    return IN_ENCODER.get(site, site.replace("layer_", "encoder_"))


def rows_about(table: pd.DataFrame, reading: SiteReading) -> pd.DataFrame:
    """Return the rows of a table about a reading's run."""
    is_same = table[ABOUT] == list(reading.about)
    return table[is_same.all(axis=1)]


def in_order(sites: Iterable[str]) -> list[str]:
    """Return sites in the order of the forward."""

    def place(site: str) -> tuple[int, int]:
        number = site_number(site)
        kind = site
        if number is not None:
            kind = f"{site.rpartition('_')[0]}_"
        return PARTS.index(kind), number or 0

    return sorted({*sites}, key=place)


class SiteAxis:
    """The places of the sites of readings on one axis; layers of models of another depth at equal relative depth."""

    def __init__(self, readings: Sequence[SiteReading]):
        self.has_llm = any(reading.model.has_llm for reading in readings)
        self.depths: dict[bool, int] = {}
        for reading in readings:
            model = reading.model
            if any(map(reading.is_layer, reading.own)):
                deepest = self.depths.get(model.has_llm, 0)
                self.depths[model.has_llm] = max(model.depth, deepest)
        self.is_relative = False
        sites = []
        for reading in readings:
            for row in reading.rows:
                if self.is_moved(reading, row.site):
                    self.is_relative = True
                else:
                    sites.append(row.site)
        self.sites = in_order(sites)

    def is_moved(self, reading: SiteReading, site: str) -> bool:
        """Return whether a site is a layer of a model that has fewer than others."""
        model = reading.model
        return reading.is_layer(site) and model.depth < self.depths[model.has_llm]

    def place(self, reading: SiteReading, site: str) -> float:
        """Return the place of a site of a reading."""
        if not self.is_moved(reading, site):
            return self.sites.index(site)
        start, _, number = site.rpartition("_")
        depths = []
        places = []
        for place, other in enumerate(self.sites):
            if other.startswith(f"{start}_") and site_number(other) is not None:
                depths.append(site_number(other))
                places.append(place)
        share = int(number) / reading.model.depth
        depth = self.depths[reading.model.has_llm] * share
        return float(np.interp(depth, depths, places))

    def ticks(self, reading: SiteReading) -> dict[float, str]:
        """Return what stands at the axis for the sites of a reading, by place."""
        return {self.place(reading, row.site): site_tick(row.site) for row in reading.rows}

    @property
    def zones(self) -> dict[str, list[int]]:
        """The parts of the models, each with the places of its sites."""
        zones: dict[str, list[int]] = {}
        for place, site in enumerate(self.sites):
            zones.setdefault(zone_of(site, self.has_llm), []).append(place)
        return zones


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
        masks: If these are several, points and lines have the looks of masks, and those without a sign are named.
        others: Drawn thin.
        banded: Those whose intervals are drawn.
        random: Those whose random models are drawn, by default all.
        about: Fields of the chart.
    """
    task = TASKS[readings[0].task]
    positions = [reading.position for reading in readings if reading.position]
    curves = position_curves(positions, last=len(axis.sites) - 1)
    curves += [blank_curve(reading, axis) for reading in readings if reading.blank]
    curves += [curve_of(reading, axis, masks, style="thin", mark="") for reading in others]
    for reading in readings:
        curves.append(curve_of(reading, axis, masks, band=reading in banded))
    if random is None:
        random = readings
    unit = task.labels[task.score]
    scale = 1
    if task.name == SEGMENTATION:
        unit = "mIoU, %"
        scale = 100
    return Chart(
        curves=curves,
        ticks={place: site_tick(site) for place, site in enumerate(axis.sites)},
        unit=unit,
        grey=grey_of(random, axis),
        scale=scale,
        **about,
    )


def curve_of(reading: SiteReading, axis: SiteAxis, masks: Sequence[str], **look: Any) -> Curve:
    """Return the curve of a reading."""
    label = reading.model.label
    points = []
    for row in reading.rows:
        name = site_name(reading.own.get(row.site, row.site))
        point = Point(
            x=axis.place(reading, row.site),
            value=row.value,
            low=row.low,
            high=row.high,
            title=f"{label}, {name}: {row.value_ci}",
        )
        points.append(point)
    looks = {"style": "line", "mark": "circle"}
    if len(masks) > 1 and reading.model.has_llm:
        looks = {"style": LINES.get(reading.mask, "dotted"), "mark": reading.mask}
        if reading.mask not in SIGNS:
            label = f"{label}, {reading.mask}"
    return Curve(points=points, name=label, colour=reading.model.number, **looks | look)


def blank_curve(reading: SiteReading, axis: SiteAxis) -> Curve:
    """Return the curve of a reading's model on blank pictures."""
    points = []
    for row in reading.blank:
        place = axis.place(reading, row.site)
        points.append(Point(place, row.value, title=f"blank pictures: {row.value_ci}"))
    return Curve(points, name="blank pictures", colour="grey", style="dotted")


def grey_of(readings: Sequence[SiteReading], axis: SiteAxis) -> list[list[Point]]:
    """Return the ranges of random models with their means.

    Layers fan out from the trained value of the site before them, where random LLMs start; random adapters stand alone.
    """
    ranges: dict[str, list[Point]] = {}
    for x, site in enumerate(axis.sites):
        drawn = [reading for reading in readings if site in reading.draws]
        values = [value for reading in drawn for value in reading.draws[site]]
        if not values:
            continue
        points = ranges.setdefault(zone_of(site, axis.has_llm), [])
        start = x - 1
        while start > 0 and random_part(drawn[0].own.get(axis.sites[start], "")) == "llm":
            start -= 1
        before = [reading.row(axis.sites[start]) for reading in drawn]
        starts = [row.value for row in before if row]
        if x and starts and not points and site != "adapter":
            points.append(_range(start, starts))
        task = drawn[0].task
        title = f"random models: {number(min(values), task)} to {number(max(values), task)}"
        points.append(_range(x, values)._replace(title=title))
    return list(ranges.values())


def _range(x: float, values: Sequence[float]) -> Point:
    """Return the mean of values, from the lowest to the highest."""
    mean = float(np.mean(values))
    return Point(x=x, value=mean, low=min(values), high=max(values))
