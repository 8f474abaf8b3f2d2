"""Figure of bidirectional minus causal mIoU by site."""

from typing import Any

from matplotlib.lines import Line2D

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    label_sites,
    mask_colour,
    new_axes,
    site_depth,
)
from probes.report.verdicts import ALPHA


def mask_difference(comparison: dict[str, Any]) -> FigureData:
    """Draw the differences of mIoU with 95% intervals; markers are filled if the corrected p-value is below 5%."""
    figure, ax = new_axes(6.4, 3.3)
    sites = comparison["sites"]
    colour = mask_colour("bidirectional")
    for entry in sites:
        x = site_depth(entry["site"])
        y = 100 * entry["difference"]
        ax.vlines(x, *(100 * bound for bound in entry["ci95"]), color=colour, lw=1.4)
        face = colour if entry["p_corrected"] < ALPHA else "white"
        ax.plot(
            x,
            y,
            "o",
            ms=6,
            markerfacecolor=face,
            markeredgecolor=colour,
        )
    ax.axhline(0, color="black", lw=0.8)
    label_sites(ax, [entry["site"] for entry in sites])
    ax.set_ylabel("bidirectional − causal (pp)")
    marker = {
        "marker": "o",
        "ls": "",
        "markeredgecolor": colour,
    }
    ax.legend(
        handles=[
            Line2D(
                [],
                [],
                markerfacecolor=colour,
                label=f"corrected p < {ALPHA}",
                **marker,
            ),
            Line2D(
                [],
                [],
                markerfacecolor="white",
                label="not significant",
                **marker,
            ),
        ],
        fontsize=8,
    )
    return FigureData(figure, [])


def mask_figures(comparison: dict[str, Any] | None) -> Figures:
    """Yield the figure of both masks, if the study has both."""
    if comparison:
        yield ReportFigure(
            "paired_sites", "Difference by site",
            "mIoU under bidirectional minus causal attention on the same images (Fig. 8). Look for layers whose "
            "interval excludes zero. Lines: paired 95% intervals. Filled: significant in a permutation test, corrected "
            f"for {len(comparison['sites'])} sites.",
            mask_difference(comparison))  # fmt: skip
