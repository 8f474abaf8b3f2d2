"""Figure of the most confused pairs of classes by site."""

from typing import Any

import numpy as np

from probes.analyses.style import FigureData, Figures, ReportFigure, label_sites, new_axes
from probes.models.sites import FINAL_NORM
from probes.results.probe_run import ProbeRun

CONFUSION_ROWS = 12


def confusion_map(run: ProbeRun, pairs: list[dict[str, Any]]) -> FigureData:
    """Draw the share of a class's pixels predicted as another, by site; a green bar marks "half_gone"."""
    top_pairs = pairs[:CONFUSION_ROWS]
    kept = [i for i, site in enumerate(run.sites) if site != FINAL_NORM]
    sites = [run.sites[i] for i in kept]
    values = 100 * np.array([[pair["share"][i] for i in kept] for pair in top_pairs])
    figure, ax = new_axes(6.6, 0.3 * len(top_pairs) + 1.3)
    image = ax.imshow(values, aspect="auto", cmap="magma_r", vmin=0)
    ax.grid(False)
    label_sites(ax, sites, positions=range(len(sites)), fontsize=8)
    names = [f"{pair['label']} predicted as {pair['predicted']}" for pair in top_pairs]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    dark = 0.55 * values.max()
    for y, pair in enumerate(top_pairs):
        for x in range(len(sites)) if len(sites) <= 12 else ():
            ax.text(x, y, f"{values[y, x]:.1f}", ha="center", va="center", fontsize=7,
                    color="white" if values[y, x] > dark else "black")  # fmt: skip
        if pair["half_gone"] is not None:
            x = sites.index(pair["half_gone"])
            ax.plot([x - 0.5, x - 0.5], [y - 0.45, y + 0.45], color="#009E73", lw=3)
    figure.colorbar(image, ax=ax, label="% of the class's pixels")
    rows = [
        {"image_attention": run.metrics["image_attention"], "label": pair["label"], "predicted": pair["predicted"]}
        | {"site": site, "share": share, "half_gone": pair["half_gone"]}
        for pair in pairs
        for site, share in zip(run.sites, pair["share"], strict=True)
    ]
    return FigureData(figure, rows)


def confusion_figures(runs: dict[str, ProbeRun], confusion: dict[str, list[dict[str, Any]]]) -> Figures:
    """Yield a figure of confused classes for each mask."""
    for mask, pairs in confusion.items():
        yield ReportFigure(
            f"confusion_{mask}", f"Most confused classes, {mask}",
            "Share of a class's pixels that are predicted as another class, for the pairs confused most at the "
            "adapter (Sec. 3.3). Look for rows that fade to the right. Green bar: from this layer on, at least half of "
            "the adapter's confusion is gone; rows without a bar keep more than half.",
            confusion_map(runs[mask], pairs), "wide")  # fmt: skip
