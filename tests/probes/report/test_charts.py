"""Charts, names and sentences of the page, by rule."""

import base64
import io
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probes.analyses.charts import Chart, Curve, Point
from probes.report import words
from probes.report.charts import Frame
from probes.report.pictures import map_uri, right_share

POINTS = [
    Point(i, value, value - 0.02, value + 0.02, f"<{i}>")
    for i, value in enumerate((0.3, 0.4, 0.35))
]
TICKS = {0: "adapter", 1: "1", 2: "2"}
DRAWS_PICTURES = True


def test_points_stand_where_their_values_are():
    chart = Chart([Curve(POINTS)], TICKS, "mIoU", span=(0, 100))
    frame = Frame(chart, (300, 200), (50, 50, 0, 0))
    assert [frame.x(i) for i in range(3)] == pytest.approx([83.3, 150, 216.7])
    assert [frame.y(p.value) for p in POINTS] == pytest.approx([140, 120, 130])
    assert frame.line(POINTS) == "M83.3 140.0L150.0 120.0L216.7 130.0"
    assert frame.area(POINTS[:2]) == "M83.3 136.0L150.0 116.0L150.0 124.0L83.3 144.0Z"
    assert [*frame.labels()] == [(83.3, "adapter"), (150.0, "1"), (216.7, "2")]


def test_each_number_is_written_once_for_all_views():
    """Scores in per cent, differences with a sign, other tasks in their unit; nothing where there is no number."""
    table = pd.DataFrame(
        {
            "task": ["segmentation", "segmentation", "depth"],
            "value": [0.444, math.nan, 0.5],
            "low": [0.4, math.nan, 0.4],
            "high": [0.5, math.nan, 0.6],
            "minus_random": [0.13, -0.012, -0.5],
            "minus_low": [0.1, -0.02, math.nan],
            "minus_high": [0.24, 0.001, math.nan],
        }
    )
    sites = words.shown(table)
    assert [*sites["value_text"]] == ["44.4", "", "0.5"]
    assert [*sites["value_ci"]] == ["[40.0, 50.0]", "", "[0.4, 0.6]"]
    assert [*sites["minus_random_text"]] == ["+13.0", "−1.2", "−0.5"]
    assert [*sites["minus_random_ci"]] == ["[10.0, 24.0]", "[−2.0, 0.1]", ""]
    assert [*sites["arrow"]] == ["▲", "", ""]
    claims = words.shown(table.assign(claim="recovery"))
    assert [*claims["value_text"]] == ["+44.4", "", "+0.5"]
    assert words.number(-0.0001, has_sign=True) == "0.0"
    assert words.p_value(0.0000001) == "< 0.001"


def test_a_map_shows_what_is_wrong_in_full_colour():
    truth = np.array([[0, 1], [255, 1]], np.uint8)
    read = np.array([[0, 0], [1, 1]], np.uint8)
    palette = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)
    assert right_share(read, truth) == "67%"
    content = base64.b64decode(map_uri(read, palette, truth).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert pixels[..., 3].tolist() == [[56, 255], [0, 56]]
    assert pixels[0, 1, :3].tolist() == [10, 20, 30]
