"""What figures of the report are made of: values, not pictures. probes/report/charts.py draws them for page and PDF.

Chart(curves=[Curve([Point(0, 0.4), Point(1, 0.5)])], ticks={0: "adapter", 1: "1"})
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probes.runs.formatting import Rows


class Point(NamedTuple):
    """A point of a curve; `title` is said where the pointer rests."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None
    title: str = ""


class Curve(NamedTuple):
    """Points and how they are drawn.

    Args:
        points: From left to right.
        name: In the legend, "" for none.
        colour: Colour 0 to 5 of a model, "ink", "grey", or "#rrggbb".
        style: "line", "dashed", "dotted", "thin" (of another panel), or "dots": each with its interval.
        mark: "causal" (a triangle), "bidirectional" (a square), or "" for none; all else is a circle.
        band: The intervals are drawn.
    """

    points: Sequence[Point]
    name: str = ""
    colour: str | int = 0
    style: str = "line"
    mark: str = ""
    band: bool = False


class Chart(NamedTuple):
    """A panel.

    Args:
        curves: The last one is on top.
        ticks: Text at the places of the x axis; without any, no axis is drawn.
        title: Above it.
        unit: Name of the y axis.
        grey: Ranges of random models, points with low, high and mean; a single one is drawn as a box.
        span: Ends of the y axis, if panels share it.
        scale: What values are multiplied with: 100 for per cent.
        signed: Values are differences, with a line at 0.
        shaded: Places of the x axis on a pale ground.
    """

    curves: Sequence[Curve]
    ticks: Mapping[float, str]
    title: str = ""
    unit: str = ""
    grey: Sequence[Sequence[Point]] = ()
    span: tuple[float, float] | None = None
    scale: float = 100
    signed: bool = False
    shaded: Sequence[float] = ()


@dataclass(frozen=True)
class Grid:
    """A value for each patch of an image.

    Args:
        values: f[h, w].
        title: Above it.
        unit: What the values are.
        signed: They are differences, pale at 0; else pale at the lowest of all values in `span`.
        span: The lowest and the highest value that colours tell apart, by default those of `values`.
    """

    values: np.ndarray
    title: str = ""
    unit: str = ""
    signed: bool = False
    span: tuple[float, float] | None = None

    @property
    def cells(self) -> list[tuple[float, float]]:
        """Values in raster order, each with the strength of its colour, 0..1."""
        low, high = self.span or (float(np.nanmin(self.values)), float(np.nanmax(self.values)))
        start, most = low, high - low
        if self.signed:
            start, most = 0.0, max(abs(low), abs(high))
        values = np.nan_to_num(self.values, nan=start).ravel()
        strengths = np.clip(np.abs(values - start) / (most or 1), 0, 1).round(2)
        return list(zip(values.tolist(), strengths.tolist(), strict=True))


class PictureRow(NamedTuple):
    """Pictures uint8[H, W, 3] side by side, None for a gap."""

    name: str
    pictures: Sequence[np.ndarray | None]


class Figure(NamedTuple):
    """A figure of the report: panels or rows of pictures.

    Args:
        name: Of its files, without extension.
        title: Its heading.
        caption: What it shows, and what to look for.
        panels: Charts and grids.
        rows: Of its CSV file.
        columns: Titles of the columns of pictures.
        pictures: Rows of pictures.
        shows_rows: The page has them as a table.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Chart | Grid] = ()
    rows: Rows = ()
    columns: Sequence[str] = ()
    pictures: Sequence[PictureRow] = ()
    shows_rows: bool = False


def curves_by_layer(rows: Rows, looks: Mapping[str, Curve], name: str, value: str) -> list[Curve]:
    """Return a curve over the layers for each look: the rows of its `name`, their `value` with "low" and "high"."""
    curves = []
    for wanted, look in looks.items():
        points = []
        for row in rows:
            if row[name] == wanted:
                point = Point(row["layer"], value=row[value], low=row["low"], high=row["high"])
                points.append(point)
        curves.append(look._replace(points=points))
    return curves
