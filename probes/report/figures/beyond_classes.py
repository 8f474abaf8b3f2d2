"""Figures of other tasks than segmentation: by site, each in units of the encoder's score, and by position."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.analyses.maps.figures import task_maps
from probes.analyses.style import FigureData, Figures, ReportFigure, caption, label_sites, mask_colour, site_depth
from probes.models.sites import ENCODER, FINAL_NORM
from probes.report.beyond_classes import group_by_seed, is_control
from probes.report.seeds import join_entries, share_images
from probes.results.formatting import bounds
from probes.results.task_run import TaskRun

Entry = dict[str, Any]


def tasks_by_site(results: list[Entry]) -> FigureData:
    """Draw a panel per task, model and dataset; 1 is the encoder's score, and higher is better.

    With several seeds, each is a thin line, and their mean a thick one.

    Args:
        results: Entry "tasks" of results.json.
    """
    panels = _panels(results)
    figure = Figure(figsize=(3.4 * len(panels) + 0.3, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    rows = []
    for (title, of_task), ax in zip(panels.items(), axes, strict=True):
        for entries in group_by_seed(of_task):
            rows += _draw_scores(ax, entries)
        if any(entry["control"] for entry in of_task):
            ax.plot([], [], "--", color="#777777", lw=1.6, label="random weights")
        ax.axhline(1, color="black", lw=0.8)
        ax.set_title(title)
        sites = [row["site"] for row in of_task[0]["sites"] if row["site"] != FINAL_NORM]
        label_sites(ax, sites, max_labels=6, fontsize=7)
        ax.xaxis.label.set_size(8)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("relative to the encoder; higher is better", fontsize=8)
    return FigureData(figure, rows)


def _panels(results: list[Entry]) -> dict[str, list[Entry]]:
    """Return the entries by title: of one task, model and dataset; the title names what differs."""
    several = len({(entry["model"], entry["dataset"]) for entry in results}) > 1
    panels: dict[str, list[Entry]] = {}
    for entry in results:
        title = entry["task"] + f"\n{entry['model']}, {entry['dataset']}" * several
        panels.setdefault(title, []).append(entry)
    return panels


def _draw_scores(ax: Axes, entries: list[Entry]) -> list[dict[str, Any]]:
    """Draw the entries of a task and mask, one per seed; return their rows and those of the mean over seeds."""
    mask, rows = entries[0]["image_attention"], []
    shared = share_images([entry["data_fingerprint"] for entry in entries])
    for sites, kind, style in (("sites", "trained", "-"), ("control", "random", "--")):
        lines = [(str(entry["seed"]), relative_scores(entry, sites)) for entry in entries]
        if len(entries) > 1:
            seeds, scores = zip(*lines, strict=True)
            lines.append(("mean", join_entries(seeds, scores, shared)))
        for seed, drawn in lines:
            main = len(entries) == 1 or seed == "mean"
            x, y = [site_depth(row["site"]) for row in drawn], [row["value"] for row in drawn]
            label = mask if kind == "trained" and drawn and main else None
            ax.plot(x, y, style, color=mask_colour(mask), lw=1.6 if main else 0.5, label=label)
            if drawn and kind == "trained" and main:
                low, high = zip(*(row["ci95"] for row in drawn), strict=True)
                ax.fill_between(x, low, high, color=mask_colour(mask), alpha=0.12, lw=0)
            about = {key: entries[0][key] for key in ("task", "model", "dataset", "image_attention")}
            about |= {"seed": seed, "weights": kind}
            rows += [about | _flat(row) for row in drawn]
    return rows


def starvation_by_task(results: list[Entry], joint: list[Entry], patches: int = 50) -> FigureData:
    """Draw the gaps of the first patches in raster order, in the same panels; with several seeds, also their mean.

    Args:
        results: Entry "tasks_starvation" of results.json.
        joint: Entry "joint_tasks_starvation".
        patches: Most patches to draw.
    """
    panels = _panels([*results, *joint])
    figure = Figure(figsize=(3.6 * len(panels) + 0.3, 3), layout="constrained")
    axes, rows = figure.subplots(1, len(panels), squeeze=False)[0], []
    for (title, entries), ax in zip(panels.items(), axes, strict=True):
        means = [entry for entry in entries if "seeds" in entry]
        for entry in entries:
            main, gap, ci95 = "seeds" in entry or not means, entry["gap"], entry["gap_ci95"]
            x, colour = range(min(patches, len(gap))), mask_colour("bidirectional")
            ax.plot(x, gap[: len(x)], color=colour, lw=1.6 if main else 0.5)
            if main:
                low, high = zip(*ci95[: len(x)], strict=True)
                ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            seed = str(entry.get("seed", "mean"))
            rows += [
                {key: entry[key] for key in ("task", "model", "dataset")}
                | {"seed": seed, "patch": i, "gap": value}
                | bounds(ci95[i], "gap_")
                for i, value in enumerate(gap)
            ]
        for start in range(entry["grid"][1], min(patches, len(gap)), entry["grid"][1]):
            ax.axvline(start - 0.5, color="#999999", lw=0.6, ls=":")
        ax.axhline(0, color="black", lw=0.8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(title)
        ax.set_ylabel(f"{entry['error']}, causal − bidirectional", fontsize=8)
        ax.set_xlabel("patch, in raster order (dotted: start of a row)", fontsize=8)
    return FigureData(figure, rows)


def relative_scores(entry: Entry, sites: str) -> list[dict[str, Any]]:
    """Return site, score and interval in units of the trained model's encoder; inverted where lower is better.

    Args:
        entry: An entry of results.json["tasks"].
        sites: "sites" or "control".
    """
    (encoder,) = (row["value"] for row in entry["sites"] if row["site"] == ENCODER)
    # the bound of an error can be below 0, where its inverse has no bound
    unit = (lambda x: encoder / x if x > 0 else math.inf) if entry["better"] == "lower" else (lambda x: x / encoder)
    rows = [row for row in entry[sites] or () if row["site"] != FINAL_NORM]
    return [{"site": row["site"], "value": unit(row["value"]), "ci95": sorted(map(unit, row["ci95"]))} for row in rows]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {"site": row["site"], "relative": row["value"], "low": row["ci95"][0], "high": row["ci95"][1]}


def task_figures(runs: list[TaskRun], tasks: dict[str, list[dict[str, Any]]]) -> Figures:
    """Yield the figures of other tasks than segmentation.

    Args:
        runs: Runs of tasks; those with `probes maps` have a figure.
        tasks: Entries "tasks", "tasks_starvation" and "joint_tasks_starvation" of results.json.
    """
    results, starved = tasks["tasks"], tasks["tasks_starvation"]
    with_encoder = [entry for entry in results if any(row["site"] == ENCODER for row in entry["sites"])]
    if with_encoder:
        yield ReportFigure(
            "tasks", "Other tasks by site",
            caption(
                "The main score of each task in units of the encoder's; where lower is better, its inverse.",
                "Dashed: random weights, one draw." if any(entry["control"] for entry in with_encoder) else "",
                "Exploratory: the paper makes no claim about these tasks.", _bands_caption(with_encoder),
            ),
            tasks_by_site(with_encoder), "wide")  # fmt: skip
    if starved:
        yield ReportFigure(
            "tasks_starvation", "Starvation of other tasks",
            caption(
                "Mean error of the pixels under each of the first patches, causal minus bidirectional, at the causal",
                "run's best layer: positive where causal attention is worse. One probe is shared by all positions.",
                "Exploratory.", _bands_caption(starved),
            ),
            starvation_by_task(starved, tasks["joint_tasks_starvation"]), "wide")  # fmt: skip
    for i, run in enumerate(run for run in runs if run.analysis("maps.json")):
        of = f"{run.task_name}, {run.metrics['image_attention']}, seed {run.metrics['seed']}"
        random = ", random weights" * is_control(run)
        yield ReportFigure(
            f"tasks_maps_{i}", f"Predictions by layer, {of}{random}",
            "Target and predictions of an image share their colours; black: no value. Single images are no evidence.",
            task_maps(run), "wide")  # fmt: skip


def _bands_caption(entries: list[dict[str, Any]]) -> str:
    """Return what lines and bands are; with several seeds, the band is that of their mean."""
    several = [len(group) > 1 for group in group_by_seed(entries)]
    if not any(several):
        return "Bands: 95% intervals over images."
    alone = "" if all(several) else "; over images where there is one seed only"
    return f"Thin: one seed; thick: their mean. Bands: 95% intervals over seeds{alone}."
