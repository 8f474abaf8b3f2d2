"""Figures of scores against probe training: by epoch, by step, and for longer-trained probes (App. A.2)."""

from typing import Any

import matplotlib as mpl

from probes.report.study import Study
from probes.results.probe_run import ProbeRun

from .layer_curves import depth_and_miou, sites_by_depth, without_final_norm
from .style import FigureData, Figures, ReportFigure, caption, label_sites, mask_colour, mask_panels, site_depth

BUDGET = "Probe training budget"


def probe_budget(study: Study) -> FigureData:
    """Draw mIoU by site after fewer epochs of probe training, and for longer-trained probes."""
    figure, axes = mask_panels(study.trained, height=3.1, ylabel="validation mIoU (%)")
    rows = []
    for ax, (mask, run) in zip(axes, study.trained.items(), strict=True):
        sites, epochs = sites_by_depth(run), validation_epochs(run)
        history = {entry["site"]: entry["history"] for entry in run.metrics["sites"] if entry["history"]}
        with_history = [site for site in sites if site in history]
        x, count = [site_depth(site) for site in with_history], len(epochs)
        for i in sorted({1, min(2, count), max(1, count // 2), count}):
            curve = [100 * history[site][i - 1] for site in with_history]
            shade, label = 0.25 + 0.75 * i / count, f"epoch {epochs[i - 1]:g}"
            ax.plot(x, curve, color=mask_colour(mask), alpha=shade, marker="o", ms=3, label=label)
        rows += _history_rows(run)
        if mask in study.long_runs:
            metrics = study.long_runs[mask].metrics
            entries = [entry for entry in metrics["sites"] if entry["site"] in sites]
            label = f"{metrics['probe']['epochs']} epochs"
            ax.plot(*depth_and_miou(entries), "--", color="black", lw=1.2, label=label)
            rows += _history_rows(study.long_runs[mask])
        label_sites(ax, sites, 8, fontsize=8)
        ax.legend(fontsize=8)
    return FigureData(figure, rows)


def validation_epochs(run: ProbeRun) -> list[float]:
    """Return the epoch of each entry of a run's validation history."""
    probe = run.metrics["probe"]
    count = max(len(entry["history"]) for entry in run.metrics["sites"])
    steps = probe.get("validated_at")
    return [step * probe["epochs"] / probe["steps"] for step in steps] if steps else list(range(1, count + 1))


def _history_rows(run: ProbeRun) -> list[dict[str, Any]]:
    common = {"image_attention": run.metrics["image_attention"], "run_epochs": run.metrics["probe"]["epochs"]}
    steps, epochs = run.metrics["probe"].get("validated_at"), validation_epochs(run)
    return [
        common | {"site": entry["site"], "epoch": epochs[i], "miou": miou} | ({"step": steps[i]} if steps else {})
        for entry in run.metrics["sites"]
        for i, miou in enumerate(entry["history"])
    ]


def score_by_step(study: Study) -> FigureData:
    """Draw each site's score against the probe's optimiser steps; sites from light to dark."""
    figure, axes = mask_panels(study.trained, height=3.4, ylabel="validation mIoU (%)")
    rows = []
    for ax, run in zip(axes, study.trained.values(), strict=True):
        entries = [entry for entry in without_final_norm(run.metrics["sites"]) if entry["history"]]
        colours = mpl.colormaps["viridis_r"]
        for i, entry in enumerate(entries):
            labelled = i < 2 or i in (len(entries) // 2, len(entries) - 1)
            ax.plot(run.metrics["probe"]["validated_at"], [100 * miou for miou in entry["history"]], lw=1.3, ms=3,
                    color=colours(0.1 + 0.9 * i / max(1, len(entries) - 1)), marker="o",
                    label=entry["site"].replace("_", " ") if labelled else None)  # fmt: skip
        ax.set_xlabel("optimiser steps of the probe")
        rows += _history_rows(run)
    axes[0].legend(fontsize=8)
    return FigureData(figure, rows)


def budget_figures(study: Study) -> Figures:
    """Yield the figures of probe training, if all trained runs have its history."""
    if not all(entry["history"] for run in study.trained.values() for entry in run.metrics["sites"]):
        return
    yield ReportFigure(
        "budget", BUDGET, "Score by training length",
        caption(
            f"mIoU by site after fewer epochs than the {study.first.metrics['probe']['epochs']} of the main curve.",
            "Dashed: longer-trained probes." if study.long_runs else "",
            "Short training shows how easily a class can be read; whether it is present is a matter of the optimum.",
        ),
        probe_budget(study))  # fmt: skip
    if all("validated_at" in run.metrics["probe"] for run in study.trained.values()):
        yield ReportFigure(
            "budget_steps", BUDGET, "Score by optimiser step",
            "One line per site, from the encoder (light) to the last layer (dark). If a line still rises at the end, "
            "its probe had too few steps.",
            score_by_step(study))  # fmt: skip
