"""Figures of context starvation: the accuracy gap between the masks per patch (Fig. 7)."""

from typing import Any

import numpy as np

from probes.report.tables import bounds

from .style import FigureData, draw_intervals, mask_colour, new_axes, signed_colours

POINTS = "#D55E00"


def starvation_curve(starvation: dict[str, Any], patches: int = 50) -> FigureData:
    """Draw the accuracy gap of the first patches in raster order (Fig. 7)."""
    figure, ax = new_axes(6.4, 3.3)
    count = min(patches, len(starvation["gap"]))
    x, gap = np.arange(count), 100 * np.array(starvation["gap"][:count])
    low, high = 100 * np.array(starvation["gap_ci95"][:count]).T
    ax.bar(x, gap, color=mask_colour("bidirectional"), alpha=0.75, width=0.85)
    ax.vlines(x, low, high, color="#555555", lw=0.8)
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    for row in range(starvation["grid"][1], count, starvation["grid"][1]):
        ax.axvline(row - 0.5, color="#999999", lw=0.6, ls=":")
    ax.set(xlabel="patch, in raster order (dotted: start of a row)", ylabel="bidirectional − causal (pp)")
    rows = [
        {"patch": i} | {key: starvation[key][i] for key in ("causal", "bidirectional", "gap")} | bounds(ci95, "gap_")
        for i, ci95 in enumerate(starvation["gap_ci95"])
    ]
    return FigureData(figure, rows)


def starvation_grid(starvation: dict[str, Any]) -> FigureData:
    """Draw the same gap at the position of each patch in the image."""
    figure, ax = new_axes(4.2, 3.3)
    gap = 100 * np.array(starvation["gap"]).reshape(starvation["grid"])
    image = ax.imshow(gap, **signed_colours(gap))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="bidirectional − causal (pp)")
    return FigureData(figure, [])


def compare_gaps(bars: dict[str, Any], points: dict[str, Any], labels: tuple[str, str], column: str) -> FigureData:
    """Draw the gaps of the first patches as bars and, measured in another way, as points with intervals.

    Args:
        bars, points: Each with "gap" and "gap_ci95" by patch.
        labels: Labels of both.
        column: Name of the points' column in the CSV file.
    """
    figure, ax = new_axes(6.4, 3.3)
    _draw_gaps(ax, bars, points, labels)
    ax.set_ylabel("bidirectional − causal (pp)")
    ax.legend(fontsize=8)
    rows = [{"patch": i, "gap": bars["gap"][i], column: gap} for i, gap in enumerate(points["gap"])]
    return FigureData(figure, rows)


def own_probe_gaps(by_position: dict[str, Any]) -> FigureData:
    """Draw the gaps under a shared probe (bars) and under a probe of each position (points), one panel per site."""
    figure, axes = new_axes(6.6, 3.3, len(by_position["sites"]), sharey=True, squeeze=False)
    rows = []
    for ax, entry in zip(axes[0], by_position["sites"], strict=True):
        _draw_gaps(ax, entry["shared"], entry["own"], ("one probe for all", "a probe for each"))
        ax.set_title(entry["site"].replace("_", " "), fontsize=10)
        gaps = {name: entry[name] for name in ("shared", "own", "read_out")}
        rows += [
            {"site": entry["site"], "patch": i}
            | {key: value for name, x in gaps.items() for key, value in _gap_columns(name, x, i).items()}
            for i in range(len(entry["own"]["gap"]))
        ]
    axes[0, 0].set_ylabel("bidirectional − causal (pp)")
    axes[0, 0].legend(fontsize=8)
    return FigureData(figure, rows)


def _gap_columns(name: str, gaps: dict[str, Any], patch: int) -> dict[str, float]:
    return {f"{name}_gap": gaps["gap"][patch]} | bounds(gaps["gap_ci95"][patch], f"{name}_gap_")


def _draw_gaps(ax, bars: dict[str, Any], points: dict[str, Any], labels: tuple[str, str], patches: int = 50) -> None:
    """Draw the gaps of at most `patches` patches: bars, and points with intervals."""
    x = np.arange(min(patches, len(points["gap"])))
    ax.bar(x, 100 * np.array(bars["gap"][: len(x)]), color="#BBBBBB", width=0.85, label=labels[0])
    gap, ci95 = points["gap"][: len(x)], points["gap_ci95"][: len(x)]
    draw_intervals(ax, x, gap, ci95, POINTS, fmt="o", ms=3, lw=0.8, label=labels[1])
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("patch, in raster order")
