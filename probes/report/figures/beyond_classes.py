"""Figures of other tasks than segmentation: by site, in units of the encoder, or of a bare encoder's last layer."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.analyses.maps.figures import site_maps
from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    caption,
    draw_curve,
    has_depth,
    label_layers,
    label_sites,
    mask_colour,
    site_depth,
)
from probes.results.formatting import bounds
from probes.results.study import StudyRuns

Entry = dict[str, Any]


def tasks_by_site(results: list[Entry]) -> FigureData:
    """Draw a panel per task, model and dataset from the entry "tasks" of results.json; 1 is the score at "unit"."""
    panels = _panels(results)
    figure = Figure(figsize=(3.4 * len(panels) + 0.3, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    rows = []
    for (title, of_task), ax in zip(panels.items(), axes, strict=True):
        for entry in of_task:
            rows += _draw_scores(ax, entry)
        if any(entry["random"] for entry in of_task):
            ax.plot(
                [],
                [],
                "--",
                color="#777777",
                lw=1.6,
                label="random weights",
            )
        ax.axhline(1, color="black", lw=0.8)
        ax.set_title(title)
        sites = [row["site"] for row in of_task[0]["sites"] if has_depth(row["site"])]
        if of_task[0]["has_llm"]:
            label_sites(ax, sites, max_labels=6, fontsize=7)
        else:
            label_layers(ax, sites, max_labels=6, fontsize=7)
        ax.xaxis.label.set_size(8)
        # seeds share one
        labels = {text: line for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        ax.legend(labels.values(), labels, fontsize=7)
    axes[0].set_ylabel(f"relative to {_unit_names(results)}; higher is better", fontsize=8)
    return FigureData(figure, rows)


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


def _draw_scores(ax: Axes, entry: Entry) -> list[dict[str, Any]]:
    """Draw the trained run of an entry and its random ones, and return their rows."""
    if entry["has_llm"]:
        colour = mask_colour(entry["image_attention"])
        name = entry["image_attention"]
    else:  # has no other mask that it could be compared with
        colour = COLOURS[0]
        name = "trained"
    drawn = relative_scores(entry, entry["sites"])
    band = [row["ci95"] for row in drawn]
    draw_curve(ax, *_points(drawn), band, colour, "-", label=name)
    rows = _csv_rows(entry, "trained", None, drawn)
    for random in entry["random"]:
        drawn = relative_scores(entry, random["sites"])
        draw_curve(ax, *_points(drawn), None, colour, "--")
        rows += _csv_rows(entry, random["weights"], random["draw"], drawn)
    return rows


def _points(drawn: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return where the scores of sites stand, and the scores."""
    return [site_depth(row["site"]) for row in drawn], [row["value"] for row in drawn]


def _csv_rows(
    entry: Entry,
    weights: str,
    draw: int | None,
    drawn: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return what is drawn of a run as rows of a CSV file."""
    about = {key: entry[key] for key in ("task", "model", "dataset", "image_attention", "seed")}
    about |= {"weights": weights, "draw": draw}
    return [
        about | {"site": row["site"], "relative": row["value"]} | bounds(row["ci95"])
        for row in drawn
    ]


def relative_scores(entry: Entry, sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return site, score and interval in units of the trained model's score at "unit"; inverted where lower is better.

    Args:
        entry: An entry of results.json["tasks"].
        sites: Its "sites", or those of one of its "random" models.
    """
    (unit,) = (row["value"] for row in entry["sites"] if row["site"] == entry["unit"])

    def relative(score: float) -> float:
        if entry["better"] == "higher":
            return score / unit
        # the bound of an error can be below 0, where its inverse has no bound
        return unit / score if score > 0 else math.inf

    return [
        {
            "site": row["site"],
            "value": relative(row["value"]),
            "ci95": sorted(map(relative, row["ci95"])),
        }
        for row in sites
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
