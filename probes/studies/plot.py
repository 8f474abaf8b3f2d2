"""The figure of a study: a metric by site, each trained model in its own colour."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.models.sites import (
    ADAPTER,
    ENCODER,
    is_encoder_layer,
    is_layer,
    is_on_main_path,
    layer_number,
)
from probes.report.charts import COLOURS


def plot_table(
    table: pd.DataFrame, ylabel: str, order: tuple[str, ...], encoders: set[str]
) -> Figure:
    """Draw the trained models of a table with their intervals, and the random ones in grey.

    Each model has a colour for each of its masks.

    Args:
        table: Rows of :meth:`Study.table` of one metric and task.
        ylabel: Name of the metric.
        order: Names of the models, first those that come first; others follow in the order of the table.
        encoders: Names of the models without an LLM, whose mask is not named.
    """
    runs = table.drop_duplicates("run").to_dict("records")
    trained = [run for run in runs if run["weights"] == "trained"]
    names = [run["model"] for run in trained]
    models = [name for name in order if name in names]
    models = [*dict.fromkeys(models + names)]
    trained.sort(key=lambda run: models.index(run["model"]))
    kinds = [*dict.fromkeys((run["model"], run["mask"]) for run in trained)]
    sites = sorted(filter(is_on_main_path, table["site"].unique()), key=_place)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        if run["weights"] != "trained":
            places, rows = _curve(run, table, sites)
            axes.plot(places, rows["value"], marker="o", ms=3, color="lightgrey", zorder=1)
    for run in trained:
        places, rows = _curve(run, table, sites)
        kind = kinds.index((run["model"], run["mask"]))
        colour = COLOURS[kind % len(COLOURS)]
        line = {"solved": "-", "trained": "--"}[run["probes"]]
        label = [f"{run['probes']} probes"]
        if run["model"] not in encoders:
            label.insert(0, run["mask"])
        if len(models) > 1:
            label.insert(0, run["model"])
        if table["seed"].nunique() > 1:
            label.append(f"seed {run['seed']}")
        axes.fill_between(places, rows["low"], rows["high"], color=colour, alpha=0.12)
        axes.plot(
            places, rows["value"], marker="o", ms=3, color=colour, ls=line, label=", ".join(label)
        )
    axes.set(ylabel=ylabel, title="grey: random weights")
    axes.set_xticks(range(len(sites)), sites, rotation=60)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _curve(
    run: dict[str, Any], table: pd.DataFrame, sites: list[str]
) -> tuple[pd.Series, pd.DataFrame]:
    """Return the places of a run's sites on the axis, and the rows of its values there."""
    rows = table[(table["run"] == run["run"]) & table["site"].isin(sites)]
    return rows["site"].map(sites.index), rows


def _place(site: str) -> tuple[int, int]:
    """Return where a site is from the pixels to the output, of models of any depth."""
    kinds = (is_encoder_layer(site), site == ENCODER, site == ADAPTER, is_layer(site), True)
    number = 0
    if is_encoder_layer(site) or is_layer(site):
        number = layer_number(site)
    return kinds.index(True), number
