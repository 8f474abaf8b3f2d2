"""Charts, names and sentences of the page, by rule."""

import base64
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from probes.analyses.charts import Chart, Curve, Point
from probes.report import words
from probes.report.charts import Frame
from probes.report.pictures import classes_drawn, map_uri, right_share

POINTS = [
    Point(x=i, value=value, low=value - 0.02, high=value + 0.02, title=f"<{i}>")
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


@pytest.mark.parametrize(
    ("value", "task", "text", "signed"),
    [
        (0.444, "segmentation", "44.4", "+44.4"),
        (-0.012, "segmentation", "−1.2", "−1.2"),
        (-0.0001, "segmentation", "0.0", "0.0"),
        (0.5, "depth", "0.5", "+0.5"),
        (math.nan, "depth", "", ""),
    ],
)
def test_numbers_are_in_per_cent_or_in_the_unit_of_another_task(value, task, text, signed):
    assert words.number(value, task) == text
    assert words.number(value, task, has_sign=True) == signed
    ends = words.interval(value, 1.0, task)
    assert ends == (text and f"[{text}, {'100.0' if task == 'segmentation' else '1'}]")


def test_a_map_shows_what_is_wrong_in_full_colour():
    truth = np.array([[0, 1], [255, 1]], np.uint8)
    read = np.array([[0, 0], [1, 1]], np.uint8)
    palette = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)
    assert right_share(read, truth) == "67%"
    content = base64.b64decode(map_uri(read, palette, truth).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert pixels[..., 3].tolist() == [[255, 255], [0, 255]]
    assert pixels[0, 1, :3].tolist() == [10, 20, 30]
    assert pixels[0, 0, :3].tolist() == [194, 196, 199]


def test_a_legend_has_every_class_that_a_picture_of_the_photo_shows():
    """Of what is read at the sites shown, too: the most frequent mistake was missing."""
    pictures = {
        "data": "x",
        "sites": np.array(["adapter", "layer_01"]),
        "easy/index": np.array(0),
        "easy/truth": np.array([[1, 255, 255]], np.uint8),
        "easy/maps": np.array([[[7, 7, 1]], [[7, 0, 3]]], np.uint8),
    }
    names = {"adapter": "adapter", "layer_01": "layer_01"}
    lead = SimpleNamespace(pictures=pictures, own=names, model=SimpleNamespace(key="A"))
    assert classes_drawn([lead], lead=lead, photo="easy", sites=[["adapter"]]) == [1, 7]
    sites = ["adapter", "layer_01", "layer_02"]
    assert classes_drawn([lead], lead=lead, photo="easy", sites=[sites]) == [7, 1, 0, 3]
