"""Figure of the feature statistics by site: scale, anisotropy, neighbourhoods."""

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    caption,
    label_sites,
    mask_colour,
    new_panels,
    site_depth,
)
from probes.results.formatting import run_columns
from probes.results.study import Study

from .layer_curves import sites_by_depth, without_final_norm

STATISTICS = {
    "rms": "root mean square",
    "largest_channel": "share of the largest channel",
    "anisotropy": "anisotropy (mean cosine between images)",
    "knn_purity": "kNN purity (neighbours of the same class)",
}


def state_statistics(study: Study) -> FigureData:
    """Draw the statistics of the image tokens' states per site, the scale on a logarithmic axis; untrained dotted."""
    runs = [run for run in study.runs if "states" in run.metrics["sites"][0]]
    keys = [key for key in STATISTICS if key in runs[0].metrics["sites"][0]["states"]]
    figure, axes = new_panels(len(keys), height=2.4, columns=2)
    for ax, key in zip(axes, keys, strict=True):
        for run in runs:
            mask, untrained = run.metrics["image_attention"], bool(run.metrics["untrained"])
            entries = without_final_norm(run.metrics["sites"])
            values = [float("nan") if entry["states"][key] is None else entry["states"][key] for entry in entries]
            ax.plot([site_depth(entry["site"]) for entry in entries], values, ":" if untrained else "-", lw=1.6,
                    color=mask_colour(mask), alpha=0.6 if untrained else 1,
                    label=f"{mask}, untrained" if untrained else mask)  # fmt: skip
        label_sites(ax, sites_by_depth(*runs), 9, fontsize=8)
        ax.set_title(STATISTICS[key], fontsize=9)
        ax.set_xlabel("")
    axes[keys.index("rms")].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    rows = [
        run_columns(run) | {"site": entry["site"], **entry["states"]} for run in runs for entry in run.metrics["sites"]
    ]
    return FigureData(figure, rows)


def statistics_figures(study: Study) -> Figures:
    """Yield the figure of the states' statistics, if all trained runs have them."""
    with_statistics = any("states" in run.metrics["sites"][0] for run in study.untrained.values())
    if all("states" in run.metrics["sites"][0] for run in study.trained.values()):
        yield ReportFigure(
            "states", "Scale, anisotropy, neighbourhoods",
            caption(
                "Statistics of the hidden states, computed without a probe. Look for jumps in scale where mIoU moves.",
                "Dotted: the untrained model." if with_statistics else "",
            ),
            state_statistics(study))  # fmt: skip
