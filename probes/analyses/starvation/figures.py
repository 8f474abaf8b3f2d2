"""Figures of context starvation: the accuracy gap between the masks per patch (Fig. 7)."""

from typing import Any

import numpy as np

from probes.analyses.style import (
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    draw_intervals,
    mask_colour,
    new_axes,
    signed_colours,
)
from probes.results.formatting import bounds
from probes.results.study import MASKS

POINTS = "#D55E00"


def starvation_curve(starvation: dict[str, Any], patches: int = 50) -> FigureData:
    """Draw the accuracy gap of the first patches in raster order (Fig. 7)."""
    figure, ax = new_axes(6.4, 3.3)
    count = min(patches, len(starvation["gap"]))
    x, gap = np.arange(count), 100 * np.array(starvation["gap"][:count], float)
    low, high = 100 * np.array(starvation["gap_ci95"][:count], float).T
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
    gap = 100 * np.array(starvation["gap"], float).reshape(starvation["grid"])
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
    ax.bar(x, 100 * np.array(bars["gap"][: len(x)], float), color="#BBBBBB", width=0.85, label=labels[0])
    gap, ci95 = points["gap"][: len(x)], points["gap_ci95"][: len(x)]
    draw_intervals(ax, x, gap, ci95, POINTS, fmt="o", ms=3, lw=0.8, label=labels[1])
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("patch, in raster order")


def flip_gaps(starvation: dict[str, Any], flip: dict[str, Any]) -> FigureData:
    """Draw the gap per patch of upright and of transformed images (an entry of "flips"), side by side."""
    figure, axes = new_axes(6.4, 3.2, 2)
    grids = [100 * np.array(values, float).reshape(starvation["grid"]) for values in (starvation["gap"], flip["gap"])]
    for ax, grid, title in zip(axes, grids, ("upright", f"transformed ({flip['flip']})"), strict=True):
        image = ax.imshow(grid, **signed_colours(*grids))
        ax.set(xticks=[], yticks=[], title=title)
        ax.grid(False)
    figure.colorbar(image, ax=axes, label="bidirectional − causal (pp)")
    keys = ("causal", "bidirectional", "gap")
    return FigureData(figure, [{"patch": i} | {k: flip[k][i] for k in keys} for i in range(len(flip["gap"]))])


def _mean(accuracy: list[float | None]) -> float:
    """Return the mean over the patches that have labelled pixels; the others have None."""
    return float(np.nanmean(np.array(accuracy, float)))


def _format_change(value: float | None, ci95: list[float | None]) -> str:
    if value is None:
        return "has no labelled pixel"
    low, high = (100 * bound for bound in ci95)
    return f"{100 * value:+.1f} [{low:+.1f}, {high:+.1f}] pp"


def starvation_figures(result: dict[str, Any], analysis: dict[str, Any] | None) -> Figures:
    """Yield the figures of context starvation; `analysis` is starvation.json, which may be of another site."""
    at = f"at {analysis['site'].replace('_', ' ')}" if analysis else ""
    yield ReportFigure(
        "starvation", "Accuracy gap by patch",
        f"Accuracy under bidirectional minus causal attention at {result['site'].replace('_', ' ')}, for the first "
        "patches in raster order (Fig. 7). Look for a gap at the first patches, which attend to few other patches "
        f"under causal attention. {INTERVALS}",
        starvation_curve(result))  # fmt: skip
    yield ReportFigure(
        "starvation_grid", "Accuracy gap in the image",
        "The same gap at each patch's position in the image. Starvation predicts the largest gap at the top left.",
        starvation_grid(result), "half")  # fmt: skip
    if analysis and "by_class" in analysis:
        yield ReportFigure(
            "starvation_by_class", "Accuracy gap with equal class frequencies",
            f"The gap of the first patches {at} as measured, and reweighted so that every patch has the class "
            f"frequencies of the full split. Early patches often show only a few classes. {INTERVALS}",
            compare_gaps(
                analysis, analysis["by_class"], ("measured", "same class frequencies"), "standardised"
            ))  # fmt: skip
    if analysis and "by_position" in analysis:
        yield ReportFigure(
            "starvation_own_probe", "Accuracy gap with a probe for each position",
            "The gap of the first patches when one probe reads all positions, and when each position has its own. Both "
            "are solved in closed form from the same states, so the difference is due to the shared probe, not to "
            "missing information; a shared probe at the optimum of the loss may be closer to the points. At the "
            "adapter no mask has acted yet; a gap there comes from training. "
            f"{INTERVALS}",
            own_probe_gaps(analysis["by_position"]))  # fmt: skip
    if analysis and "dummy_tokens" in analysis:
        dummy = analysis["dummy_tokens"]
        changes = (f"{mask} {_format_change(**change['patch_0'])}" for mask, change in dummy["change"].items())
        yield ReportFigure(
            "starvation_dummy_tokens", "Accuracy gap with dummy tokens",
            f"The gap of the first patches {at} as measured, and with tokens without information before the image "
            f"(number: {dummy['tokens']}). If the gap shrinks because causal accuracy rises, early patches lacked an "
            "attention sink, not context. A fall can be the frozen probe's, which has never read states after such a "
            f"prompt. Change of accuracy at patch 0: {', '.join(changes)}. {INTERVALS}",
            compare_gaps(analysis, dummy, ("measured", "with dummy tokens"), "with_tokens"))  # fmt: skip
        if "by_position" in dummy:
            yield ReportFigure(
                "starvation_dummy_own_probe", "The same with probes solved after dummy tokens",
                "The gap of the first patches when the probes, too, are solved from states with the tokens before the "
                f"image: one for all positions, and one for each. {INTERVALS}",
                own_probe_gaps(dummy["by_position"]), "half")  # fmt: skip
    for flip in analysis.get("flips", []) if analysis else ():
        accuracies = (f"{mask} {_mean(analysis[mask]):.0%} → {_mean(flip[mask]):.0%}" for mask in MASKS)
        yield ReportFigure(
            f"starvation_{flip['flip']}", f"Position or content? ({flip['flip']})",
            f"Left: the gap {at} on upright images. Right: the gap on transformed images. A gap caused by position "
            f"stays in place; a gap caused by image content moves with the content. Result: {flip['follows']}. Mean "
            f"accuracy, upright → transformed: {', '.join(accuracies)}.",
            flip_gaps(analysis, flip))  # fmt: skip
