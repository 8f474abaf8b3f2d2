"""Scores against the probe's training: by epoch, by step, and by longer-trained probes (App. A.2)."""

from typing import Any

import matplotlib as mpl

from probes.models.frozen_mllm import FINAL_NORM
from probes.report.study import Study
from probes.results.probe_run import ProbeRun

from .layer_curves import shown_sites
from .style import FigureData, colour_of, label_sites, new_axes, panels, position


def probe_budget(study: Study) -> FigureData:
    """The curve over the stack after fewer epochs of probe training, and by longer-trained probes."""
    figure, axes = new_axes(6.6, 3.5, len(study.trained), sharey=True, squeeze=False)
    rows = []
    for ax, (mask, run) in zip(axes[0], study.trained.items(), strict=True):
        sites, epochs = shown_sites(run), epochs_of(run)
        history = {entry["site"]: entry["history"] for entry in run.metrics["sites"] if entry["history"]}
        known = [site for site in sites if site in history]
        x, most = [position(site) for site in known], len(epochs)
        for i in sorted({1, min(2, most), max(1, most // 2), most}):
            curve = [100 * history[site][i - 1] for site in known]
            shade, label = 0.25 + 0.75 * i / most, f"epoch {epochs[i - 1]:g}"
            ax.plot(x, curve, color=colour_of(mask), alpha=shade, marker="o", ms=3, label=label)
        if mask in study.longer:
            longer = study.longer[mask].metrics
            found = {entry["site"]: 100 * entry["miou"] for entry in longer["sites"]}
            x = [position(site) for site in sites if site in found]
            y = [found[site] for site in sites if site in found]
            ax.plot(x, y, "--", color="black", lw=1.2, label=f"{longer['probe']['epochs']} epochs")
        label_sites(ax, sites, 8, fontsize=8)
        ax.set_title(mask, fontsize=10)
        ax.legend(fontsize=8)
        rows += [row for found in (run, study.longer.get(mask)) if found is not None for row in _rows(found)]
    axes[0, 0].set_ylabel("validation mIoU (%)")
    return FigureData(figure, rows)


def epochs_of(run: ProbeRun) -> list[float]:
    """After how many epochs each entry of a run's history was validated."""
    probe = run.metrics["probe"]
    count = max(len(entry["history"]) for entry in run.metrics["sites"])
    steps = probe.get("validated_at")
    return [step * probe["epochs"] / probe["steps"] for step in steps] if steps else list(range(1, count + 1))


def _rows(run: ProbeRun) -> list[dict[str, Any]]:
    facts = {"image_attention": run.metrics["image_attention"], "run_epochs": run.metrics["probe"]["epochs"]}
    steps = run.metrics["probe"].get("validated_at")
    epochs = epochs_of(run)
    return [
        facts | {"site": entry["site"], "epoch": epochs[i], "miou": miou} | ({"step": steps[i]} if steps else {})
        for entry in run.metrics["sites"]
        for i, miou in enumerate(entry["history"])
    ]


def score_by_step(study: Study) -> FigureData:
    """Each site's score against the probe's optimiser steps, all from one pass; sites from light to dark."""
    figure, axes = panels(len(study.trained), height=3.4, columns=2, sharey=True)
    rows = []
    for ax, (mask, run) in zip(axes, study.trained.items(), strict=True):
        entries = [entry for entry in run.metrics["sites"] if entry["site"] != FINAL_NORM and entry["history"]]
        colours = mpl.colormaps["viridis_r"]
        for i, entry in enumerate(entries):
            first_or_last = i < 2 or i in (len(entries) // 2, len(entries) - 1)
            ax.plot(run.metrics["probe"]["validated_at"], [100 * miou for miou in entry["history"]], lw=1.3, ms=3,
                    color=colours(0.1 + 0.9 * i / max(1, len(entries) - 1)), marker="o",
                    label=entry["site"].replace("_", " ") if first_or_last else None)  # fmt: skip
        ax.set_title(mask, fontsize=10)
        ax.set_xlabel("optimiser steps of the probe")
        rows += _rows(run)
    axes[0].set_ylabel("validation mIoU (%)")
    axes[0].legend(fontsize=8)
    return FigureData(figure, rows)
