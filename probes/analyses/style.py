"""Shared style of all figures: colours, sizes, and names of sites on an axis.

The colours are the colour-blind safe palette of Okabe and Ito; lines also differ in dash and marker.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from probes.models.sites import ADAPTER, ENCODER, is_layer
from probes.runs.formatting import Rows

MASK_COLOURS = {"causal": "#0072B2", "bidirectional": "#D55E00"}
# of anything else but masks, whose colours mean nothing but masks
COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D1F", "#882255", "#332288")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType; journals reject Type 3
    "ps.fonttype": 42,
    "svg.hashsalt": "llava-bidir",  # reproducible bytes
}


Looks = dict[Hashable, dict[str, Any]]  # properties of curves, by name


class FigureData(NamedTuple):
    """A figure and the rows of its CSV file."""

    figure: Figure
    rows: Rows


@dataclass
class ReportFigure:
    """A figure of the page."""

    name: str  # file name without extension
    title: str
    caption: str  # what it shows and what to look for
    data: FigureData
    width: str = "full"  # "half" of the page, "full", or "wide": full, and scrollable on a phone


Figures = Iterator[ReportFigure]
INTERVALS = "Lines: 95% intervals."


def caption(*sentences: str) -> str:
    """Join the sentences of a caption; empty ones are left out."""
    return " ".join(filter(None, sentences))


def mask_colour(mask: str) -> str:
    """Return the colour of an attention mask."""
    return MASK_COLOURS.get(mask, "#009E73")


def new_axes(
    width: float,
    height: float,
    columns: int = 1,
    **kwargs,
) -> tuple[Figure, Any]:
    """Return a figure of width x height inches and its axes in one row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def new_panels(
    count: int,
    height: float = 2.7,
    columns: int = 3,
    **kwargs,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels in rows of at most `columns`; `height` is that of a row in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.6, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).flat
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def has_depth(site: str) -> bool:
    """Return whether a site is on the axis of depths.

    `final_norm` repeats the last layer. The encoder's own layers in an MLLM and the parts of layers have figures of
    their own.
    """
    return site in (ENCODER, ADAPTER) or is_layer(site)


def site_depth(site: str) -> int:
    """Return the depth of a site: -1 for the encoder, 0 for the adapter, l for layer l."""
    if site in (ENCODER, ADAPTER):
        return {ENCODER: -1, ADAPTER: 0}[site]
    return int(site.removeprefix("layer_"))


def label_sites(
    ax: Axes,
    sites: list[str],
    max_labels: int = 12,
    **kwargs,
) -> None:
    """Label the sites on the x axis at their depths, with about `max_labels` labels in deep models."""
    depth = {site: site_depth(site) for site in sites}
    many = len(sites) > max_labels + 2
    deep = many or max(depth.values(), default=0) > max_labels + 2
    if deep:  # the label of the adapter would overlap that of the encoder
        if many:
            step = next(
                step for step in (1, 2, 4, 8, 16, 32, 64) if len(sites) / step <= max_labels
            )
        else:
            step = 1
        shown = [s for s in sites if s == ENCODER or (depth[s] > 0 and depth[s] % step == 0)]
        names = {s: "enc." if s == ENCODER else str(depth[s]) for s in shown}
    else:
        names = {s: {ENCODER: "enc.", ADAPTER: "adapt."}.get(s) or str(depth[s]) for s in sites}
    ax.set_xticks([depth[site] for site in names], list(names.values()), **kwargs)
    ax.set_xlabel("encoder, adapter (0), LLM layer" if deep else "encoder, adapter, LLM layer")


def label_layers(
    ax: Axes,
    sites: list[str],
    max_labels: int = 16,
    **kwargs,
) -> None:
    """Label the layers of a bare encoder on the x axis, with at most about `max_labels` labels."""
    depths = [site_depth(site) for site in sites]
    shown = depths[:: 1 + len(depths) // max_labels]
    ax.set_xticks(shown, [str(depth) for depth in shown], **kwargs)
    ax.set_xlabel("layer")


def spread_labels(figure: Figure, axes: Sequence[Axes]) -> None:
    """Move annotations that overlap others of their axes upwards."""
    figure.draw_without_rendering()
    for ax in axes:
        placed: list[Bbox] = []
        for text in sorted(ax.texts, key=lambda text: text.xy[1]):
            box = text.get_window_extent()
            x, y = text.xyann
            for other in placed:
                if box.overlaps(other):
                    box = box.translated(0, other.y1 - box.y0 + 1)
            text.xyann = (x, y + (box.y0 - text.get_window_extent().y0) * 72 / figure.dpi)
            placed.append(box)


def curves(
    ax: Axes,
    table: Rows,
    looks: Looks,
    x: str = "depth",
    y: str = "value",
    by: str = "curve",
    band: tuple[str, str] = ("low", "high"),
    scale: float = 1,
) -> None:
    """Draw a value by site or layer: a line or points for each group of rows, and the band of its intervals.

    Args:
        ax: Where to draw.
        table: A row for each point.
        looks: Properties of the line of each group, by its name, which is its label unless they have another. "band"
            is True for a group whose intervals are drawn.
        x: Column of the position.
        y: Column of the value.
        by: Column of the group's name.
        band: Columns of the lower and the upper bound.
        scale: What values and bounds are multiplied with: 100 for percent.
    """
    for name, look in looks.items():
        rows = [row for row in table if row[by] == name]
        if not rows:
            continue
        at = [row[x] for row in rows]
        line = {"lw": 1.6, "label": name} | {k: v for k, v in look.items() if k != "band"}
        ax.plot(at, [scale * row[y] for row in rows], **line)
        if look.get("band"):
            low, high = ([scale * row[bound] for row in rows] for bound in band)
            ax.fill_between(
                at,
                low,
                high,
                color=look["color"],
                alpha=0.12,
                lw=0,
            )
