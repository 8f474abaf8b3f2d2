"""Figures of the attention knockout: wrong patches left by layer (Fig. 11), effects by class, criterion shifts."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava_bidir.common.bootstrap import interval
from probes.analyses.style import COLOURS, FigureData, Figures, ReportFigure, caption, new_axes, new_panels
from probes.results.formatting import Rows, bounds
from probes.results.probe_run import ProbeRun

from .effects import read_cases
from .inference import claimed_sign
from .tables import knockout_tables

CONDITION_STYLES = {
    "none": ("#444444", "-", "no blocking"),
    "incorrect": ("#CC3311", "-", "wrong class blocked"),
    "correct": ("#0072B2", "-", "correct class blocked"),
    "random_incorrect": ("#EE9988", ":", "as many random patches (wrong)"),
    "random_correct": ("#77BBDD", ":", "as many random patches (correct)"),
}
EFFECT_TITLES = {
    "knockout_incorrect": "wrong class blocked",
    "knockout_correct": "correct class blocked",
    "knockout_specificity": "correct − wrong, less random",
}
OUTCOME_LABELS = {
    "rate": "wrong patches left (pp)",
    "still_wrong": "first mistakes still wrong (pp)",
    "log_odds": "log-odds right : wrong (nats)",
}
VERDICT_COLOURS = {"holds": "#009E73", "reversed": "#CC3311"}


def knockout_curves(run: ProbeRun) -> FigureData:
    """Draw the wrong patches left per layer and condition, over all classes (Fig. 11)."""
    figure, ax = new_axes(4.4, 3.5)
    rows = _draw_remaining(ax, run, None, list(CONDITION_STYLES))
    ax.set(xlabel="LLM layer (0 = adapter)", ylabel="wrong patches left (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def knockout_by_class(run: ProbeRun) -> FigureData:
    """Draw the same per class, without the random controls."""
    names = [entry["class"] for entry in run.analysis("knockout.json")["classes"]]
    figure, axes = new_panels(len(names), height=1.9, columns=4, sharex=True)
    rows = []
    for ax, name in zip(axes, names, strict=True):
        rows += _draw_remaining(ax, run, name, ["none", "incorrect", "correct"])
        cases = read_cases(run, 1, [name])
        ax.set_title(f"{name} ({0 if cases is None else len(cases.images)} images)", fontsize=8)
        ax.tick_params(labelsize=7)
    figure.supylabel("wrong patches left (%)", fontsize=9)
    figure.supxlabel("LLM layer (0 = adapter)", fontsize=9)
    lines = next((ax.get_lines() for ax in axes if ax.get_lines()), [])
    figure.legend(handles=list(lines), loc="outside upper center", ncols=3, fontsize=8)
    return FigureData(figure, rows)


def _draw_remaining(ax: Axes, run: ProbeRun, name: str | None, conditions: list[str]) -> Rows:
    """Draw n_c(l) / n_c(0) of one class, or of all, with intervals over images; return the rows of the CSV file."""
    cases = read_cases(run, 1, None if name is None else [name])
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


def class_effects(inference: dict[str, Any], rows: Rows) -> FigureData:
    """Draw the effects per class and their means, one row of panels per outcome; CSV file: `rows`."""
    outcomes, shifted = inference["outcomes"], shifted_classes(inference)
    members = dict.fromkeys(name for pair in inference["look_alikes"] for name in pair)  # look-alikes side by side
    tested = {row["class"] for row in rows}
    names = [name for name in members if name in tested]
    labels = [f"{name} †" if name in shifted else name for name in names] + ["mean over classes", "mean over pairs"]
    height = 0.6 + 0.17 * len(labels)
    figure = Figure(figsize=(6.8, height * len(outcomes) + 0.3), layout="constrained")
    axes = figure.subplots(len(outcomes), len(EFFECT_TITLES), squeeze=False, sharey=True)
    for line, (outcome, of_outcome) in zip(axes, outcomes.items(), strict=True):
        for ax, (effect, title) in zip(line, EFFECT_TITLES.items(), strict=True):
            for suffix, offset, markers in (("", 0, "oD"), ("_matched", 0.3, "ss")):
                for y, entry in enumerate(_entries(of_outcome, f"{effect}{suffix}", names)):
                    _draw_effect(ax, y + offset, entry, outcome, markers[y >= len(names)])
            below = claimed_sign(effect, outcome) < 0
            ax.set_title(f"{title}\nclaimed: {'below' if below else 'above'} 0", fontsize=8)
            ax.axvline(0, color="black", lw=0.8)
            ax.axhline(len(names) - 0.5, color="#888888", lw=0.6)
            ax.set_yticks(range(len(labels)), labels, fontsize=7)
            ax.tick_params(axis="x", labelsize=7)
            ax.set_xlabel(OUTCOME_LABELS[outcome], fontsize=7)
        line[0].set_ylim(len(labels) - 0.5, -0.5)
    return FigureData(figure, rows)


def _entries(of_outcome: dict[str, Any], effect: str, names: list[str]) -> list[dict[str, Any]]:
    """Return the results of an effect by class, then its two means; none if its control was not run."""
    by_class = {row["class"]: row for row in of_outcome["classes"] if row["effect"] == effect}
    if not by_class:
        return []
    return [*(by_class[name] for name in names), of_outcome["mean"][effect], of_outcome["mean_over_pairs"][effect]]


def shifted_classes(inference: dict[str, Any]) -> set[str]:
    """Return the classes of the pairs whose criterion shifts."""
    return {name for entry in inference["criterion_shifts"] or () if entry["shift"] for name in entry["classes"]}


def _draw_effect(ax: Axes, y: float, entry: dict[str, Any], outcome: str, marker: str) -> None:
    """Draw one effect with its interval; hollow if it is not significant."""
    colour = VERDICT_COLOURS.get(entry["verdict"], "#777777")
    fill = colour if entry["verdict"] in VERDICT_COLOURS else "white"
    scale = 1 if outcome == "log_odds" else 100
    low, high = entry["ci95"] or [entry["value"]] * 2
    ax.plot([scale * low, scale * high], [y, y], color=colour, lw=1.2)
    ax.plot([scale * entry["value"]], [y], marker, color=colour, mfc=fill, ms=3 if marker == "s" else 4)


def criterion_shifts(inference: dict[str, Any], rows: Rows) -> FigureData:
    """Draw where hiding either class of a pair moves the read-out; filled: both the same way. CSV file: `rows`."""
    shifts = inference["criterion_shifts"]
    figure, ax = new_axes(4.4, 0.9 + 0.5 * len(shifts))
    for i, entry in enumerate(shifts):
        for offset, colour, (name, move) in zip((-0.15, 0.15), COLOURS[4:6], entry["hide"].items(), strict=True):
            low, high = 100 * np.array(move["ci95"])
            ax.plot([low, high], [i + offset] * 2, color=colour, lw=1.4)
            fill = colour if entry["shift"] else "white"
            ax.plot([100 * move["value"]], [i + offset], "o", color=colour, mfc=fill, ms=4.5)
            ax.annotate(
                f"{name} hidden", (high, i + offset), (3, 0), textcoords="offset points", fontsize=6.5, va="center"
            )
    ax.set_yticks(range(len(shifts)), [" / ".join(entry["classes"]) for entry in shifts], fontsize=8)
    ax.set_ylim(len(shifts) - 0.5, -0.5)
    ax.axvline(0, color="black", lw=0.8)
    ax.margins(x=0.25)
    ax.set_xlabel("move of the read-out towards the first class (pp)")
    return FigureData(figure, rows)


def knockout_figures(trained: dict[str, ProbeRun], inference: dict[str, dict[str, Any]]) -> Figures:
    """Yield the figures of the paper's knockout; main runs and `inference` are by mask."""
    runs = {mask: run for mask, run in trained.items() if read_cases(run, 1)}
    for mask, run in runs.items():
        yield ReportFigure(
            f"knockout_{mask}", f"Wrong patches left, {mask}",
            "Share of the adapter's wrong patches still wrong at each layer, over all images and classes (Fig. 11). "
            "The paper expects red (wrong class blocked) below grey (no blocking) and blue (correct class blocked) "
            "above it. Dotted: as many random patches blocked. Bands: 95% intervals over images.",
            knockout_curves(run), "half")  # fmt: skip
    for mask, of_mask in inference.items():
        yield from _inference_figures(mask, of_mask)
    for mask, run in runs.items():
        yield ReportFigure(
            f"knockout_classes_{mask}", f"Wrong patches left by class, {mask}",
            "The same curves per wrongly predicted class.",
            knockout_by_class(run), "wide")  # fmt: skip


