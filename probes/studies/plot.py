"""The figure of a study: a metric by site, each trained model in its own colour."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.analyses.style import COLOURS, curves, mask_colour
from probes.models.sites import is_on_main_path

RANDOM = {
    "color": "lightgrey",
    "label": None,
    "zorder": 1,
}


def plot_table(
    table: pd.DataFrame,
    ylabel: str,
    order: tuple[str, ...],
    encoders: set[str],
) -> Figure:
    """Draw the trained models of a table with their intervals, and the random ones in grey.

    Several models have a colour each; the masks of one model have those of masks.

    Args:
        table: Rows of :meth:`Study.table` of one metric and task.
        ylabel: Name of the metric.
        order: Names of the models, first those that come first; others follow in the order of the table.
        encoders: Names of the models without an LLM, whose mask is not named.
    """
    runs = table.drop_duplicates("run").to_dict("records")
    found = [run["model"] for run in runs if run["weights"] == "trained"]
    models = list(dict.fromkeys([*(name for name in order if name in found), *found]))
    trained = [run for run in runs if run["weights"] == "trained"]
    trained.sort(key=lambda run: models.index(run["model"]))
    looks = {run["run"]: RANDOM for run in runs if run["weights"] != "trained"}
    looks |= {run["run"]: _look(run, models, run["model"] in encoders) for run in trained}
    looks = {name: look | {"marker": "o", "ms": 3} for name, look in looks.items()}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in table.to_dict("records") if is_on_main_path(row["site"])]
    curves(axes, rows, looks, x="site", by="run")
    axes.set(ylabel=ylabel, title="grey: random weights")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
    return figure


def _look(run: dict[str, Any], models: list[str], is_encoder: bool) -> dict[str, Any]:
    """Return how the curve of a trained model is drawn."""
    several = len(models) > 1
    colour = COLOURS[models.index(run["model"]) % len(COLOURS)]
    if not (several or is_encoder):
        colour = mask_colour(run["mask"])
    words = [run["model"]] * several
    words += [] if is_encoder else [run["mask"]]
    return {
        "color": colour,
        "label": ", ".join([*words, f"{run['probes']} probes"]),
        "band": True,
        "ls": "-" if run["probes"] == "solved" else "--",
    }
