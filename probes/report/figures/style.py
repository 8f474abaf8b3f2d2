"""What all figures share: colours, sizes, names of sites on an axis.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines also differ in dash and marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.models.frozen_mllm import ADAPTER, ENCODER
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
    "svg.hashsalt": "llava-bidir",  # the same figure gives the same bytes
}


class FigureData(NamedTuple):
    """A figure and the numbers that it shows."""

    figure: Figure
    rows: Rows


@dataclass
class ReportFigure:
    """A figure of the page: its file name, section, title, what to look for in it, and its width.

    Widths: "half" of the page, "full", or "wide": full, and on a phone to be scrolled.
    """

    name: str
    section: str
    title: str
    caption: str
    drawn: FigureData
    width: str = "full"


def colour_of(mask: str) -> str:
    return MASK_COLOURS.get(mask, "#009E73")


def new_axes(width: float, height: float, columns: int = 1, **kwargs) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def panels(count: int, height: float = 2.7, columns: int = 3, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of at most `columns`; `height` of a row, in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.6, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).flat
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def position(site: str) -> int:
    """Where a site lies on the axis of depth: the encoder at -1, the adapter at 0, layer l at l."""
    return {ENCODER: -1, ADAPTER: 0}[site] if site in (ENCODER, ADAPTER) else int(site.removeprefix("layer_"))


def label_sites(ax: Axes, sites: list[str], most: int = 12, at: Sequence[int] | None = None, **kwargs) -> None:
    """Names sites on the x axis, of a deep model some, so that names do not run into each other.

    Args:
        ax: Whose axis.
        sites: In their order.
        most: About as many names are shown.
        at: Where the sites lie; by default at their depth.
    """
    deep = len(sites) > most + 2
    if deep:  # the adapter's name would touch the encoder's
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if len(sites) / step <= most)
        names = {ENCODER: "enc."} | {s: str(position(s)) for s in sites if position(s) > 0 and position(s) % step == 0}
    else:
        names = {s: {ENCODER: "enc.", ADAPTER: "adapt."}.get(s) or str(position(s)) for s in sites}
    where = dict(zip(sites, map(position, sites) if at is None else at, strict=True))
    shown = [site for site in sites if site in names]
    ax.set_xticks([where[site] for site in shown], [names[site] for site in shown], **kwargs)
    ax.set_xlabel("encoder, adapter (0), LLM layer" if deep else "encoder, adapter, LLM layer")


def score_row(entry: dict[str, Any]) -> dict[str, Any]:
    """A site's scores as a row of a table."""
    (low, high), keys = entry["miou_ci95"], ("site", "dim", "miou", "pacc", "best_epoch")
    return {key: entry[key] for key in keys} | {"miou_low": low, "miou_high": high}
