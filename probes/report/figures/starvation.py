"""Figures of context starvation: the accuracy gap between the masks per patch (Fig. 7)."""

from typing import Any

import numpy as np

from probes.report.tables import bounds

from .style import FigureData, mask_colour, new_axes, signed_colours


def starvation_curve(starvation: dict[str, Any], patches: int = 50) -> FigureData:
    """Draw the accuracy gap of the first patches in raster order (Fig. 7)."""
    figure, ax = new_axes(6.4, 3.3)
    count = min(patches, len(starvation["gap"]))
    x, gap = np.arange(count), 100 * np.array(starvation["gap"][:count])
    low, high = 100 * np.array(starvation["gap_ci95"][:count]).T
    ax.bar(x, gap, color=mask_colour("bidirectional"), alpha=0.75, width=0.85)
    ax.vlines(x, low, high, color="#555555", lw=0.8)
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    for row in range(starvation["grid"][1], count, starvation["grid"][1]):
        ax.axvline(row - 0.5, color="#999999", lw=0.6, ls=":")
    ax.set(xlabel="patch, in raster order (dotted: start of a row)", ylabel="bidirectional − causal (pp)")
    rows = [
        {"patch": i} | {key: starvation[key][i] for key in ("causal", "bidirectional", "gap")} | bounds(ci95, "gap_")
        for i, ci95 in enumerate(starvation["gap_ci95"])
    ]
    return FigureData(figure, rows)


def starvation_grid(starvation: dict[str, Any]) -> FigureData:
    """Draw the same gap at the position of each patch in the image."""
    figure, ax = new_axes(4.2, 3.3)
    gap = 100 * np.array(starvation["gap"]).reshape(starvation["grid"])
    image = ax.imshow(gap, **signed_colours(gap))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="bidirectional − causal (pp)")
    return FigureData(figure, [])
