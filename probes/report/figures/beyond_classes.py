"""Figures of other tasks than segmentation: by site, in units of the encoder, or of a bare encoder's last layer."""

import math
from typing import Any

from matplotlib.figure import Figure

from probes.analyses.maps.figures import site_maps
from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    Looks,
    ReportFigure,
    caption,
    curves,
    has_depth,
    label_layers,
    label_sites,
    mask_colour,
    site_depth,
)
from probes.runs.formatting import Entry, Rows, bounds
from probes.runs.study import StudyRuns

from ..beyond_classes import task_score_rows


def tasks_by_site(results: list[Entry]) -> FigureData:
    """Draw a panel per task, model and dataset from the entry "tasks" of results.json; 1 is the score at "unit"."""
    panels = _panels(results)
    figure = Figure(figsize=(3.4 * len(panels) + 0.3, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    rows: Rows = []
    for (title, of_task), ax in zip(panels.items(), axes, strict=True):
        points: Rows = []
        looks: Looks = {}
        for entry in of_task:
            for row in relative_scores(entry):
                rows.append(row)
                name = f"{row['image_attention']}, {row['weights']} {row['draw']}, {row['seed']}"
                points.append(row | {"curve": name, "depth": site_depth(row["site"])})
                looks.setdefault(name, _look(entry, row))
        curves(ax, points, looks, y="relative")
        ax.axhline(1, color="black", lw=0.8)
        ax.set_title(title)
        sites = [row["site"] for row in of_task[0]["sites"] if has_depth(row["site"])]
        label = label_sites if of_task[0]["has_llm"] else label_layers
        label(ax, sites, max_labels=6, fontsize=7)
        ax.xaxis.label.set_size(8)
        handles, labels = ax.get_legend_handles_labels()
        of_label = dict(zip(labels, handles, strict=True))  # seeds and draws share one
        ax.legend(of_label.values(), of_label, fontsize=7)
    axes[0].set_ylabel(f"relative to {_unit_names(results)}; higher is better", fontsize=8)
    return FigureData(figure, rows)


def _look(entry: Entry, row: Entry) -> dict[str, Any]:
    """Return how the curve of a model is drawn: a bare encoder has no other mask that it could be compared with."""
    colour = mask_colour(entry["image_attention"]) if entry["has_llm"] else COLOURS[0]
    if row["weights"] != "trained":
        return {
            "color": colour,
            "ls": "--",
            "label": "random weights",
        }
    name = entry["image_attention"] if entry["has_llm"] else "trained"
    return {
        "color": colour,
        "label": name,
        "band": True,
    }


def _unit_names(results: list[Entry]) -> str:
    """Return "the encoder", "the last layer", or both."""
    names = ["the encoder" if entry["has_llm"] else "the last layer" for entry in results]
    return " or ".join(dict.fromkeys(names))


def _panels(results: list[Entry]) -> dict[str, list[Entry]]:
    """Return the entries by title: of one task, model and dataset; the title names what differs."""
    several = len({(entry["model"], entry["dataset"]) for entry in results}) > 1
    panels: dict[str, list[Entry]] = {}
    for entry in results:
        title = entry["task"] + f"\n{entry['model']}, {entry['dataset']}" * several
        panels.setdefault(title, []).append(entry)
    return panels


def relative_scores(entry: Entry) -> Rows:
    """Return the scores of an entry of "tasks" at each site that has a depth, of trained and random models.

    They are in units of the trained model's score at "unit"; inverted where lower is better.
    """
    (unit,) = (row["value"] for row in entry["sites"] if row["site"] == entry["unit"])

    def relative(score: float) -> float:
        if entry["better"] == "higher":
            return score / unit
        # the bound of an error can be below 0, where its inverse has no bound
        return unit / score if score > 0 else math.inf

    return [
        {key: row[key] for key in row if key not in ("score", "value", "low", "high")}
        | {"relative": relative(row["value"])}
        | bounds(sorted(map(relative, (row["low"], row["high"]))))
        for row in task_score_rows([entry])
        if has_depth(row["site"])
    ]


def task_figures(studies: list[StudyRuns], results: list[Entry]) -> Figures:
    """Yield the figures of other tasks than segmentation.

    Args:
        studies: Runs of tasks; those with `probes maps` have a figure.
        results: Entry "tasks" of results.json.
    """
    drawn = [entry for entry in results if entry["unit"]]
    if drawn:
        yield ReportFigure(
            "tasks", "Other tasks by site",
            caption(
                f"The main score of each task in units of {_unit_names(drawn)}'s; where lower is better, its inverse.",
                "Dashed: random weights, a line for each draw." if any(entry["random"] for entry in drawn) else "",
                "Exploratory: the paper makes no claim about these tasks. Bands: 95% intervals over images.",
            ),
            tasks_by_site(drawn), "wide",)  # fmt: skip
    runs = [run for study in studies for run in study.members if run.analysis("maps.json")]
    for i, run in enumerate(runs):
        mask = f"{run.metrics['image_attention']}, " * run.has_llm
        of = f"{run.task_name}, {mask}seed {run.metrics['seed']}"
        random = ", random weights" * (run.arm != "trained")
        yield ReportFigure(
            f"tasks_maps_{i}", f"Predictions by layer, {of}{random}",
            "Target and predictions of an image share their colours; black: no value. Single images are no evidence.",
            site_maps(run), "wide",)  # fmt: skip
