"""Figures of context starvation: accuracy by patch under both masks, and their difference (Fig. 7)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from probes.analyses.charts import Chart, Curve, Figure, Grid, Point
from probes.runs.formatting import Rows, bounds

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
