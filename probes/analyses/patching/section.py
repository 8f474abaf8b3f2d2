"""Figure of activation patching: what replaced states change at other tokens, by layer."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probes.analyses.base import Section
from probes.analyses.style import COLOURS, FigureData, Figures, ReportFigure, curves
from probes.runs.formatting import Rows, bounds
from probes.runs.study import StudyRuns

from . import GROUPS


def patching_figure(results: dict[str, Any]) -> FigureData:
    """Draw the effects of patching.json; the CSV file has all groups of patches."""
    table = effect_rows(results)
    figure = Figure(figsize=(4.0, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.set(title="states of another image", xlabel="layer whose states are replaced")
    ax.set_ylabel("change of log-odds at other patches (nats)", fontsize=8)
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    look = {
        "color": COLOURS[0],
        "marker": "o",
        "ms": 3,
    }
    looks = {
        "others": look | {"label": "tokens of the object", "band": True},
        "random": look | {"label": "random tokens", "ls": ":"},
    }
    points = [row | {"curve": row["patches"]} for row in table]
    curves(ax, points, looks, x="layer")
    ax.axhline(
        results["total"]["value"],
        color="#777777",
        ls="--",
        lw=1,
        label="all tokens",
    )
    ax.legend(fontsize=7)
    return FigureData(figure, table)


def effect_rows(results: dict[str, Any]) -> Rows:
    """Return the effects of patching.json in nats, one row per group of patches and layer."""
    return [
        {
            "patches": group,
            "layer": place["layer"],
            "value": place["value"],
        }
        | bounds(place["ci95"])
        for group in GROUPS
        for place in results.get(group, ())
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
                f"{patched['site'].replace('_', ' ')}, when the states of an object's tokens are replaced by "
                "another image's at one layer. Look for the layers from which on they change nothing elsewhere: by "
                "then they have passed on what others take. Dotted: as many random tokens. Exploratory: the paper "
                "makes no claim about it. "
                "Bands: 95% intervals over images, for all layers together.",
                patching_figure(patched), "half")  # fmt: skip
