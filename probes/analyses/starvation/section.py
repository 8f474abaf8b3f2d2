"""What the report shows of starvation: the gap of a study's two runs, and attention sinks."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from probes.analyses.base import Section
from probes.analyses.charts import Chart, Curve, Figure, Grid, Point
from probes.analyses.sinks import sinks_of
from probes.analyses.starvation import first_token_sinks, sink_warning
from probes.analyses.starvation.gaps import starvation
from probes.runs.formatting import Rows, bounds
from probes.runs.paper import PAPER
from probes.runs.read import FinishedRun
from probes.runs.study import StudyRuns


def section(study: StudyRuns) -> Section:
    """Return the section of a study; empty without both runs or the causal run's best layer."""
    pair = study.pair()
    result = starvation(*pair) if pair else None
    if result is None:
        return Section(results={"starvation": None})
    rows = table3(result)
    shown = {}
    runs = {run.mask: run for run in pair}
    if rows_of_sinks := sink_rows(runs):
        shown[f"Attention sinks. {sink_warning(runs, result['site'])}"] = rows_of_sinks
    return Section(
        [*starvation_figures(result)],
        tables={"table3": rows},
        shown=shown,
        results={"starvation": result},
    )


def sink_rows(runs: Mapping[str, FinishedRun]) -> list[dict[str, str]]:
    """Return a row of text for each layer at which the first image token is a sink, of runs by mask."""
    return [
        {
            "attention": mask,
            "site": layer["site"],
            "norm of the first image token, in medians": f"{layer['first_norm']:.3g}",
            "image tokens with such a norm": f"{layer['sinks']:.3g}",
        }
        for mask, run in runs.items()
        for layer in first_token_sinks(sinks_of(run))
    ]


def table3(starvation: dict[str, Any]) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    keys = ("causal", "bidirectional", "gap")
    paper = PAPER["table3_patch_accuracy"]

    def number(x):
        return None if math.isnan(x) else x  # a patch without a labelled pixel

    rows = [
        {
            "model": "this run",
            "patch": i,
        }
        | {key: number(starvation[key][i]) for key in keys}
        for i in range(3)
    ]
    return rows + [
        {
            "model": "paper, clip, ADE20K",
            "patch": i,
        }
        | dict(zip(keys, paper[f"patch_{i}"], strict=False))
        for i in range(3)
    ]


KINDS = ("causal", "bidirectional", "gap")
DIFFERENCE = "bidirectional − causal"


def gap_chart(result: dict[str, Any], title: str) -> Chart:
    """Return the differences of the first row, with intervals."""
    columns = result["grid"][1]
    gaps = zip(result["gap"][:columns], result["gap_ci95"], strict=False)
    points = [Point(i + 1, gap, *ci95) for i, (gap, ci95) in enumerate(gaps)]
    ticks = {i + 1: str(i + 1) for i in range(columns)}
    return Chart(
        [
            Curve(
                points,
                "",
                0,
                "dots",
                "circle",
            )
        ],
        ticks,
        title,
        "points, by patch from the left",
        signed=True,
    )


def accuracy_grids(result: dict[str, Any]) -> list[Grid]:
    """Return accuracy by patch under both masks with one range of colours, and their difference."""
    shown = {name: np.array(result[name], float).reshape(result["grid"]) for name in KINDS}
    both = [shown[name] for name in KINDS[:2]]
    span = (float(np.nanmin(both)), float(np.nanmax(both)))
    grids = []
    for name, values in shown.items():
        signed = name == "gap"
        numbers = [100 * values[0, 0], 100 * np.nanmean(values[0])]
        unit = (
            "first patch {:+.1f}, first row {:+.1f}"
            if signed
            else "first patch {:.1f}%, first row {:.1f}%"
        )
        title = DIFFERENCE if signed else name
        text = unit.format(*numbers).replace("-", "−")
        grids.append(
            Grid(
                values,
                title,
                text,
                signed,
                None if signed else span,
            )
        )
    return grids


def starvation_figures(result: dict[str, Any]) -> Iterator[Figure]:
    """Yield the figures of context starvation, of results.json["starvation"]."""
    at = f"at {result['site'].replace('_', ' ')}"
    yield Figure(
        "starvation",
        f"Accuracy by patch {at}",
        "Under causal attention the first image tokens see few others (Fig. 7). Look for a gap at the first ones. The "
        "darker, the higher; of differences, blue is higher under bidirectional attention. Lines: 95% intervals.",
        [*accuracy_grids(result), gap_chart(result, "first row")],
        gap_rows(result),
    )
    fixed = result["by_class"] | {"grid": result["grid"]}
    gaps = zip(result["gap"], fixed["gap"], strict=False)
    yield Figure(
        "starvation_by_class",
        "Accuracy gap with equal class frequencies",
        f"The gap of the first row {at} as measured, and reweighted so that every patch has the class frequencies of "
        "the full split. Early patches often show only a few classes.",
        [gap_chart(result, "as measured"), gap_chart(fixed, "same class frequencies")],
        [
            {
                "patch": i,
                "gap": gap,
                "standardised": standardised,
            }
            for i, (gap, standardised) in enumerate(gaps)
        ],
    )


def gap_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of the CSV file: a row per patch."""
    return [
        {"patch": i} | {name: result[name][i] for name in KINDS} | bounds(ci95, "gap_")
        for i, ci95 in enumerate(result["gap_ci95"])
    ]
