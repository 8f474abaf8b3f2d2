"""One function draws a value by site of all figures, from a table."""

import numpy as np
from matplotlib.figure import Figure

from probes.analyses.style import curves

TABLE = [
    {"curve": "a", "depth": 0, "value": 0.1, "low": 0.05, "high": 0.2},
    {"curve": "b", "depth": 0, "value": 0.3, "low": 0.2, "high": 0.4},
    {"curve": "a", "depth": 2, "value": 0.4, "low": 0.35, "high": 0.5},
]


def test_each_group_of_the_table_is_a_line_with_its_band():
    ax = Figure().subplots()
    looks = {"a": {"color": "red", "band": True}, "b": {"color": "blue", "label": "B"}, "c": {}}
    curves(ax, TABLE, looks, scale=100)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn == {"a": [[0, 10], [2, 40]], "B": [[0, 30]]}, "a group without rows has no line"
    (band,) = ax.collections
    corners = {tuple(corner) for corner in np.round(band.get_paths()[0].vertices, 6)}
    assert corners == {(0, 5), (0, 20), (2, 35), (2, 50)}, "of the group whose look has one"
