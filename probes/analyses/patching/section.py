"""Figure of activation patching: what replaced states change at other tokens, by layer."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probes.analyses.base import Section
from probes.analyses.style import COLOURS, FigureData, Figures, ReportFigure, curves
from probes.results.formatting import Rows, bounds
from probes.results.study import StudyRuns

TITLES = {"mask": "states under the other mask", "pairs": "states of a picture with the cue"}


def patching_figure(results: dict[str, Any]) -> FigureData:
    """Draw a panel per experiment of patching.json; the CSV file has all groups of patches."""
    experiments = results["experiments"]
    table = effect_rows(results)
    figure = Figure(figsize=(3.6 * len(experiments) + 0.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(experiments), squeeze=False)[0]
    for ax, experiment in zip(panels, experiments, strict=True):
        ax.set(title=TITLES[experiment["experiment"]], xlabel="layer whose states are replaced")
        ax.set_ylabel("change of log-odds at other patches (nats)", fontsize=8)
        ax.axhline(0, color="black", lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown = [entry["set"] for entry in experiment["sets"] if "others" in entry]
        looks = {}
        for name, colour in zip(shown, COLOURS, strict=False):
            look = {
                "color": colour,
                "marker": "o",
                "ms": 3,
            }
            label = "random tokens" if len(shown) == 1 else None
            looks[name, "others"] = look | {"label": name.replace("_", " "), "band": True}
            looks[name, "random"] = look | {"label": label, "ls": ":"}
        points = [
            row | {"curve": (row["set"], row["patches"])}
            for row in table
            if row["experiment"] == experiment["experiment"]
        ]
        curves(ax, points, looks, x="layer")
        if len(shown) == 1:
            total = experiment["total"]["value"]
            ax.axhline(
                total,
                color="#777777",
                ls="--",
                lw=1,
                label="all tokens: the donor",
            )
        elif len(shown) > 1:
            ax.plot([], [], ":", color="#777777", label="as many random tokens")
        ax.legend(fontsize=7)
    return FigureData(figure, table)


def effect_rows(results: dict[str, Any]) -> Rows:
    """Return the effects of patching.json in nats, one row per experiment, set, group of patches and layer."""
    return [
        {
            "experiment": experiment["experiment"],
            "set": entry["set"],
            "patches": group,
            "layer": place["layer"],
        }
        | {"value": place["value"]}
        | bounds(place["ci95"])
        for experiment in results["experiments"]
        for entry in experiment["sets"]
        for group, places in entry.items()
        if group != "set"
        for place in places
    ]


def section(study: StudyRuns) -> Section:
    """Return the section of a study: of its solved runs, else of the main ones."""
    runs = {mask: study.solved.get(mask, run) for mask, run in study.main_runs.items()}
    results = {mask: run.analysis("patching.json") for mask, run in runs.items()}
    return Section([*patching_figures(results)], by_mask={"patching": results})


def patching_figures(by_mask: dict[str, dict[str, Any] | None]) -> Figures:
    """Yield a figure for each patching.json."""
    for mask, patched in by_mask.items():
        if patched:
            yield ReportFigure(
                f"patching_{mask}", f"Replaced states, {mask}",
                "Change of the log-odds of the right class at patches whose own states are not replaced, as read at "
                f"{patched['site'].replace('_', ' ')}, when the states of a set of tokens are replaced at one layer. "
                "Look for the layers from which on a set's states change nothing elsewhere: by then it has passed on "
                "what others take. Dotted: as many random tokens. Exploratory: the paper makes no claim about it. "
                "Bands: 95% intervals over images, for all layers together.",
                patching_figure(patched), "wide",)  # fmt: skip
