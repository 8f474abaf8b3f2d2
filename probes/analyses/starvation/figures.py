"""Figures of context starvation: the accuracy gap between the masks per patch (Fig. 7)."""

from typing import Any

import numpy as np

from probes.analyses.style import (
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    mask_colour,
    new_axes,
)
from probes.runs.formatting import bounds

POINTS = "#D55E00"
DRAWN_PATCHES = 50


def starvation_curve(starvation: dict[str, Any]) -> FigureData:
    """Draw the accuracy gap of the first patches in raster order (Fig. 7)."""
    figure, ax = new_axes(6.4, 3.3)
    count = min(DRAWN_PATCHES, len(starvation["gap"]))
    x = np.arange(count)
    gap = 100 * np.array(starvation["gap"][:count], float)
    low, high = 100 * np.array(starvation["gap_ci95"][:count], float).T
    ax.bar(
        x,
        gap,
        color=mask_colour("bidirectional"),
        alpha=0.75,
        width=0.85,
    )
    ax.vlines(x, low, high, color="#555555", lw=0.8)
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    for row in range(starvation["grid"][1], count, starvation["grid"][1]):
        ax.axvline(
            row - 0.5,
            color="#999999",
            lw=0.6,
            ls=":",
        )
    ax.set(
        xlabel="patch, in raster order (dotted: start of a row)",
        ylabel="bidirectional − causal (pp)",
    )
    rows = [
        {"patch": i}
        | {key: starvation[key][i] for key in ("causal", "bidirectional", "gap")}
        | bounds(ci95, "gap_")
        for i, ci95 in enumerate(starvation["gap_ci95"])
    ]
    return FigureData(figure, rows)


def compare_gaps(measured: dict[str, Any], standardised: dict[str, Any]) -> FigureData:
    """Draw the gaps of the first patches as measured (bars) and with the classes held fixed (points)."""
    figure, ax = new_axes(6.4, 3.3)
    x = np.arange(min(DRAWN_PATCHES, len(standardised["gap"])))
    ax.bar(
        x,
        100 * np.array(measured["gap"][: len(x)], float),
        color="#BBBBBB",
        width=0.85,
        label="measured",
    )
    gap = 100 * np.array(standardised["gap"][: len(x)], float)
    low, high = 100 * np.array(standardised["gap_ci95"][: len(x)], float).T
    ax.errorbar(
        x,
        gap,
        [gap - low, high - gap],
        color=POINTS,
        fmt="o",
        ms=3,
        lw=0.8,
        label="same class frequencies",
    )
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="patch, in raster order", ylabel="bidirectional − causal (pp)")
    ax.legend(fontsize=8)
    gaps = zip(measured["gap"], standardised["gap"], strict=False)
    return FigureData(
        figure,
        [
            {
                "patch": i,
                "gap": gap,
                "standardised": fixed,
            }
            for i, (gap, fixed) in enumerate(gaps)
        ],
    )


def starvation_figures(result: dict[str, Any]) -> Figures:
    """Yield the figures of context starvation, of results.json["starvation"]."""
    at = f"at {result['site'].replace('_', ' ')}"
    yield ReportFigure(
        "starvation", "Accuracy gap by patch",
        f"Accuracy under bidirectional minus causal attention {at}, for the first "
        "patches in raster order (Fig. 7). Look for a gap at the first patches, which attend to few other patches "
        f"under causal attention. {INTERVALS}",
        starvation_curve(result))  # fmt: skip
    yield ReportFigure(
        "starvation_by_class", "Accuracy gap with equal class frequencies",
        f"The gap of the first patches {at} as measured, and reweighted so that every patch has the class "
        f"frequencies of the full split. Early patches often show only a few classes. {INTERVALS}",
        compare_gaps(result, result["by_class"]))  # fmt: skip