def _inference_figures(mask: str, inference: dict[str, Any]) -> Figures:
    by_table = knockout_tables({mask: inference})
    if inference["criterion_shifts"]:
        yield ReportFigure(
            f"knockout_shifts_{mask}", f"Criterion shifts, {mask}",
            "Of the patches of two look-alike classes that the adapter calls one of them: the change, when either "
            "class is hidden, in the share called the first minus the share called the second. Anchors predict "
            "opposite directions. Filled: both move the same way, so the probe's criterion has shifted, and the "
            "effects of these classes are no evidence of anchors. Lines: 95% intervals for all pairs together.",
            criterion_shifts(inference, by_table["knockout_shifts"]), "half")  # fmt: skip
    if by_table["knockout_classes"]:
        shifted = shifted_classes(inference)
        matched = any(row["effect"].endswith("_matched") for row in by_table["knockout_classes"])
        yield ReportFigure(
            f"knockout_effects_{mask}", f"Effects by class, {mask}",
            caption(
                "Effects in the later half of the layers, class by class. Green: as the paper claims. Red: the "
                "opposite. Hollow: not significant with Holm's correction for the number of classes. Diamonds: means "
                "over classes, and over pairs of look-alikes, with t intervals for classes in general. Other lines: "
                "95% intervals of each class alone.",
                "Squares: against tokens matched in distance and attention." if matched else "",
                "†: the probe's criterion shifts between this class and its look-alike." if shifted else "",
            ),
            class_effects(inference, by_table["knockout_classes"]), "wide")  # fmt: skip
