"""What the report shows of UMAP projections (Fig. 5)."""

from typing import Any

import numpy as np

from probes.analyses.base import Section
from probes.analyses.style import FigureData, Figures, ReportFigure, new_axes
from probes.data.palette import palette_of
from probes.runs.study import StudyRuns


def section(study: StudyRuns) -> Section:
    """Return the section of a study."""
    return Section([*umap_figures(study)])


def umap_figures(study: StudyRuns) -> Figures:
    """Yield a figure for each image of each run; they need the dataset."""
    for mask, run in study.main_runs.items():
        result = run.analysis("umap.json")
        palette = palette_of(study.first.dataset()) if result else None
        for image in result["images"] if result else ():
            yield ReportFigure(
                f"umap_{mask}_{image['image']}", f"Patches of image {image['name']}, {mask}",
                "UMAP of the patches of one image, coloured by class (Fig. 5). UMAP exaggerates the gaps between "
                "clusters, so rely on the numbers above the panels: the share of a patch's ten nearest neighbours in "
                "the original space that have its class.",
                umap_panels(image, run.metrics["classes"], palette))  # fmt: skip


def umap_panels(image: dict[str, Any], classes: list[str], palette: np.ndarray) -> FigureData:
    """Draw the patches of one image in two dimensions per site; all but the four most common classes grey (Fig. 5)."""
    figure, axes = new_axes(6.6, 2.9, len(image["sites"]), squeeze=False)
    labels = np.array(image["labels"])
    frequency = np.bincount(labels[labels >= 0], minlength=len(classes))
    common = [k for k in np.argsort(-frequency)[:4] if frequency[k]]
    rows = []
    for ax, entry in zip(axes[0], image["sites"], strict=True):
        xy = np.array(entry["xy"])
        other = ~np.isin(labels, common)
        ax.scatter(
            *xy[other].T,
            s=14,
            c="#CCCCCC",
            label="other",
        )
        for k in common:
            ax.scatter(
                *xy[labels == k].T,
                s=18,
                color=palette[k] / 255,
                edgecolor="#333333",
                lw=0.3,
                label=classes[k],
            )
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#CCCCCC")
        purity = "unknown" if entry["knn_purity"] is None else f"{entry['knn_purity']:.0%}"
        ax.set_title(f"{entry['site']}\nneighbours of the same class: {purity}", fontsize=8)
        rows += [
            {
                "site": entry["site"],
                "patch": i,
                "label": int(labels[i]),
                "x": x,
                "y": y,
            }
            for i, (x, y) in enumerate(entry["xy"])
        ]
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
    )
    return FigureData(figure, rows)
