"""The figure of a study: a metric by site, each trained model in its own colour."""

from itertools import compress

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
    shown = table[table["site"].isin(sites)]
    shown = shown.assign(place=shown["site"].map(sites.index))
    has_seeds = table["seed"].nunique() > 1
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        if run["weights"] not in ("trained", "blank"):
            rows = shown[shown["run"] == run["run"]]
            axes.plot(rows["place"], rows["value"], marker="o", ms=3, color="lightgrey", zorder=1)
    for run in trained:
        rows = shown[shown["run"] == run["run"]]
        kind = kinds.index((run["model"], run["mask"]))
        colour = COLOURS[kind % len(COLOURS)]
        line = {"solved": "-", "trained": "--"}[run["probes"]]
        words = [run["model"], run["mask"], f"{run['probes']} probes", f"seed {run['seed']}"]
        is_said = [len(models) > 1, run["model"] not in encoders, True, has_seeds]
        label = ", ".join(compress(words, is_said))
        axes.fill_between(rows["place"], rows["low"], rows["high"], color=colour, alpha=0.12)
        look = {"color": colour, "ls": line, "label": label}
        axes.plot(rows["place"], rows["value"], marker="o", ms=3, **look)
    axes.set(ylabel=ylabel, title="grey: random weights")
    axes.set_xticks(range(len(sites)), sites, rotation=60)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _place(site: str) -> tuple[int, int]:
    """Return where a site is from the pixels to the output, of models of any depth."""
    kinds = (is_encoder_layer(site), site == ENCODER, site == ADAPTER, is_layer(site), True)
    number = 0
    if is_encoder_layer(site) or is_layer(site):
        number = layer_number(site)
    return kinds.index(True), number
