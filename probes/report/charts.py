"""Places of charts (probes/analyses/charts.py) in the SVG of page.html.j2, and their drawings by matplotlib for PDF."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from matplotlib.figure import Figure as Drawing

from probes.analyses.charts import Chart, Curve, Figure, Grid, Point

PANEL = (252, 156)
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25, 50, 100)
LEAST_STEP = 5  # of an axis in per cent or points
COLOURS = ("#0b5fc1", "#ad6515", "#351869", "#922d20", "#368dbf", "#61091a")
RANDOM = "#d5dadf"
GREY = "#5f6a75"
ENDS = ("low", "high")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ebeef1",
    "pdf.fonttype": 42,  # TrueType; journals reject Type 3
}
LINES = {"dashed": "--", "dotted": ":", "dots": ""}
MARKS = {"circle": "o", "causal": "^", "bidirectional": "s"}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, about `most`."""
    step = next((s for s in STEPS if (high - low) / s <= most), STEPS[-1])
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 6) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def span_of(values: Iterable[float], zero: bool = False, least: float = 0) -> tuple[float, float]:
    """Return ends of an axis around values, and with `zero` around 0: multiples of a round number from `least` on."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    values += [0.0] if zero or not values else []
    low, high = min(values), max(values)
    wide = high - low
    step = next((s for s in STEPS if s >= least and 8 * s >= wide), STEPS[-1])
    margin = step / 10
    ends = math.floor((low - margin) / step) * step, math.ceil((high + margin) / step) * step
    return ends if zero or low < 0 else (max(0.0, ends[0]), ends[1])


def chart_span(charts: Iterable[Chart]) -> tuple[float, float]:
    """Return the ends of the axis that charts share."""
    charts = list(charts)
    curves = [curve for x in charts for curve in (*x.curves, *map(Curve, x.grey))]
    points = [point for curve in curves for point in curve.points]
    scale = charts[0].scale
    values = [scale * x for p in points for x in (p.value, p.low, p.high) if x is not None]
    least = LEAST_STEP if scale == 100 else 0
    return span_of(values, any(chart.signed for chart in charts), least)


class Frame:
    """Places of values in a picture of `width` x `height` px; margins are left, right, top, bottom."""

    def __init__(
        self,
        chart: Chart,
        size: tuple[float, float] = PANEL,
        margins: Sequence[float] = (30, 10, 8, 24),
    ):
        self.chart = chart
        self.names = chart.ticks
        self.width, self.height = size
        self.left, right, self.top, bottom = margins
        self.right, self.base = self.width - right, self.height - bottom
        self.low, self.high = chart.span or chart_span([chart])
        places = [*chart.ticks, *(p.x for curve in chart.curves for p in curve.points)]
        self.first, self.last = min(places, default=0), max(places, default=1)
        self.step = (self.right - self.left) / (self.last - self.first + 1)
        self.dot = 2.4 if self.step < 14 else 3.4  # radius of a point

    def x(self, place: float) -> float:
        """Return the place of a site."""
        return round(self.left + (place - self.first + 0.5) * self.step, 1)

    def y(self, value: float) -> float:
        """Return the height of a value."""
        share = (self.chart.scale * value - self.low) / (self.high - self.low)
        return round(self.base - min(1.0, max(0.0, share)) * (self.base - self.top), 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """Return a line through places and values."""
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)

    def line(self, points: Sequence[Point]) -> str:
        """Return the line of points."""
        return self.path((p.x, p.value) for p in points)

    def area(self, points: Sequence[Point]) -> str:
        """Return the outline of the intervals of points."""
        back = [(p.x, p.low) for p in reversed(points)]
        return self.path([*((p.x, p.high) for p in points), *back]) + "Z"

    def labels(self) -> Iterator[tuple[float, str]]:
        """Yield the places and texts of the ticks that do not run into the one before."""
        return self.labels_of(self.names)

    def labels_of(self, names: Mapping[float, str]) -> Iterator[tuple[float, str]]:
        """Yield the places and texts of those names of ticks that do not run into the one before."""
        last = -math.inf
        for place, name in names.items():
            half = 3.2 * len(name) + 2
            if name and self.x(place) - half > last:
                yield self.x(place), name
                last = self.x(place) + half


def known(curve: Curve) -> list[Point]:
    """Return the points of a curve that have a value."""
    return [p for p in curve.points if p.value is not None and math.isfinite(p.value)]


def colour_class(colour: str | int) -> str:
    """Return the class of a colour; from the seventh on, models share grey."""
    return colour if isinstance(colour, str) else f"m{colour}" if colour < len(COLOURS) else "mx"


def pdf_of(figure: Figure) -> Drawing:
    """Return a figure of charts or pictures for a PDF file."""
    if figure.pictures:
        return _pictures(figure)
    columns = min(4, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    size = (7.2, 4.0) if columns == 1 else (2.7 * columns, 2.4 * rows)
    drawing = Drawing(figsize=size, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(figure.panels) :]:
        ax.set_visible(False)
    for ax, chart in zip(axes, figure.panels, strict=False):
        ax.set(title=chart.title)
        if isinstance(chart, Grid):
            ax.imshow(chart.values, cmap="PuOr" if chart.signed else "Blues")
            ax.axis("off")
            continue
        for points in chart.grey:
            if len(points) == 1:
                points = [points[0]._replace(x=points[0].x + shift) for shift in (-0.2, 0.2)]
            low, high = ([chart.scale * getattr(p, end) for p in points] for end in ENDS)
            ax.fill_between([p.x for p in points], low, high, color=RANDOM, lw=0)
        for curve in chart.curves:
            _plot(ax, curve, chart.scale)
        if chart.signed:
            ax.axhline(0, color="#8a949e", lw=0.8)
        shown = {x: name for x, name in chart.ticks.items() if name}
        thin = 1 + len(shown) // 14
        ax.set_xticks([*shown][::thin], [*shown.values()][::thin])
        ax.set(ylabel=chart.unit, ylim=chart.span)
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        drawing.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawing


def _plot(ax, curve: Curve, scale: float) -> None:
    """Draw a curve by matplotlib."""
    points = known(curve)
    colour = {"ink": "black", "grey": GREY}.get(curve.colour, curve.colour)
    colour = COLOURS[colour % len(COLOURS)] if isinstance(colour, int) else colour
    x = [p.x for p in points]
    ax.plot(
        x,
        [scale * p.value for p in points],
        color=RANDOM if curve.style == "thin" else colour,
        ls=LINES.get(curve.style, "-"),
        marker=MARKS.get(curve.mark),
        ms=4,
        label=curve.name or None,
    )
    if points and points[0].low is not None:
        low, high = ([scale * getattr(p, end) for p in points] for end in ENDS)
        if curve.band:
            ax.fill_between(x, low, high, color=colour, alpha=0.15)
        elif curve.style == "dots":
            ax.vlines(x, low, high, color=colour)


def _pictures(figure: Figure) -> Drawing:
    """Return rows of pictures by matplotlib."""
    rows, columns = len(figure.pictures), len(figure.columns)
    size = (1.25 * columns + 0.6, 1.35 * rows + 0.4)
    drawing = Drawing(figsize=size, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False)
    pictures = [picture for row in figure.pictures for picture in row.pictures]
    for ax, picture in zip(axes.flat, pictures, strict=True):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if picture is not None:
            ax.imshow(picture, interpolation="nearest")
    for ax, title in zip(axes[0], figure.columns, strict=True):
        ax.set_title(title, fontsize=8)
    for ax, row in zip(axes[:, 0], figure.pictures, strict=True):
        ax.set_ylabel(row.name, fontsize=8)
    return drawing
