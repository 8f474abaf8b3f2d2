"""Pairs of confused classes by site."""

from typing import Any

import numpy as np

from probes.models.frozen_mllm import FINAL_NORM
from probes.results.probe_run import ProbeRun

from .style import FigureData, label_sites, new_axes


def confusion_map(run: ProbeRun, pairs: list[dict[str, Any]], most: int = 12) -> FigureData:
    """Share of a class's pixels that are taken for another, by site; a green bar where half of it is gone for good."""
    shown = pairs[:most]
    kept = [i for i, site in enumerate(run.sites) if site != FINAL_NORM]
    sites = [run.sites[i] for i in kept]
    values = 100 * np.array([[pair["share"][i] for i in kept] for pair in shown])
    figure, ax = new_axes(6.6, 0.3 * len(shown) + 1.3)
    image = ax.imshow(values, aspect="auto", cmap="magma_r", vmin=0)
    ax.grid(False)
    label_sites(ax, sites, at=range(len(sites)), fontsize=8)
    ax.set_yticks(range(len(shown)), [f"{pair['label']} as {pair['predicted']}" for pair in shown], fontsize=8)
    dark = 0.55 * values.max()
    for y, pair in enumerate(shown):
        for x in range(len(sites)) if len(sites) <= 12 else ():
            ax.text(x, y, f"{values[y, x]:.1f}", ha="center", va="center", fontsize=7,
                    color="white" if values[y, x] > dark else "black")  # fmt: skip
        if pair["half_gone"] is not None:
            x = sites.index(pair["half_gone"])
            ax.plot([x - 0.5, x - 0.5], [y - 0.45, y + 0.45], color="#009E73", lw=3)
    figure.colorbar(image, ax=ax, label="% of its pixels")
    rows = [
        {"image_attention": run.metrics["image_attention"], "label": pair["label"], "predicted": pair["predicted"]}
        | {"site": site, "share": share, "half_gone": pair["half_gone"]}
        for pair in pairs
        for site, share in zip(run.sites, pair["share"], strict=True)
    ]
    return FigureData(figure, rows)
