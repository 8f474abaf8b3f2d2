"""What the states themselves are like, by site: scale, anisotropy, neighbourhoods."""

from ...mllm import FINAL_NORM
from ..study import Study
from .curves import shown_sites
from .style import Drawn, colour_of, label_sites, new_axes, position

STATISTICS = {
    "rms": "RMS of a feature",
    "anisotropy": "anisotropy (mean cosine)",
    "knn_purity": "kNN purity",
}


def state_statistics(study: Study) -> Drawn:
    """RMS (logarithmic), anisotropy and kNN purity of the image tokens' states at every site; untrained dotted."""
    runs = [run for run in study.runs if "states" in run.metrics["sites"][0]]
    figure, axes = new_axes(6.6, 2.9, len(STATISTICS))
    for ax, (key, text) in zip(axes, STATISTICS.items(), strict=True):
        for run in runs:
            mask, untrained = run.metrics["image_attention"], bool(run.metrics["untrained"])
            entries = [entry for entry in run.metrics["sites"] if entry["site"] != FINAL_NORM]
            ax.plot([position(entry["site"]) for entry in entries], [entry["states"][key] for entry in entries],
                    ":" if untrained else "-", color=colour_of(mask), lw=1.6, alpha=0.6 if untrained else 1,
                    label=f"{mask}, untrained" if untrained else mask)  # fmt: skip
        label_sites(ax, shown_sites(*runs), 5, fontsize=8)
        ax.set_title(text, fontsize=9)
        ax.set_xlabel(ax.get_xlabel() if ax is axes[1] else "", fontsize=9)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    rows = [
        {"image_attention": run.metrics["image_attention"], "untrained": bool(run.metrics["untrained"])}
        | {"site": entry["site"], **entry["states"]}
        for run in runs
        for entry in run.metrics["sites"]
    ]
    return Drawn(figure, rows)
