"""Figures of the attention knockout: share of wrong patches left by layer (Fig. 11)."""

import numpy as np
from matplotlib.axes import Axes

from llava_bidir.common.bootstrap import interval
from probes.analyses.knockout.effects import read_cases
from probes.report.study import Rows
from probes.report.tables import bounds
from probes.results.probe_run import ProbeRun

from .style import FigureData, draw_intervals, new_axes, new_panels

CONDITION_STYLES = {
    "none": ("#444444", "-", "no blocking"),
    "incorrect": ("#CC3311", "-", "wrong class blocked"),
    "correct": ("#0072B2", "-", "correct class blocked"),
    "random_incorrect": ("#EE9988", ":", "as many random patches (wrong)"),
    "random_correct": ("#77BBDD", ":", "as many random patches (correct)"),
}


def knockout_curves(run: ProbeRun, min_patches: int) -> FigureData:
    """Draw the wrong patches left per layer and condition, over all classes (Fig. 11)."""
    figure, ax = new_axes(4.4, 3.5)
    rows = _draw_remaining(ax, run, min_patches, None, list(CONDITION_STYLES))
    ax.set(xlabel="LLM layer (0 = adapter)", ylabel="wrong patches left (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def knockout_by_class(run: ProbeRun, min_patches: int) -> FigureData:
    """Draw the same per class, without the random controls."""
    names = [entry["class"] for entry in run.analysis("knockout.json")["classes"]]
    figure, axes = new_panels(len(names), height=1.9, columns=4, sharex=True)
    rows = []
    for ax, name in zip(axes, names, strict=True):
        rows += _draw_remaining(ax, run, min_patches, name, ["none", "incorrect", "correct"])
        cases = read_cases(run, min_patches, [name])
        ax.set_title(f"{name} ({0 if cases is None else len(cases.images)} images)", fontsize=8)
        ax.tick_params(labelsize=7)
    figure.supylabel("wrong patches left (%)", fontsize=9)
    figure.supxlabel("LLM layer (0 = adapter)", fontsize=9)
    return FigureData(figure, rows)


def _draw_remaining(ax: Axes, run: ProbeRun, min_patches: int, name: str | None, conditions: list[str]) -> Rows:
    """Draw n_c(l) / n_c(0) of one class, or of all, with intervals over images; return the rows of the CSV file."""
    cases = read_cases(run, min_patches, None if name is None else [name])
    ax.xaxis.get_major_locator().set_params(integer=True)
    if cases is None:
        ax.text(0.5, 0.5, "no image", ha="center", transform=ax.transAxes, fontsize=8)
        return []
    rows = []
    for condition in conditions:
        colour, dash, label = CONDITION_STYLES[condition]
        mean, resampled = cases.mean(cases.rates[condition], run.weights)
        ci95 = [interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())]
        ax.plot(100 * mean, dash, color=colour, label=label, lw=1.8)
        if dash == "-":
            ax.fill_between(range(len(mean)), *(100 * np.array(ci95).T), color=colour, alpha=0.12, lw=0)
        common = {"image_attention": run.metrics["image_attention"], "class": name or "all", "condition": condition}
        rows += [
            common | {"layer": layer, "cases": len(cases.images), "remaining": m, **bounds(ci95[layer])}
            for layer, m in enumerate(mean.tolist())
        ]
    return rows


def knockout_selection(rows: Rows, mask: str, claimed_at: int) -> FigureData:
    """Draw the two knockout effects by the minimum number of wrong patches per image."""
    figure, ax = new_axes(4.4, 3.3)
    for effect, condition in (("knockout_incorrect", "incorrect"), ("knockout_correct", "correct")):
        points = [row for row in rows if row["image_attention"] == mask and row["effect"] == effect]
        x, y, ci95 = zip(*((p["min_patches"], p["value"], (p["low"], p["high"])) for p in points), strict=True)
        colour, _, label = CONDITION_STYLES[condition]
        draw_intervals(ax, x, y, ci95, colour, label=label, marker="o", ms=4, capsize=2, lw=1.5)
    ax.axhline(0, color="black", lw=0.8)
    ax.axvline(claimed_at, color="#888888", ls="--", lw=0.9)
    ax.set(xlabel="minimum number of wrong patches at the adapter", ylabel="change in wrong patches left (pp)")
    ax.legend(fontsize=8)
    return FigureData(figure, [row for row in rows if row["image_attention"] == mask])
