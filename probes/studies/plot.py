"""The figure of a study: a metric by site, each trained model in its own colour."""

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
    found = [run["model"] for run in trained]
    models = [*dict.fromkeys([*(name for name in order if name in found), *found])]
    trained.sort(key=lambda run: models.index(run["model"]))
    kinds = [*dict.fromkeys((run["model"], run["mask"]) for run in trained)]
    sites = sorted(filter(is_on_main_path, table["site"].unique()), key=_place)
    shown = table[table["site"].isin(sites)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in [*(run for run in runs if run["weights"] != "trained"), *trained]:
        rows = shown[shown["run"] == run["run"]]
        places = rows["site"].map(sites.index)
        look = {"color": "lightgrey", "zorder": 1}
        if run in trained:
            kind = kinds.index((run["model"], run["mask"]))
            words = [run["model"]] * (len(models) > 1)
            words += [run["mask"]] * (run["model"] not in encoders)
            words += [f"{run['probes']} probes"]
            words += [f"seed {run['seed']}"] * (table["seed"].nunique() > 1)
            look = {
                "color": COLOURS[kind % len(COLOURS)],
                "label": ", ".join(words),
                "ls": "-" if run["probes"] == "solved" else "--",
            }
            axes.fill_between(places, rows["low"], rows["high"], color=look["color"], alpha=0.12)
        axes.plot(places, rows["value"], marker="o", ms=3, **look)
    axes.set(ylabel=ylabel, title="grey: random weights")
    axes.set_xticks(range(len(sites)), sites, rotation=60)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _place(site: str) -> tuple[int, int]:
    """Return where a site is from the pixels to the output, of models of any depth."""
    kinds = (is_encoder_layer(site), site == ENCODER, site == ADAPTER, is_layer(site))
    is_numbered = is_encoder_layer(site) or is_layer(site)
    return [*kinds, True].index(True), layer_number(site) if is_numbered else 0
