"""Places of charts (probes/analyses/charts.py) in the SVG of page.html.j2, and their drawings by matplotlib for PDF."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from probes.analyses.charts import Chart, Curve, Figure, Grid, Point

from .words import site_name

PANEL = (252, 156)
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25, 50, 100)
LEAST_STEP = 5  # of an axis in per cent or points
COLOURS = ("#0b5fc1", "#ad6515", "#351869", "#922d20", "#368dbf", "#61091a")
RANDOM = "#d5dadf"
GREY = "#5f6a75"
NAMED_COLOURS = {"ink": "black", "grey": GREY}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ebeef1",
    "pdf.fonttype": 42,  # TrueType; journals reject Type 3
}
LINES = {"dashed": "--", "dotted": ":", "dots": ""}
MARKS = {"": "", "causal": "^", "bidirectional": "s"}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, about `most`."""
    step = _first_step(lambda step: (high - low) / step <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * i, 6) for i in range(first, last + 1)]


def _first_step(is_enough: Callable[[float], bool]) -> float:
    """Return the first of the round steps that is enough, else the largest."""
    return next(filter(is_enough, STEPS), STEPS[-1])


def span_of(
    values: Iterable[float | None], factor: float, zero: bool = False
) -> tuple[float, float]:
    """Return ends of an axis around values times `factor`, and with `zero` around 0: multiples of a round number."""
    values = [factor * value for value in values if _is_number(value)]
    least = 0
    if factor == 100:
        least = LEAST_STEP
    if zero or not values:
        values.append(0.0)
    low = min(values)
    high = max(values)
    step = _first_step(lambda step: step >= least and 8 * step >= high - low)
    margin = step / 10
    start = math.floor((low - margin) / step) * step
    end = math.ceil((high + margin) / step) * step
    if zero or low < 0:
        return start, end
    return max(0.0, start), end


