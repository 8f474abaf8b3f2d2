"""Charts, names and sentences of the page, by rule."""

import base64
import io
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probes.analyses.charts import Chart, Curve, Figure, Grid, PictureRow, Point
from probes.report import words
from probes.report.charts import STYLE, Frame, pdf_of, span_of, ticks
from probes.report.hero import dodge
from probes.report.pictures import map_uri, right_share
from probes.report.readings import in_order

POINTS = [
    Point(i, value, value - 0.02, value + 0.02, f"<{i}>")
    for i, value in enumerate((0.3, 0.4, 0.35))
]
TICKS = {0: "adapter", 1: "1", 2: "2"}
DRAWS_PICTURES = True


@pytest.mark.parametrize(
    ("values", "zero", "least", "expected"),
    [
        ([31.0, 44.0], False, 5, (30, 45)),
        ([45.1, 45.4], False, 5, (40, 50)),
        ([0.4, 12.0], False, 5, (0, 15)),
        ([-2.6, 38.7], True, 5, (-10, 40)),
        ([0.031, 0.044], False, 0, (0.03, 0.046)),
        ([math.nan], True, 0, (-0.001, 0.001)),
    ],
)
def test_an_axis_ends_at_round_numbers_around_its_values(
    values,
    zero,
    least,
    expected,
):
    low, high = span_of(values, zero, least)
    assert (low, high) == pytest.approx(expected)
    shown = ticks(low, high)
    assert 2 <= len(shown) <= 7 and low <= min(shown) and max(shown) <= high


def test_points_stand_where_their_values_are():
    chart = Chart([Curve(POINTS)], TICKS, "mIoU", span=(0, 100))
    frame = Frame(chart, (300, 200), (50, 50, 0, 0))
    assert [frame.x(i) for i in range(3)] == pytest.approx([83.3, 150, 216.7])
    assert [frame.y(p.value) for p in POINTS] == pytest.approx([140, 120, 130])
    assert frame.line(POINTS) == "M83.3 140.0L150.0 120.0L216.7 130.0"
    assert frame.area(POINTS[:2]) == "M83.3 136.0L150.0 116.0L150.0 124.0L83.3 144.0Z"
    assert [*frame.labels()] == [(83.3, "adapter"), (150.0, "1"), (216.7, "2")]


def test_ticks_that_would_run_into_others_are_left_out():
    ticks = {i: f"layer {i}" for i in range(40)}
    places = [x for x, _ in Frame(Chart([], ticks)).labels()]
    assert 2 < len(places) < 10 and (np.diff(places) > 40).all()


def test_figures_have_fonts_that_journals_accept(tmp_path):
    curve = Curve(POINTS, "name", "#112233", "dots", "circle")
    panels = [Chart([curve], TICKS, grey=[POINTS]), Grid(np.eye(3), "patches", signed=True)]
    pictures = [PictureRow("row", [np.zeros((4, 4, 3), np.uint8), None])]
    for more in ({"panels": panels}, {"columns": ["x", "y"], "pictures": pictures}):
        with mpl.rc_context(STYLE):
            pdf_of(Figure("a", "", "", **more)).savefig(tmp_path / "a.pdf")
        written = (tmp_path / "a.pdf").read_bytes()
        assert written.startswith(b"%PDF") and b"/Type3" not in written


@pytest.mark.parametrize("heights", [[10, 11, 12], [5, 50, 6], [3, 3]])
def test_labels_are_moved_apart_in_their_order(heights):
    moved = dodge(heights, 15)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(moved)[order]) >= 14.9).all()
    assert np.mean(moved) == pytest.approx(np.mean(heights))


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


@pytest.mark.parametrize(
    ("site", "name", "at", "tick"),
    [
        ("layer_04", "layer 4", "layer 4", "4"),
        ("encoder_08", "encoder layer 8", "encoder layer 8", "8"),
        ("adapter", "adapter", "the adapter", "ad"),
        ("layer_00", "patch embeddings", "the patch embeddings", "0"),
        ("final_norm", "final norm", "the final norm", "norm"),
    ],
)
def test_names_of_sites(
    site,
    name,
    at,
    tick,
):
    assert (words.site_name(site), words.the_site(site), words.site_tick(site)) == (name, at, tick)


def test_sites_are_in_the_order_of_the_forward():
    order = [
        "encoder_02",
        "encoder_10",
        "encoder_norm",
        "encoder",
        "adapter",
        "layer_02",
        "layer_10",
        "final_norm",
    ]
    assert in_order(order[::-1]) == order


def test_a_map_shows_what_is_wrong_in_full_colour():
    truth = np.array([[0, 1], [255, 1]], np.uint8)
    read = np.array([[0, 0], [1, 1]], np.uint8)
    palette = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)
    assert right_share(read, truth) == "67%"
    content = base64.b64decode(map_uri(read, palette, truth).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert pixels[..., 3].tolist() == [[56, 255], [0, 56]]
    assert pixels[0, 1, :3].tolist() == [10, 20, 30]
