"""Shared style of all figures: colours, sizes, and names of sites on an axis.

The colours are the colour-blind safe palette of Okabe and Ito; lines also differ in dash and marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.models.sites import ADAPTER, ENCODER
from probes.report.study import Rows

MASK_COLOURS = {"causal": "#0072B2", "bidirectional": "#D55E00"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D1F")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "llava-bidir",  # reproducible bytes
}


class FigureData(NamedTuple):
    """A figure and the rows of its CSV file."""

    figure: Figure
    rows: Rows


@dataclass
class ReportFigure:
    """A figure of the page.

    Args:
        name: File name without extension.
        section: Heading under which the figure appears.
        title: Title of the figure.
        caption: What the figure shows and what to look for.
        data: The figure and its numbers.
        width: "half" of the page, "full", or "wide": full, and scrollable on a phone.
    """

    name: str
    section: str
    title: str
    caption: str
    data: FigureData
    width: str = "full"


def mask_colour(mask: str) -> str:
    """Return the colour of an attention mask."""
    return MASK_COLOURS.get(mask, "#009E73")


def new_axes(width: float, height: float, columns: int = 1, **kwargs) -> tuple[Figure, Any]:
    """Return a figure of width x height inches and its axes in one row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def new_panels(count: int, height: float = 2.7, columns: int = 3, **kwargs) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels in rows of at most `columns`; `height` is that of a row in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.6, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).flat
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def site_depth(site: str) -> int:
    """Return the depth of a site: -1 for the encoder, 0 for the adapter, l for layer l."""
    return {ENCODER: -1, ADAPTER: 0}[site] if site in (ENCODER, ADAPTER) else int(site.removeprefix("layer_"))


def label_sites(
    ax: Axes, sites: list[str], max_labels: int = 12, positions: Sequence[int] | None = None, **kwargs
) -> None:
    """Label the sites on the x axis; deep models get fewer labels so that these do not overlap.

    Args:
        ax: The axes.
        sites: The sites in order.
        max_labels: Approximate maximum number of labels.
        positions: Positions of the sites on the axis; their depths by default.
    """
    depth = {site: site_depth(site) for site in sites}
    deep = len(sites) > max_labels + 2
    if deep:  # the label of the adapter would overlap that of the encoder
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if len(sites) / step <= max_labels)
        names = {ENCODER: "enc."} | {s: str(depth[s]) for s in sites if depth[s] > 0 and depth[s] % step == 0}
    else:
        names = {s: {ENCODER: "enc.", ADAPTER: "adapt."}.get(s) or str(depth[s]) for s in sites}
    x = depth if positions is None else dict(zip(sites, positions, strict=True))
    ax.set_xticks([x[site] for site in names], list(names.values()), **kwargs)
    ax.set_xlabel("encoder, adapter (0), LLM layer" if deep else "encoder, adapter, LLM layer")


def score_row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of a site as a row of a table."""
    (low, high), keys = entry["miou_ci95"], ("site", "dim", "miou", "pacc", "best_epoch")
    return {key: entry[key] for key in keys} | {"miou_low": low, "miou_high": high}