def chart_span(charts: Iterable[Chart]) -> tuple[float, float]:
    """Return the ends of the axis that charts share."""
    charts = list(charts)
    values: list[float | None] = []
    for chart in charts:
        of_curves = [curve.points for curve in chart.curves]
        for point in chain(*of_curves, *chart.grey):
            values += [point.value, point.low, point.high]
    has_zero = any(chart.signed for chart in charts)
    return span_of(values, charts[0].scale, zero=has_zero)


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
        self.right = self.width - right
        self.base = self.height - bottom
        self.low, self.high = chart.span or chart_span([chart])
        x = list(chart.ticks)
        for curve in chart.curves:
            x += [point.x for point in curve.points]
        self.first = min(x, default=0)
        self.last = max(x, default=1)
        places = self.last - self.first + 1
        width = self.right - self.left
        self.step = width / places
        self.dot = 3.4  # radius of a point
        if self.step < 14:
            self.dot = 2.4

    def x(self, place: float) -> float:
        """Return the place of a site."""
        steps = place - self.first + 0.5
        return round(self.left + steps * self.step, 1)

    def y(self, value: float) -> float:
        """Return the height of a value."""
        span = self.high - self.low
        share = (self.chart.scale * value - self.low) / span
        share = min(1.0, max(0.0, share))
        height = self.base - self.top
        return round(self.base - share * height, 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """Return a line through places and values."""
        corners = [f"{self.x(x)} {self.y(y)}" for x, y in points]
        return f"M{'L'.join(corners)}"

    def line(self, points: Sequence[Point]) -> str:
        """Return the line of points."""
        return self.path((point.x, point.value) for point in points)

    def area(self, points: Sequence[Point]) -> str:
        """Return the outline of the intervals of points."""
        corners = [(point.x, point.high) for point in points]
        for point in reversed(points):
            corners.append((point.x, point.low))
        outline = self.path(corners)
        return f"{outline}Z"

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


def defined_points(curve: Curve) -> list[Point]:
    """Return the points of a curve that have a value."""
    return [point for point in curve.points if _is_number(point.value)]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def colour_class(colour: str | int) -> str:
    """Return the class of a colour; from the seventh on, models share grey."""
    if isinstance(colour, str):
        return colour
    if colour < len(COLOURS):
        return f"m{colour}"
    return "mx"


# ------------------------------------------------------------------------------------------------ PDF
def pdf_of(figure: Figure) -> Drawing:
    """Return a figure of charts or pictures for a PDF file."""
    if figure.pictures:
        return _pictures(figure)
    columns = min(4, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    size = (2.7 * columns, 2.4 * rows)
    if columns == 1:
        size = (7.2, 4.0)
    drawing = Drawing(figsize=size, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(figure.panels) :]:
        ax.set_visible(False)
    for ax, chart in zip(axes, figure.panels, strict=False):
        ax.set(title=chart.title)
        if isinstance(chart, Grid):
            _draw_grid(ax, chart)
        else:
            _draw_chart(ax, chart)
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        drawing.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawing


def _draw_grid(ax: Axes, grid: Grid) -> None:
    """Draw the values of patches."""
    colours = "Blues"
    if grid.signed:
        colours = "PuOr"
    ax.imshow(grid.values, cmap=colours)
    ax.axis("off")


def _draw_chart(ax: Axes, chart: Chart) -> None:
    """Draw ranges of random models, curves and axes."""
    for points in chart.grey:
        if len(points) == 1:
            (point,) = points
            points = [point._replace(x=point.x + shift) for shift in (-0.2, 0.2)]
        x = [point.x for point in points]
        low, high = _ends(points, chart.scale)
        ax.fill_between(x, low, high, color=RANDOM, lw=0)
    for curve in chart.curves:
        _draw_curve(ax, curve, chart.scale)
    if chart.signed:
        ax.axhline(0, color="#8a949e", lw=0.8)
    named = {x: name for x, name in chart.ticks.items() if name}
    thin = 1 + len(named) // 14
    places = list(named)[::thin]
    ax.set_xticks(places, [named[place] for place in places])
    ax.set(ylabel=chart.unit, ylim=chart.span)


def _ends(points: Sequence[Point], scale: float) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends of the intervals of points."""
    return [scale * point.low for point in points], [scale * point.high for point in points]


def _draw_curve(ax: Axes, curve: Curve, scale: float) -> None:
    """Draw a line, and bands or bars of its intervals."""
    points = defined_points(curve)
    colour = NAMED_COLOURS.get(curve.colour, curve.colour)
    if isinstance(colour, int):
        colour = COLOURS[colour % len(COLOURS)]
    colour_of_line = colour
    if curve.style == "thin":
        colour_of_line = RANDOM
    x = [point.x for point in points]
    ax.plot(
        x,
        [scale * point.value for point in points],
        color=colour_of_line,
        ls=LINES.get(curve.style, "-"),
        marker=MARKS.get(curve.mark, "o"),
        ms=4,
        label=curve.name or None,
    )
    if not points or points[0].low is None:
        return
    low, high = _ends(points, scale)
    if curve.band:
        ax.fill_between(x, low, high, color=colour, alpha=0.15)
    elif curve.style == "dots":
        ax.vlines(x, low, high, color=colour)


def _pictures(figure: Figure) -> Drawing:
    """Return rows of pictures by matplotlib."""
    rows = len(figure.pictures)
    columns = len(figure.columns)
    size = (1.25 * columns + 0.6, 1.35 * rows + 0.4)
    drawing = Drawing(figsize=size, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False)
    for axes_of_row, row in zip(axes, figure.pictures, strict=True):
        axes_of_row[0].set_ylabel(row.name, fontsize=8)
        for ax, picture in zip(axes_of_row, row.pictures, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if picture is not None:
                ax.imshow(picture, interpolation="nearest")
    for ax, name in zip(axes[0], figure.columns, strict=True):
        ax.set_title(site_name(name), fontsize=8)
    return drawing
